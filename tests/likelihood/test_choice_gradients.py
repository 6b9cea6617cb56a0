"""Trajectories whose slots a policy draws, against a full enumeration: their mass, their marginals, their gradients.

The model is a table of logits per state of three slots, which are the policy's features, too; all is in float64.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl4dlm.likelihood.choices import choices_of
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.step_selectors import AllSteps
from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.likelihood.views import Rows, StepFacts
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.policies.hidden_states import UnmaskingPolicyModule
from rl4dlm.rollout.policies.policy import Seen, attach_policy, fresh
from tests.rollout.chi_square import chi_square
from tests.rollout.table_model import TableModel

SLOTS, TOKENS, MASK = 3, 2, 2
PROMPT = 1


class Toy(TableModel):
    """Logits are weights, one row per slot of each state; the mask token has none to speak of."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__(self.table, TOKENS + 1, mask_token_id=MASK)
        shape = (TOKENS + 1) ** SLOTS, SLOTS, TOKENS
        self.logits = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.config.hidden_size = TOKENS + 1  # type: ignore[attr-defined]

    def table(self, tokens: tuple[int, ...]) -> Tensor:
        state = self.state(tokens[1:]) if tokens[0] == PROMPT and len(tokens) == SLOTS + 1 else self.logits[0]
        given = torch.cat([state.new_zeros(len(tokens) - SLOTS, TOKENS), state])
        return torch.cat([given, torch.full_like(given[:, :1], -60.0)], dim=-1)

    def state(self, canvas: tuple[int, ...]) -> Tensor:
        code = 0
        for token in canvas:
            code = code * (TOKENS + 1) + token
        return self.logits[code]

    def get_input_embeddings(self) -> nn.Module:
        return self.head


def toy() -> Any:
    model = attach_scoring(Toy())
    policy = fresh(UnmaskingPolicyModule(TOKENS + 1, frequencies=4, layers=0), seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    attach_policy(model, policy)
    return model


def trajectories(counts: tuple[int, ...]) -> list[tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]]:
    """Slots in the order they are drawn, step by step, and the tokens at the slots; the last step draws nothing."""
    found = []
    for order in itertools.permutations(range(SLOTS)):
        steps, start = [], 0
        for count in counts:
            steps.append(order[start : start + count])
            start += count
        if list(steps[-1]) != sorted(steps[-1]):
            continue  # what is left over has one order that counts
        found += [(tuple(steps), tokens) for tokens in itertools.product(range(TOKENS), repeat=SLOTS)]
    return found


def by_hand(model: Any, steps: tuple[tuple[int, ...], ...], tokens: tuple[int, ...]) -> Tensor:
    """The log-probability of a trajectory, draw by draw, from the weights themselves."""
    canvas, total = [MASK] * SLOTS, model.logits.new_zeros(())
    for number, slots in enumerate(steps):
        states = model.table((PROMPT, *canvas))[None, 1:]
        masked = torch.tensor([[token == MASK for token in canvas]])
        time = torch.tensor([number / len(steps)])
        all_of = torch.ones_like(masked)
        utilities = model.unmasking_policy(Seen(states, masked, all_of, all_of, time))[0]
        left = [slot for slot in range(SLOTS) if canvas[slot] == MASK]
        certain = len(left) == len(slots)
        for slot in slots:
            if not certain:
                total = total + utilities[left].log_softmax(-1)[left.index(slot)]
                left.remove(slot)
            total = total + states[0, slot, :TOKENS].log_softmax(-1)[tokens[slot]]
        for slot in slots:
            canvas[slot] = tokens[slot]
    return total


def scored(model: Any, every: list[Any]) -> Tensor:
    """The same from the record, as trainers have it: `[n]`."""
    count = len(every)
    step, rank = torch.zeros(2, count, SLOTS, dtype=torch.long)
    for row, (steps, _) in enumerate(every):
        for number, slots in enumerate(steps):
            for place, slot in enumerate(slots):
                step[row, slot], rank[row, slot] = number, place
    canvas = torch.tensor([tokens for _, tokens in every])
    prompt = torch.full((count, 1), PROMPT)
    ones = torch.ones_like(canvas)
    facts = StepFacts(rank=rank)
    rows = Rows(prompt, torch.ones_like(prompt), canvas, ones, torch.arange(count), commit_step=step, facts=facts)
    views = RecordedSteps(AllSteps(), "canvas").draw(rows, seed=0, iteration=0)
    choices = choices_of(rows, views, block_length=None, steps=len(every[0][0]))
    found = score_views(model, DiffusionSpec.of(model), rows.ids, rows.attention_mask, views, choices=choices)
    assert found.choices is not None
    return (found.log_probs + found.choices).sum((1, 2))


COUNTS = [(1, 1, 1), (2, 1)]
cases = pytest.mark.parametrize("counts", COUNTS, ids=str)


@cases
def test_the_mass_of_all_trajectories_is_one(counts: tuple[int, ...]) -> None:
    model, every = toy(), trajectories(counts)
    assert len(every) == {(1, 1, 1): 48, (2, 1): 48}[counts]
    log_probs = scored(model, every).detach()
    assert float(log_probs.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    expected = torch.stack([by_hand(model, *one) for one in every])
    torch.testing.assert_close(log_probs, expected.detach(), rtol=0, atol=1e-10)


@cases
def test_the_engine_draws_them_as_often(counts: tuple[int, ...]) -> None:
    model, every = toy(), trajectories(counts)
    rows = 3000
    config = DecodingConfig(canvas_length=SLOTS, schedule="learned_order", steps=len(counts), temperature=1.0)
    rollout = RolloutEngine(model).generate([[PROMPT]], config, num_generations=rows, seed=4)
    number = {one: i for i, one in enumerate(every)}
    seen = torch.zeros(len(every), dtype=torch.float64)
    assert rollout.trace.commit_rank is not None
    columns = (rollout.canvas, rollout.trace.commit_step, rollout.trace.commit_rank)
    for tokens, step, rank in zip(*(column.tolist() for column in columns), strict=True):
        steps = [
            sorted((slot for slot in range(SLOTS) if step[slot] == k), key=lambda slot: rank[slot])
            for k in range(len(counts))
        ]
        steps[-1].sort()
        seen[number[(tuple(map(tuple, steps)), tuple(tokens))]] += 1
    probabilities = scored(model, every).detach().exp()
    common = probabilities * rows >= 6
    rest = torch.stack([seen[~common].sum()]), torch.stack([probabilities[~common].sum()])
    chi_square(torch.cat([seen[common], rest[0]]), torch.cat([probabilities[common], rest[1]]))


@cases
def test_reinforce_is_the_gradient_of_the_expected_reward(counts: tuple[int, ...]) -> None:
    """Through the policy, and through the model by its tokens and by what the policy sees of it."""
    every = trajectories(counts)
    rewards = torch.randn(len(every), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model, other = toy(), toy()
    log_probs = scored(model, every)
    (log_probs.detach().exp() * rewards * log_probs).sum().backward()
    exact = torch.stack([by_hand(other, *one) for one in every]).exp() @ rewards
    exact.backward()
    expected = dict(other.named_parameters())
    compared = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert "logits" in compared and sum("unmasking_policy" in name for name in compared) >= 10
    for name, weight in model.named_parameters():
        if name in compared and expected[name].grad is not None:
            torch.testing.assert_close(weight.grad, expected[name].grad, rtol=0, atol=1e-10, msg=name)
    assert any(float(w.grad.abs().max()) > 1e-4 for n, w in expected.items() if "policy" in n and w.grad is not None)
