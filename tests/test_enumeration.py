"""Exactness on models small enough to enumerate: three tokens, a few slots, one hand-written distribution per state.

What the engine records is checked against all trajectories there are, and what it draws against the exact distribution.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.rollout.chi_square import chi_square
from tests.rollout.table_model import Table, TableModel, random_table

TOKENS, MASK = 3, 3
PROMPT = [1]
NO_MASK = -1e4  # a logit that leaves the mask token no probability


def engine(table: Table) -> RolloutEngine:
    return RolloutEngine(TableModel(table, TOKENS + 1, mask_token_id=MASK))


def joint(length: int, seed: int) -> Tensor:
    """A random distribution over canvases, `[3, 3, …]`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*[TOKENS] * length, generator=generator, dtype=torch.float64) ** 2 + 0.05
    return weights / weights.sum()


def consistent_table(distribution: Tensor) -> Table:
    """The exact conditionals of a joint distribution over canvases, given what is visible."""

    @functools.cache
    def table(tokens: tuple[int, ...]) -> Tensor:
        canvas = tokens[len(PROMPT) :]
        logits = torch.full((len(tokens), TOKENS + 1), NO_MASK, dtype=torch.float64)
        for i, token in enumerate(canvas):
            if token != MASK:
                continue
            for value in range(TOKENS):
                index = tuple(slice(None) if t == MASK else t for t in (*canvas[:i], value, *canvas[i + 1 :]))
                logits[len(PROMPT) + i, value] = distribution[index].sum().log()
        return logits

    return table


def conditional(table: Table, canvas: Sequence[int], temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """Probabilities `[L, 3]` that tokens are drawn from, by the definition."""
    logits = table((*PROMPT, *canvas))[len(PROMPT) :, :MASK] / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits.softmax(-1)


def exact_distribution(table: Table, length: int, temperature: float = 1.0, top_k: int = 0) -> dict[tuple, float]:
    """The distribution over canvases of drawing one token per step in uniformly random order, by recursion."""

    @functools.cache
    def from_state(canvas: tuple[int, ...]) -> dict[tuple, float]:
        masked = [i for i, token in enumerate(canvas) if token == MASK]
        if not masked:
            return {canvas: 1.0}
        total: dict[tuple, float] = {}
        probabilities = conditional(table, canvas, temperature, top_k)
        for i, token in itertools.product(masked, range(TOKENS)):
            weight = probabilities[i, token].item() / len(masked)
            for final, probability in from_state((*canvas[:i], token, *canvas[i + 1 :])).items():
                total[final] = total.get(final, 0.0) + weight * probability
        return total

    return from_state((MASK,) * length)


# --- all trajectories -------------------------------------------------------------------------------------------------


@dataclass
class Script:
    """A `NoiseSource` that lets row r take the r-th of some trajectories.

    `tokens[r][step][position]` is the candidate, `rank[r][position]` the higher the earlier it is committed.
    """

    tokens: list[Any]
    rank: list[Sequence[int]]

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        values = [self.rank[r][p] for r, p in zip(rows.tolist(), positions.tolist(), strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        keys = zip(rows.tolist(), steps.tolist(), positions.tolist(), strict=True)
        return torch.tensor([self.tokens[r][s][p] for r, s, p in keys])


def orders(length: int, per_step: int) -> Iterator[tuple[int, ...]]:
    """For each way of choosing `per_step` positions at a time: the step of each position."""
    steps = [position // per_step for position in range(length)]
    yield from sorted(set(itertools.permutations(steps)))


@pytest.mark.parametrize(
    ("length", "per_step", "settings"),
    [
        (3, 1, {"temperature": 1.0}),
        (3, 1, {"temperature": 0.6}),
        (3, 1, {"temperature": 1.3, "top_k": 2}),
        (3, 1, {"temperature": 1.0, "top_p": 0.7}),
        (3, 1, {"temperature": 1.0, "cfg_scale": 0.8}),
        (4, 2, {"temperature": 1.0}),
        (4, 4, {"temperature": 1.0}),
        (4, 1, {"temperature": 1.0, "block_length": 2}),
    ],
)
def test_trajectories_in_random_order_have_total_probability_one(length: int, per_step: int, settings: dict):
    block = settings.get("block_length", length)
    all_orders = [order for order in orders(length, per_step) if in_blocks(order, block)]
    trajectories = list(itertools.product(all_orders, itertools.product(range(TOKENS), repeat=length)))
    script = Script(
        [[tokens] * length for _, tokens in trajectories], [[-s for s in order] for order, _ in trajectories]
    )
    decoding = DecodingConfig(canvas_length=length, schedule="random", steps=length // per_step, **settings)
    rollout = engine(random_table(7, TOKENS + 1)).generate(
        [PROMPT], decoding, num_generations=len(trajectories), noise=script
    )
    assert rollout.trace.commit_step.tolist() == [list(order) for order, _ in trajectories]
    assert rollout.canvas.tolist() == [list(tokens) for _, tokens in trajectories]
    total = rollout.trace.log_prob.sum(-1).exp().sum().item() / len(all_orders)
    assert total == pytest.approx(1.0, abs=1e-12)


def in_blocks(order: Sequence[int], block: int) -> bool:
    blocks = [order[start : start + block] for start in range(0, len(order), block)]
    return all(max(a) < min(b) for a, b in itertools.pairwise(blocks))


def test_trajectories_by_confidence_do_not():
    """Which candidate is committed depends on the others, which are thrown away: their draws are hidden variables.

    So the product of the committed tokens' probabilities, which trajectory methods use, is no probability here.
    """
    length = 3
    candidates = list(itertools.product(itertools.product(range(TOKENS), repeat=length), repeat=length))
    # One candidate per slot and step; slots already written ignore theirs, so most combinations repeat.
    script = Script(candidates, [[0] * length] * len(candidates))
    decoding = DecodingConfig(canvas_length=length, steps=length, temperature=1.0)
    rollout = engine(random_table(7, TOKENS + 1)).generate(
        [PROMPT], decoding, num_generations=len(candidates), noise=script
    )
    trajectories = {
        (tuple(order), tuple(canvas)): score
        for order, canvas, score in zip(
            rollout.trace.commit_step.tolist(),
            rollout.canvas.tolist(),
            rollout.trace.log_prob.sum(-1).tolist(),
            strict=True,
        )
    }
    total = sum(math.exp(score) for score in trajectories.values())
    assert abs(total - 1) > 0.05


# --- what is drawn ----------------------------------------------------------------------------------------------------

ROWS = 12_000


def drawn_counts(table: Table, length: int, **settings: Any) -> Tensor:
    decoding = DecodingConfig(canvas_length=length, **{"steps": length, "temperature": 1.0, **settings})
    canvas = engine(table).generate([PROMPT], decoding, num_generations=ROWS, seed=5).canvas
    return (canvas * TOKENS ** torch.arange(length).flip(0)).sum(-1).bincount(minlength=TOKENS**length)


def as_vector(distribution: dict[tuple, float], length: int) -> Tensor:
    order = itertools.product(range(TOKENS), repeat=length)
    return torch.tensor([distribution.get(canvas, 0.0) for canvas in order], dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"temperature": 1.4, "top_k": 2}], ids=str)
def test_random_order_draws_from_the_enumerated_distribution(settings: dict[str, Any]):
    table = random_table(11, TOKENS + 1, scale=0.5)
    exact = as_vector(exact_distribution(table, 3, **settings), 3)
    assert exact.sum().item() == pytest.approx(1.0, abs=1e-12)
    chi_square(drawn_counts(table, 3, schedule="random", **settings), exact)


@pytest.mark.parametrize("settings", [{"schedule": "random"}, {"block_length": 1}], ids=str)
def test_one_token_per_step_draws_from_the_joint_of_a_consistent_model(settings: dict[str, Any]):
    distribution = joint(3, seed=2)
    chi_square(drawn_counts(consistent_table(distribution), 3, **settings), distribution.flatten())


@pytest.mark.parametrize("settings", [{"schedule": "random", "steps": 1}, {"schedule": "low_confidence"}], ids=str)
def test_several_tokens_per_step_or_choosing_by_confidence_does_not(settings: dict[str, Any]):
    """The first draws tokens as if they were independent, the second prefers likely candidates."""
    distribution = joint(3, seed=2)
    with pytest.raises(AssertionError):
        chi_square(drawn_counts(consistent_table(distribution), 3, **settings), distribution.flatten())


# --- what is scored ---------------------------------------------------------------------------------------------------


def scores(table: Table, canvases: Tensor, hidden: Tensor, scored: Tensor) -> Tensor:
    """Sums of log-probabilities `[B]` of canvases `[B, L]` in views that hide and score slots, bool `[K, L]`."""
    model = attach_scoring(TableModel(table, TOKENS + 1, mask_token_id=MASK))
    ids = torch.cat([torch.tensor(PROMPT).expand(len(canvases), -1), canvases], dim=1)
    prompt = torch.zeros(len(hidden), len(PROMPT)).bool()
    views = Views(torch.cat([prompt, hidden], dim=1).expand(len(ids), -1, -1), scored.double().expand(len(ids), -1, -1))
    found = score_views(model, DiffusionSpec.of(model), ids, torch.ones_like(ids), views)
    return (found.log_probs * views.weight).sum((1, 2))


def all_canvases(length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(TOKENS), repeat=length)))


@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_chain_rule_over_views_is_the_joint_of_a_consistent_model(length: int):
    distribution = joint(length, seed=length)
    exact = distribution.flatten().log()
    for order in itertools.permutations(range(length)):
        place = torch.tensor([order.index(i) for i in range(length)])
        hidden = place >= torch.arange(length)[:, None]  # [K, L]: what comes at or after the k-th place
        scored = place == torch.arange(length)[:, None]
        found = scores(consistent_table(distribution), all_canvases(length), hidden, scored)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_the_mean_field_score_is_the_product_of_marginals():
    distribution = joint(3, seed=9)
    whole = torch.ones(1, 3).bool()
    found = scores(consistent_table(distribution), all_canvases(3), whole, whole)
    marginals = [distribution.sum([d for d in range(3) if d != i]) for i in range(3)]
    product = torch.einsum("a,b,c->abc", *marginals)
    torch.testing.assert_close(found, product.flatten().log(), rtol=0, atol=1e-12)
    assert (found - distribution.flatten().log()).abs().max() > 0.1  # it is exact for independent tokens only
    independent = scores(consistent_table(product), all_canvases(3), whole, whole)
    torch.testing.assert_close(independent, product.flatten().log(), rtol=0, atol=1e-12)
