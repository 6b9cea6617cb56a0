"""S2D2: drafts that are checked from left to right, and what the tokens are then distributed as."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.audit import why_not
from rl4dlm.rollout.caches import available_caches, build_cache
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.parts import first_run
from tests.models.block_denoisers import BLOCK, KINDS, MASK, PROMPTS, block_denoiser, block_of, sees
from tests.rollout.chi_square import chi_square
from tests.rollout.denoisers import assert_same_rows, denoiser

ROWS, LENGTH = 3000, 3 * BLOCK


def decoded(kind: str = "block_causal", origin: str = "position_zero", **settings: Any) -> Rollout:
    arguments, prompts = settings.pop("schedule_args", {}), settings.pop("prompts", PROMPTS)
    more = {name: settings.pop(name) for name in ("hints", "choices") if name in settings}
    usual = {"canvas_length": LENGTH, "schedule": "s2d2", "schedule_args": arguments, "stop_at_eos": False}
    usual |= {"steps": settings.get("canvas_length", LENGTH)}
    engine = RolloutEngine(block_denoiser(kind, origin))
    return engine.generate(prompts, DecodingConfig(**{**usual, **settings}), seed=4, **more)


@torch.no_grad()
def left_to_right(kind: str, origin: str, prompt: list[int], canvas: list[int], slot: int) -> Tensor:
    """q, log-probabilities `[V]`: of a mask that sees the tokens before it, of its block those from left to right."""
    model = block_denoiser(kind, origin)
    spec, place = DiffusionSpec.of(model), len(prompt) + slot
    tokens = [*prompt, *canvas[:slot], MASK]
    active = block_of(spec, len(prompt), place)

    def visible(query: int, key: int) -> bool:
        if block_of(spec, len(prompt), query) == active:
            return key <= query
        return sees(spec, len(prompt), active, query, key)

    mask = torch.tensor([[visible(q, k) for k in range(len(tokens))] for q in range(len(tokens))])
    logits: Tensor = model(input_ids=torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0, place]
    return logits.log_softmax(-1)


def test_the_first_run_of_open_slots() -> None:
    open_slots = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    assert first_run(open_slots).int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0, 0, 1, 1, 1]]


@pytest.mark.parametrize(("kind", "origin"), KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_recorded_of_a_token_is_the_models_from_left_to_right(
    kind: str, origin: str, temperature: float
) -> None:
    """Whether it passed or took another's place; every step checks."""
    rollout = decoded(kind, origin, temperature=temperature, hints=[{}, {1: 7}, {4: 9, 5: 8}, {}, {0: 5}])
    assert torch.equal(rollout.nfe, 2 * rollout.trace.steps) and bool((rollout.trace.steps < LENGTH).any())
    for row, prompt in enumerate(PROMPTS):
        canvas = rollout.canvas[row].tolist()
        for slot in (~rollout.hinted[row]).nonzero().squeeze(-1).tolist():
            # Slots that were given behind it are in the block, but it does not see them.
            q = left_to_right(kind, origin, prompt, canvas, slot)
            assert float(rollout.trace.raw_log_prob[row, slot]) == pytest.approx(float(q[canvas[slot]]), abs=1e-9)
            if temperature:
                allowed = q.clone().index_fill(0, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
                assert rollout.trace.log_prob is not None
                found = float(rollout.trace.log_prob[row, slot])
                assert found == pytest.approx(float(allowed[canvas[slot]]), abs=1e-9)


@functools.cache
def three_tokens() -> Rollout:
    """Many completions of one prompt, of three slots that hold one of three tokens each."""
    choices = [{slot: [3, 5, 8] for slot in range(3)}] * ROWS
    return decoded(prompts=[PROMPTS[0]] * ROWS, canvas_length=3, temperature=3.0, choices=choices)


def test_completions_are_distributed_as_the_model_says_them_from_left_to_right() -> None:
    canvas, tokens = three_tokens().canvas, [3, 5, 8]
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            for k, c in enumerate(tokens):
                total = 0.0
                for slot, token in enumerate((a, b, c)):
                    q = left_to_right("block_causal", "position_zero", PROMPTS[0], [a, b, c], slot)
                    total += float(q[token] / 3 - (q[torch.tensor(tokens)] / 3).logsumexp(0))
                expected[i, j, k] = torch.tensor(total).exp()
    assert float(expected.sum()) == pytest.approx(1)
    place = torch.stack([(canvas == token).long() * i for i, token in enumerate(tokens)]).sum(0)
    counts = torch.bincount(place[:, 0] * 9 + place[:, 1] * 3 + place[:, 2], minlength=27)
    enough = expected.flatten() * ROWS >= 5
    assert int(enough.sum()) >= 20
    lumped = [torch.cat([v[enough], v[~enough].sum()[None]]) for v in (counts.double(), expected.flatten())]
    if float(lumped[1][-1]) * ROWS < 5:
        lumped = [v[:-1] for v in lumped]
    chi_square(*lumped)
    assert 1 < int(three_tokens().trace.steps.max()) <= 3, "some drafts pass and some do not"


@pytest.mark.parametrize("kind", ["block_causal", "context_causal"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_cache_changes_nothing(kind: str, temperature: float) -> None:
    exact = [name for name in available_caches() if kind in build_cache(name).exact_for]
    assert {"none", "prefix"} < {*exact}
    for policy in ("span", "hysteresis"):
        arguments = {"policy": policy, "penalty": 0.2, "threshold_on": 1.5, "threshold_off": 1.0}
        names = exact if policy == "span" and temperature else ["none", "prefix"]
        found = [decoded(kind, temperature=temperature, schedule_args=arguments, cache=cache) for cache in names]
        for other in found[1:]:
            assert_same_rows(other, found[0])
            assert torch.equal(other.nfe, found[0].nfe)
        checks = found[0].nfe - found[0].trace.steps
        some = (checks > 0) & (checks < found[0].trace.steps)
        assert bool(some.any()) if policy == "hysteresis" else torch.equal(checks, found[0].trace.steps)


def test_without_checks_it_is_sdars() -> None:
    settings = {"temperature": 0.7}
    never = decoded(schedule_args={"min_span": BLOCK + 1, "threshold": 0.5}, **settings)
    plain = decoded(schedule_args={"threshold": 0.5}, schedule="sdar_dynamic", **settings)
    assert_same_rows(never, plain)
    assert torch.equal(never.nfe, plain.nfe)
    worthless = decoded(schedule_args={"policy": "score", "score_threshold": BLOCK + 1.0, "threshold": 0.5}, **settings)
    assert_same_rows(worthless, plain)


def test_drafts_that_nearly_pass_may_be_kept() -> None:
    strict, lenient = (decoded(temperature=1.0, schedule_args={"ratio_threshold": r}) for r in (None, 0.2))
    assert int(lenient.trace.steps.sum()) < int(strict.trace.steps.sum())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cfg_scale": 1.0}, "not supported with cfg_scale=1.0"),
        ({"draft_steps": 2}, "draft_steps"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decoded(**settings)


def test_models_and_settings_that_are_refused() -> None:
    config = DecodingConfig(canvas_length=4, schedule="s2d2")
    with pytest.raises(ValueError, match="not supported with logit_shift=1"):
        RolloutEngine(denoiser(shift=1)).generate([[5]], config)
    with pytest.raises(ValueError, match="not supported with cache='prefix'; allowed: auto, and caches that are exact"):
        RolloutEngine(denoiser()).generate([[5]], replace(config, cache="prefix"))
    assert "from left to right" in str(why_not(config))
    for arguments, said in (
        ({"policy": "bandit"}, "policy='bandit' is not allowed"),
        ({"min_span": 0}, "min_span=0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"ratio_threshold": 1.5}, "ratio_threshold=1.5"),
        ({"threshold_on": -2.0}, "threshold_on=-2.0 is not allowed; it must be larger than threshold_off=-1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            DecodingConfig(schedule="s2d2", schedule_args=arguments)
