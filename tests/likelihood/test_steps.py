"""Views of recorded steps: the states that tokens were written in, each once, or as often as its weight says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.masks import RowNoise
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.step_selectors import (
    AllSteps,
    BlockSlices,
    EntropyThreshold,
    Flagged,
    SampledSteps,
    Segments,
    TopEntropy,
)
from rl4dlm.likelihood.steps import RecordedSteps, StepSelector
from rl4dlm.likelihood.views import Rows, StepFacts, Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.likelihood.tabular import rows_of
from tests.models.block_denoisers import KINDS, block_denoiser
from tests.models.float64 import exactly_float64

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [17], [18, 19, 20, 21, 22]]
LENGTH = 12


def decoded(model: Any, generations: int = 3, **settings: Any) -> tuple[Rollout, Rows]:
    """Completions of prompts of different lengths, and the rows that they are."""
    decoding = DecodingConfig(canvas_length=LENGTH, temperature=1.0, **settings)
    rollout = RolloutEngine(model).generate(PROMPTS, decoding, num_generations=generations, seed=4)
    width = max(map(len, rollout.prompt_ids))
    ids, mask = torch.zeros(len(rollout), width, dtype=torch.long), torch.zeros(len(rollout), width, dtype=torch.long)
    for row, prompt in enumerate(rollout.prompt_ids):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    trace = rollout.trace
    facts = StepFacts(trace.entropy, trace.confidence, torch.full((len(rollout),), 3.0))
    return rollout, Rows(
        ids, mask, rollout.canvas, rollout.valid, torch.tensor(rollout.row_ids), commit_step=trace.commit_step,
        facts=facts,
    )  # fmt: skip


def scores_of(model: Any, rows: Rows, estimator: RecordedSteps, **settings: Any) -> tuple[Tensor, Views]:
    views = estimator.draw(rows, seed=1, iteration=0)
    spec = DiffusionSpec.of(model)
    with torch.no_grad():
        found = score_views(model, spec, rows.ids, rows.attention_mask, views, one_view=True, **settings)
    return found.log_probs.sum(1), views


def ends(model: Any, eos: int) -> Any:
    """The same model, which ends early here and there."""
    model = exactly_float64(model)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        hidden = model.base_model(torch.full((1, 8), 2)).last_hidden_state.mean((0, 1))
        head[eos] += 2.5 * hidden / hidden.norm() ** 2
    return attach_scoring(model)


FULL = {
    "low_confidence": {"schedule": "low_confidence", "steps": 6},
    "blocks": {"schedule": "low_confidence", "steps": 12, "block_length": 4},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.04}},
    "random": {"schedule": "random", "steps": 4},
    "canvas": {"schedule": "low_confidence", "steps": 12, "stop_at_eos": False},
}


@pytest.fixture(scope="module")
def llada() -> Any:
    return ends(tiny_llada(initializer_range=0.2, dtype=torch.float64), 1)


@pytest.mark.parametrize("settings", FULL.values(), ids=FULL)
def test_scores_are_the_log_probabilities_at_drawing(llada: Any, settings: dict[str, Any]) -> None:
    rollout, rows = decoded(llada, **settings)
    assert len(rows.valid.sum(-1).unique()) > 1
    scope = "valid" if settings.get("stop_at_eos", True) else "canvas"
    counted = rows.valid if scope == "valid" else torch.ones_like(rows.valid)
    found, views = scores_of(llada, rows, RecordedSteps(AllSteps(), scope))
    assert torch.equal(views.scored.sum(1) == 1, counted)
    assert (found - rollout.trace.raw_log_prob)[counted].abs().max() < 1e-12
    merged, _ = scores_of(llada, rows, RecordedSteps(AllSteps(4), scope))
    assert (merged - rollout.trace.raw_log_prob)[counted].abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings", [{"cfg_scale": 0.8}, {"eos_penalty": 2.0, "suppress_token_ids": (5, 6), "top_k": 20}]
)
def test_guidance_and_penalties_leave_what_scores_are_compared_with(llada: Any, settings: dict[str, Any]) -> None:
    """The model's own log-probabilities are recorded beside them; with guidance, guided ones are, too."""
    rollout, rows = decoded(llada, schedule="low_confidence", steps=6, **settings)
    found, _ = scores_of(llada, rows, RecordedSteps(AllSteps()))
    assert (found - rollout.trace.raw_log_prob)[rows.valid].abs().max() < 1e-12
    guided = settings.get("cfg_scale", 0.0)
    if guided:
        scores, _ = scores_of(llada, rows, RecordedSteps(AllSteps()), cfg_scale=guided)
        assert rollout.trace.confidence is not None
        assert (scores - rollout.trace.confidence.log())[rows.valid].abs().max() < 1e-12
        assert (scores - found)[rows.valid].abs().max() > 1e-3


def test_scores_of_shifted_logits_are_those_at_drawing() -> None:
    model = block_denoiser("full", shift=1)
    rollout, rows = decoded(model, schedule="low_confidence", steps=6)
    found, _ = scores_of(model, rows, RecordedSteps(AllSteps()))
    assert (found - rollout.trace.raw_log_prob)[rows.valid].abs().max() < 1e-12


@pytest.mark.parametrize("settings", [FULL["low_confidence"], FULL["threshold"], FULL["random"]])
def test_views_are_the_states_of_the_rollout(llada: Any, settings: dict[str, Any]) -> None:
    rollout, rows = decoded(llada, **settings)
    estimator = RecordedSteps(AllSteps())
    views = estimator.draw(rows, seed=0, iteration=0)
    shown = views.apply(rows.ids, 2)[..., -LENGTH:]
    states = torch.stack(list(rollout.states()), dim=1)  # [B, S, L]
    mask_id = DiffusionSpec.of(llada).mask_token_id
    seen = 0
    for row in range(len(rows)):
        of_row = [sorted(set(rows.commit_step[row][rows.valid[row]].tolist()))]
        for k, step in enumerate(of_row[0]):
            expected = torch.where(states[row, step] == mask_id, 2, states[row, step])
            assert torch.equal(shown[row, k], expected), (row, step)
            seen += 1
        assert not views.scored[row, len(of_row[0]) :].any()
    assert seen > len(rows)
    hidden = views.hidden[..., -LENGTH:].sum(-1)
    later = views.scored.any(-1)[:, 1:]
    assert (hidden[:, 1:] < hidden[:, :-1])[later].all(), "hidden sets are nested"


@pytest.mark.parametrize(("kind", "origin"), KINDS)
@pytest.mark.parametrize("steps", [{"steps": None, "schedule": "threshold", "schedule_args": {"threshold": 0.5}}])
def test_slices_of_blocks_are_scored_as_they_were_drawn(kind: str, origin: str, steps: dict[str, Any]) -> None:
    """The k-th step of every block in one view; as many views as the block with most steps."""
    model = block_denoiser(kind, origin)
    spec = DiffusionSpec.of(model)
    rollout, rows = decoded(model, **steps)
    selector = BlockSlices(spec)
    found, views = scores_of(model, rows, RecordedSteps(selector))
    assert torch.equal(views.scored.sum(1) == 1, rows.valid)
    assert (found - rollout.trace.raw_log_prob)[rows.valid].abs().max() < 1e-12
    assert views.hidden.shape[1] <= 4 < int(rollout.trace.steps.max())
    one_by_one, others = scores_of(model, rows, RecordedSteps(AllSteps()))
    assert others.hidden.shape[1] > views.hidden.shape[1]
    assert (one_by_one - found).abs().max() < 1e-12
    # Steps of different blocks are different ones, whichever view they share.
    units = RecordedSteps(selector).units(rows, views)
    single = RecordedSteps(AllSteps()).units(rows, others)
    assert torch.equal(units.unit, single.unit) and torch.equal(units.steps, single.steps)
    whole, _ = scores_of(model, rows, RecordedSteps(BlockSlices(spec, merge=4)))
    assert (whole - found)[rows.valid].abs().max() > 1e-3, "a mean field of each block"
    assert RecordedSteps(BlockSlices(spec, merge=4)).draw(rows, seed=0, iteration=0).hidden.shape[1] == 1


def recorded(count: int = 40, canvas: int = 8, seed: int = 0) -> Rows:
    """Rows of all lengths whose tokens were written in random steps, some of them at once, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(count)
    prompt = torch.arange(5) >= 4 - ids[:, None] % 4
    commit = torch.randint(0, 6, (count, canvas), generator=generator)
    valid = torch.arange(canvas) < 1 + ids[:, None] % canvas
    facts = StepFacts(
        torch.rand(count, canvas, generator=generator, dtype=torch.float64),
        torch.rand(count, canvas, generator=generator, dtype=torch.float64),
        torch.full((count,), 0.6, dtype=torch.float64),
    )
    tokens = torch.randint(0, 7, (count, canvas), generator=generator)
    return Rows(prompt.long() * 5, prompt, tokens, valid, ids + 2**40, commit_step=commit, facts=facts)


BLOCKS = DiffusionSpec(mask_token_id=3, eos_token_ids=(1,), attention="block_causal", block_length=3)
COMPLETE = [AllSteps(), AllSteps(2), AllSteps(99), Segments(1), Segments(3), Segments(99), BlockSlices(BLOCKS)]
OTHERS = [
    SampledSteps(2), SampledSteps(5, "entropy"), SampledSteps(2, scale="mean"), TopEntropy(2), EntropyThreshold(),
    Flagged(0.5),
]  # fmt: skip


@pytest.mark.parametrize("selector", [*COMPLETE, *OTHERS], ids=str)
def test_what_is_scored_is_hidden_and_does_not_depend_on_the_batch(selector: StepSelector) -> None:
    rows, estimator = recorded(), RecordedSteps(selector)
    views = estimator.draw(rows, seed=3, iteration=1)
    canvas = views.hidden[..., -rows.canvas_ids.shape[1] :]
    assert (canvas | ~views.scored).all() and (rows.valid[:, None] | ~views.scored).all()
    assert (views.scored.sum(1) <= 1).all() and not views.hidden[..., :5].any()
    used = views.scored.any(-1).long()
    assert (used[:, 1:] <= used[:, :-1]).all(), "empty views come last"
    if isinstance(selector, BlockSlices):
        with pytest.raises(ValueError, match="puts steps of several blocks into a view"):
            estimator.steps(rows, seed=3, iteration=1)
    else:
        steps = estimator.steps(rows, seed=3, iteration=1)
        assert torch.equal(steps.last >= steps.first, used.bool())
        assert torch.equal(steps.weight, views.weight.amax(-1))
        within = (rows.commit_step[:, None] >= steps.first[..., None]) & (
            rows.commit_step[:, None] <= steps.last[..., None]
        )
        assert torch.equal(within & rows.valid[:, None], views.scored), "numbers of the record"
    if selector in COMPLETE:
        assert torch.equal(views.weight.sum(1), rows.valid.double())
    for part in (torch.randperm(len(rows)), slice(3, 4), slice(7, 20)):
        other = estimator.draw(rows[part], seed=3, iteration=1)
        k = other.hidden.shape[1]
        assert torch.equal(other.hidden, views.hidden[part][:, :k])
        assert torch.equal(other.weight, views.weight[part][:, :k]) and not views.scored[part][:, k:].any()


def test_merging_all_steps_is_the_mean_field_and_a_left_to_right_trace_the_chain() -> None:
    rows = recorded()
    rows.commit_step = torch.where(rows.valid, rows.commit_step, -1)  # what was not drawn is hidden, as everywhere
    field = MeanField(0.0).draw(rows, seed=0, iteration=0)
    for selector in (AllSteps(99), Segments(1)):
        views = RecordedSteps(selector).draw(rows, seed=0, iteration=0)
        assert torch.equal(views.hidden, field.hidden) and torch.equal(views.weight, field.weight.double())
    as_many = RecordedSteps(Segments(99)).draw(rows, seed=0, iteration=0)
    exact = RecordedSteps(AllSteps()).draw(rows, seed=0, iteration=0)
    assert torch.equal(as_many.hidden, exact.hidden) and torch.equal(as_many.weight, exact.weight)
    slots = torch.arange(8).expand(len(rows), -1)
    rows.commit_step = torch.where(rows.valid, slots, -1)
    chain, steps = LeftToRight().draw(rows, seed=0, iteration=0), exact_views(rows)
    for row in range(len(rows)):
        count = int(rows.valid[row].sum())
        assert torch.equal(chain.weight[row, :count], steps.weight[row, :count])
        assert torch.equal(chain.hidden[row, :count], steps.hidden[row, :count])


def exact_views(rows: Rows) -> Views:
    return RecordedSteps(AllSteps()).draw(rows, seed=0, iteration=0)


class Evenly(RowNoise):
    """Draws whose start goes evenly through (0, 1) with the row."""

    def spread(self, purpose: str, views: int, stratify: str) -> Tensor:
        start = (torch.arange(len(self.rows)).double() + 0.5) / len(self.rows)
        return (start[:, None] + torch.arange(views) / views) % 1


@pytest.mark.parametrize("proposal", ["uniform", "entropy"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_weights_of_sampled_steps_are_one_on_average(proposal: str, count: int) -> None:
    row = recorded()[torch.tensor([7])]
    many = row[torch.zeros(6000, dtype=torch.long)]
    selector = SampledSteps(count, proposal)
    trail = selector.trail(many, "valid")
    weight = selector.weigh(trail, Evenly(many, 0, 0))
    there = trail.tokens[0] > 0
    assert int(there.sum()) > 3
    torch.testing.assert_close(weight.mean(0)[there], torch.ones(int(there.sum())).double(), rtol=0, atol=5e-3)
    q = selector.probabilities(trail)[0]
    assert float(q.sum()) == pytest.approx(1.0) and (q[~there] == 0).all()
    mean = replace(selector, scale="mean").weigh(trail, Evenly(many, 0, 0))
    torch.testing.assert_close(mean * there.sum(), weight)
    if proposal == "uniform":
        assert q[there].max() == q[there].min()
        drawn = RecordedSteps(selector).draw(recorded(400), seed=1, iteration=0).weight.sum((0, 1)).sum()
        assert float(drawn) == pytest.approx(float(recorded(400).valid.sum()), rel=0.05)
    else:
        assert q[there].max() > 1.5 * q[there].min()


def test_chosen_steps_by_hand() -> None:
    rows = rows_of(torch.tensor([0, 1, 2, 0, 1]), valid=4)
    rows.commit_step = torch.tensor([[3, 0, 0, 5, 3]])
    entropy = torch.tensor([[0.2, 0.5, 0.9, 0.7, 1.0]])
    rows.facts = StepFacts(entropy, torch.tensor([[0.8, 0.4, 0.3, 0.95, 0.1]]), torch.tensor([0.65]))
    # Steps 0, 1, 2 wrote tokens {1, 2}, {0, 4}, {3}, of mean entropies 0.7, 0.6, 0.7; token 4 is behind the end.
    assert RecordedSteps(TopEntropy(1)).draw(rows, seed=0, iteration=0).weight[0].tolist() == [[0, 1, 1, 0, 0]]
    found = RecordedSteps(TopEntropy(2)).draw(rows, seed=0, iteration=0)
    assert found.weight[0].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert found.hidden[0, :, -5:].tolist() == [[True] * 5, [False] * 3 + [True, False]]
    above = RecordedSteps(EntropyThreshold()).draw(rows, seed=0, iteration=0)
    assert torch.equal(above.weight, found.weight)
    unsure = RecordedSteps(Flagged(0.9)).draw(rows, seed=0, iteration=0)
    assert unsure.weight[0].tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    two = RecordedSteps(AllSteps(2)).draw(rows, seed=0, iteration=0)
    assert two.weight[0].tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    units = RecordedSteps(AllSteps(2)).units(rows, two)
    assert units.unit.tolist() == [[0, 0, 0, 1, -1]] and units.steps.tolist() == [2] and units.tokens.tolist() == [4]
    partial = RecordedSteps(TopEntropy(1)).units(rows, RecordedSteps(TopEntropy(1)).draw(rows, seed=0, iteration=0))
    assert partial.unit.tolist() == [[-1, 0, 0, -1, -1]] and partial.tokens.tolist() == [2]


def test_given_tokens_are_seen_and_not_scored() -> None:
    rows = rows_of(torch.tensor([0, 1, 2]))
    rows.commit_step, rows.given = torch.tensor([[1, -1, 0]]), torch.tensor([[False, True, False]])
    views = exact_views(rows)
    assert views.weight[0].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert views.hidden[0, :, -3:].tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize(
    ("selector", "said"),
    [(TopEntropy(1), "TopEntropy needs entropy"), (EntropyThreshold(), "needs entropy"), (Flagged(), "confidence")],
)
def test_missing_records_are_named(selector: StepSelector, said: str) -> None:
    rows = rows_of(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="commit_step of the rows is None"):
        RecordedSteps(selector).draw(rows, seed=0, iteration=0)
    rows.commit_step = torch.tensor([[1, 2, 0]])
    with pytest.raises(ValueError, match=said):
        RecordedSteps(selector).draw(rows, seed=0, iteration=0)
    rows.commit_step = torch.tensor([[1, -1, 0]])
    with pytest.raises(ValueError, match=r"token 1 of row 0 is to be scored \(scope='valid'\) but was never drawn"):
        exact_views(rows)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: AllSteps(0), "merge=0"),
        (lambda: Segments(0), "count=0"),
        (lambda: SampledSteps(1, "best"), "proposal='best' is not allowed; choose one of uniform, entropy"),
        (lambda: SampledSteps(1, scale="none"), "scale='none'"),
        (lambda: TopEntropy(0), "count=0"),
        (lambda: RecordedSteps(AllSteps(), "all"), "scope='all'"),
        (
            lambda: BlockSlices(replace(BLOCKS, attention="full")),
            "block_slices.*attention='full'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(build: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()
