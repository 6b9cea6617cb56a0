"""Audits: nothing to find where a cache is exact, and where it is not, what a forward of each state by hand finds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.audit import Audit, audit, count_forwards, summary, why_not
from rl4dlm.rollout.decoding import DecodingConfig, available_schedules
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.models.block_denoisers import KINDS, LENGTH, PROMPTS as BLOCK_PROMPTS, block_denoiser, decoding_log_probs
from tests.rollout.denoisers import EOS, MASK, PROMPTS, denoiser, row_logits, sampling_distribution

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"steps": 6},
    "one block": {"steps": 5, "block_length": None},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.45}},
    "random order": {"schedule": "random", "steps": 6, "temperature": 0.6},
    "sampled": {"steps": 6, "temperature": 1.0},
    "filtered": {"steps": 6, "temperature": 2.0, "top_p": 0.6, "top_k": 7},
    "guided": {"steps": 6, "temperature": 1.0, "cfg_scale": 1.5},
    "guided, greedy": {"steps": 6, "cfg_scale": 0.5},
    "options": {
        "steps": 6,
        "temperature": 0.8,
        "eos_penalty": 1.5,
        "eos_penalty_decay": True,
        "suppress_token_ids": (5, 7),
        "min_new_tokens": 3,
        "known_tokens": 20,
        "defer_token_ids": (9,),
    },
    "early ends": {"steps": 12, "temperature": 1.0, "stop_at_eos": True, "eos_penalty": -4.0},
}
HINTS = [{}, {2: 7}, {4: 8, 5: 9, 6: 10, 7: 11}, {}, {0: EOS}]


def decoded(name: str, cache: str, shift: int = 0, **kwargs: Any) -> Rollout:
    settings = {"canvas_length": 12, "block_length": 4, "stop_at_eos": False, "cache": cache, **SETTINGS[name]}
    return RolloutEngine(denoiser(shift=shift)).generate(PROMPTS, DecodingConfig(**settings), seed=8, **kwargs)


def by_hand(rollout: Rollout, shift: int) -> dict[tuple[int, int], tuple[float, float, bool]]:
    """Per row and slot: its log-probability, that of the draw, and whether it is the best, state by state and alone."""
    config, model, found = rollout.decoding, denoiser(shift=shift), {}
    assert config is not None
    for step, states in enumerate(rollout.states()):
        for row, prompt in enumerate(rollout.prompt_ids):
            committed = (rollout.trace.commit_step[row] == step).nonzero().squeeze(-1).tolist()
            if not committed:
                continue
            own = row_logits(model, prompt, states[row])
            logits = row_logits(model, prompt, states[row], config.cfg_scale)
            for slot in committed:
                token = int(rollout.canvas[row, slot])
                allowed = logits[slot].clone()
                allowed[MASK] = -torch.inf
                drawn = sampling_distribution(logits[slot], MASK, config.temperature or 1.0, config.top_p, config.top_k)
                found[row, slot] = (
                    own[slot].log_softmax(-1)[token].item(),
                    drawn[token].log().item(),
                    token == int(allowed.argmax()),
                )
    return found


def assert_nothing_found(found: Audit, rollout: Rollout) -> None:
    written = rollout.trace.commit_step >= 0
    assert len(found.rows) == int(written.sum()) > 0
    seen = torch.zeros_like(written)
    seen[found.rows, found.positions] = True
    assert torch.equal(seen, written)
    assert torch.equal(found.steps, rollout.trace.commit_step[found.rows, found.positions])
    assert (found.exact - found.recorded).abs().max() <= 1e-10
    assert (found.exact_drawn - found.recorded_drawn).abs().max() <= 1e-10
    assert bool(found.agrees[found.known].all())
    said = found.summary()
    assert said["delta"] <= 1e-10 and said["max_delta"] <= 1e-10
    assert said["ratio"] == pytest.approx(1, abs=1e-9) == said["effective_share"]
    assert said.get("agreement", 1.0) == 1.0


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_without_a_cache_there_is_nothing_to_find(name: str, shift: int):
    rollout = decoded(name, "none", shift, hints=HINTS)
    found = audit(denoiser(shift=shift), rollout)
    assert_nothing_found(found, rollout)
    assert bool(found.known.all()) == (rollout.trace.log_prob is None)  # draws may be any token
    if name == "early ends":
        assert "eos" in rollout.stop_reason


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("settings", [{"steps": 6}, {"steps": 9, "temperature": 1.0, "cfg_scale": 1.5}])
@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response")])
def test_an_exact_cache_has_nothing_to_find(kind: str, origin: str, settings: dict[str, Any], shift: int):
    model = block_denoiser(kind, origin, shift=shift)
    length = LENGTH if kind != "causal" else 12
    block = {"block_length": 4} if kind == "causal" else {}
    config = DecodingConfig(canvas_length=length, cache="prefix", stop_at_eos=False, **block, **settings)
    rollout = RolloutEngine(model).generate(BLOCK_PROMPTS, config, seed=3, hints=[{}, {0: 9}, {}, {4: 5}, {}])
    assert rollout.exact and DiffusionSpec.of(model).attention == kind
    assert_nothing_found(audit(model, rollout, rows_per_forward=7), rollout)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("options", "early ends")])
def test_an_approximate_cache_is_measured_as_by_hand(name: str, shift: int, cache: str):
    rollout = decoded(name, cache, shift, num_generations=2)
    found, expected = audit(denoiser(shift=shift), rollout, rows_per_forward=9), by_hand(rollout, shift)
    assert not rollout.exact and len(found.rows) == len(expected) == rollout.canvas.numel()
    drawn = rollout.trace.log_prob is not None
    gaps, weights, agreeing = [], [], []
    for i, (row, slot) in enumerate(zip(found.rows.tolist(), found.positions.tolist(), strict=True)):
        exact, exact_drawn, best = expected[row, slot]
        recorded = rollout.trace.raw_log_prob[row, slot].item()
        behaviour = recorded if rollout.trace.log_prob is None else rollout.trace.log_prob[row, slot].item()
        assert found.recorded[i].item() == recorded and found.recorded_drawn[i].item() == behaviour
        assert found.exact[i].item() == pytest.approx(exact, abs=1e-10)
        assert found.exact_drawn[i].item() == pytest.approx(exact_drawn if drawn else exact, abs=1e-10)
        assert bool(found.agrees[i]) == best
        assert rollout.trace.confidence is not None
        assert bool(found.known[i]) == (not drawn or rollout.trace.confidence[row, slot].item() > 0.5)
        gaps.append(abs(exact - recorded))
        weights.append(torch.tensor((exact_drawn if drawn else exact) - behaviour, dtype=torch.float64).exp().item())
        if found.known[i]:
            agreeing.append(best)
    said = found.summary()
    assert said["delta"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-9) and said["delta"] > 1e-4
    assert said["max_delta"] == pytest.approx(max(gaps), rel=1e-9)
    assert said["ratio"] == pytest.approx(sum(weights) / len(weights), rel=1e-9)
    share = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    assert said["effective_share"] == pytest.approx(share, rel=1e-9) and share < 1
    assert said["agreement"] == pytest.approx(sum(agreeing) / len(agreeing))


@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_an_approximate_cache_of_a_block_model_is_measured_as_by_hand(kind: str, origin: str):
    model = block_denoiser(kind, origin)
    config = DecodingConfig(canvas_length=LENGTH, cache="dual_masked", stop_at_eos=False, steps=9)
    rollout = RolloutEngine(model).generate(BLOCK_PROMPTS, config, seed=3)
    found = audit(model, rollout, rows_per_forward=7)
    assert not rollout.exact and found.summary()["delta"] > 1e-4
    states = list(rollout.states())
    with torch.no_grad():
        columns = (found.rows, found.steps, found.positions, found.exact)
        for row, step, slot, exact in zip(*(column.tolist() for column in columns), strict=True):
            canvas = rollout.canvas[row].tolist()
            by_block = decoding_log_probs(model, rollout.prompt_ids[row], canvas, states[step][row].tolist())
            assert exact == pytest.approx(by_block[slot, canvas[slot]].item(), abs=1e-10)


def test_the_first_step_of_a_block_is_exact_and_later_ones_are_stale():
    rollout = decoded("greedy", "prefix")  # two steps in each block of four
    found = audit(denoiser(), rollout)
    gap = (found.exact - found.recorded).abs()
    entered = found.steps % 2 == 0
    assert gap[entered].max() <= 1e-12 < 1e-6 < gap[~entered].max()


def test_a_schedule_that_remembers_is_compared_by_the_models_own_probabilities():
    settings = {"canvas_length": 12, "block_length": 4, "schedule": "credit", "stop_at_eos": False, "temperature": 0.8}
    for cache, low, high in (("none", 0.0, 1e-10), ("prefix", 1e-4, 10.0)):
        rollout = RolloutEngine(denoiser()).generate(PROMPTS, DecodingConfig(**settings, cache=cache), seed=8)
        found = audit(denoiser(), rollout)
        assert torch.equal(found.recorded_drawn, found.recorded) and torch.equal(found.exact_drawn, found.exact)
        assert "agreement" not in found.summary() and low <= found.summary()["delta"] <= high


def test_some_rows_and_any_number_of_states_per_forward():
    model, rollout = denoiser(), decoded("sampled", "prefix", num_generations=2)
    whole = audit(model, rollout)
    counts = []
    handle = model.model.register_forward_pre_hook(lambda *_: counts.append(1))
    try:
        for size in (1, 4, 60):
            counts.clear()
            some = audit(model, rollout, [7, 2], rows_per_forward=size)
            assert some.forwards == len(counts) == count_forwards(rollout, [7, 2], size) == -(-12 // size)
            for row in (2, 7):
                for name in ("steps", "positions", "known", "agrees", "recorded", "recorded_drawn"):
                    values = getattr(some, name)[some.rows == row]
                    assert torch.equal(values, getattr(whole, name)[whole.rows == row]), name
                for name in ("exact", "exact_drawn"):
                    values, expected = (getattr(a, name)[a.rows == row] for a in (some, whole))
                    torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
        counts.clear()
        none = audit(model, rollout, [], forwards=3)  # in step with others
        assert none.forwards == len(counts) == 3 and none.summary() == {}
        counts.clear()
        more = audit(model, rollout, [2], rows_per_forward=4, forwards=5)
        assert more.forwards == len(counts) == 5
        assert torch.equal(more.rows, torch.full((12,), 2))
    finally:
        handle.remove()


def test_the_mode_of_the_model_stays():
    model, rollout = denoiser(), decoded("greedy", "none")
    model.train()
    try:
        audit(model, rollout, [0])
        assert model.training
    finally:
        model.eval()


def test_what_audits_say_together():
    def of(exact: list[float], recorded: list[float], known: list[bool], agrees: list[bool]) -> Tensor:
        n = torch.arange(len(exact))
        a, b = torch.tensor(exact).log(), torch.tensor(recorded).log()
        return Audit(n, n, n, b, a, b, a, torch.tensor(known), torch.tensor(agrees), 1).sums()

    first = of([0.5, 0.25], [0.25, 0.5], [True, True], [True, False])
    second = of([0.5], [0.5], [False], [True])
    nothing = torch.zeros(7, dtype=torch.float64)
    said = summary(torch.stack([first, nothing, second]))
    ln2 = torch.tensor(2.0).log().item()
    assert said == pytest.approx(
        {
            "delta": 2 * ln2 / 3,
            "max_delta": ln2,
            "agreement": 0.5,
            "ratio": 3.5 / 3,  # weights 2, 1/2 and 1
            "effective_share": 3.5**2 / (3 * 5.25),
        },
        rel=1e-6,
    )
    assert "agreement" not in summary(second[None])
    assert summary(nothing[None]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "saber"}, "schedule='saber' can take back, replace or move"),
        ({"schedule": "latent_refinement", "temperature": 0.0}, "feeds something else than tokens"),
    ],
)
def test_what_cannot_be_audited_is_said(settings: dict[str, Any], message: str):
    rollout = RolloutEngine(denoiser()).generate(PROMPTS[:1], DecodingConfig(canvas_length=4, **settings))
    with pytest.raises(ValueError, match=message):
        audit(denoiser(), rollout)


def test_what_is_exact_has_no_settings_of_the_cache_it_replaces():
    config = DecodingConfig(canvas_length=10, cache="dual", cache_args={"refresh_blocks": 2}).for_model(
        DiffusionSpec.of(block_denoiser("block_causal"))
    )
    exact = config.exactly()
    assert (exact.cache, exact.cache_args, exact.block_length) == ("auto", {}, config.block_length)
    assert RolloutEngine(block_denoiser("block_causal")).generate(BLOCK_PROMPTS, exact).cache == "prefix"


def test_bad_settings_are_named():
    rollout = decoded("greedy", "none")
    with pytest.raises(ValueError, match="rows_per_forward=0 is not allowed"):
        audit(denoiser(), rollout, rows_per_forward=0)
    with pytest.raises(ValueError, match="does not say how it was decoded"):
        audit(denoiser(), dataclasses.replace(rollout, decoding=None))


NEED_MORE = ("edlm", "guided", "learn2pd", "learned_order", "levenshtein")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", [name for name in available_schedules() if name not in NEED_MORE])
@pytest.mark.parametrize("kind", ["full", "block_causal", "context_causal"])
def test_no_schedule_has_anything_to_find_where_logits_are_exact(kind: str, name: str, shift: int):
    """Every schedule that can be audited, drawing and not, with what `auto` chooses."""
    model = denoiser(shift=shift) if kind == "full" else block_denoiser(kind, shift=shift)
    prompts, audited = PROMPTS if kind == "full" else BLOCK_PROMPTS, 0
    for temperature, hints, block in ((0.0, None, 4), (1.0, HINTS, 4), (1.0, None, None)):
        settings = {"canvas_length": 12, "schedule": name, "stop_at_eos": False, "temperature": temperature}
        try:
            config = DecodingConfig(**settings, block_length=block)
            rollout = RolloutEngine(model).generate(prompts, config, seed=2, hints=hints)
        except ValueError:  # not for this model, or not with these settings
            continue
        if why_not(rollout.decoding) is not None:
            with pytest.raises(ValueError, match="the rollout cannot be audited"):
                audit(model, rollout)
            continue
        assert_nothing_found(audit(model, rollout, rows_per_forward=11), rollout)
        audited += 1
    if not audited:
        pytest.skip(f"{name} does not decode such a model, or cannot be audited")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["full", "block_causal", "context_causal"])
def test_drafts_have_nothing_to_find(kind: str, shift: int):
    model = denoiser(shift=shift) if kind == "full" else block_denoiser(kind, shift=shift)
    config = DecodingConfig(canvas_length=12, block_length=4, steps=12, stop_at_eos=False, draft_steps=3)
    rollout = RolloutEngine(model).generate(PROMPTS if kind == "full" else BLOCK_PROMPTS, config)
    assert bool((rollout.nfe < rollout.trace.steps).any())  # some steps were guessed right
    assert_nothing_found(audit(model, rollout), rollout)
