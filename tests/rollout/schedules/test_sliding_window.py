"""WeDLM's window, and decoding models that see what is written before what is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.rollout.audit import audit
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.rows import Progress
from tests.models.block_denoisers import MASK as BLANK, PROMPTS, block_denoiser
from tests.rollout.denoisers import assert_same_rows
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.examples import watched
from tests.rollout.schedules.hand_tables import EOS, MASK, A, B, C, D, E, always

LENGTH = 14
WINDOW = {"schedule": "sliding_window", "schedule_args": {"window": 5, "entropy_threshold": 1.6}}
BLOCKS = {"canvas_length": 16, "block_length": 4, "schedule": "threshold", "schedule_args": {"threshold": 0.4}}
HINTS = [{0: 9}, {}, {4: 5, 5: 6, 6: 7, 7: 8}, {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4}, {9: 3}]


def model(shift: int = 0) -> Any:
    return block_denoiser("written_first", "response", shift=shift)


def decoded(shift: int = 0, *, rows: slice = slice(None), **settings: Any) -> Rollout:
    more = {name: settings.pop(name, None) for name in ("hints", "on_step")}
    config = DecodingConfig(**{"canvas_length": LENGTH, "stop_at_eos": False, **settings})
    ids = list(range(len(PROMPTS)))[rows]
    return RolloutEngine(model(shift)).generate(PROMPTS[rows], config, seed=4, row_ids=ids, **more)


# --- the window -------------------------------------------------------------------------------------------------------


def test_the_window_moves_with_the_first_masked_slot():
    wishes = always((A, 0.5), (B, 0.9), (C, 0.6), (D, 0.99), (E, 0.98))
    arguments = {"window": 3, "entropy_threshold": 0.0, "distance_penalty": 0.0}
    rollout = hand.decode(wishes, 5, "sliding_window", arguments)
    assert hand.states(rollout) == [
        [MASK] * 5,
        [MASK, B, MASK, MASK, MASK],  # the fourth and the fifth, which are surer, are not in it
        [MASK, B, C, MASK, MASK],
        [A, B, C, MASK, MASK],
        [A, B, C, D, MASK],
        [A, B, C, D, E],
    ]


def test_what_has_little_entropy_goes_together_and_distance_counts():
    wishes = always((A, 0.97), (B, 0.97), (C, 0.97), (D, 0.97))
    near = {"window": 4, "entropy_threshold": 0.4, "distance_penalty": 0.15}  # the entropy is 0.2
    assert hand.decode(wishes, 4, "sliding_window", near).trace.commit_step.tolist() == [[0, 0, 1, 1]]
    flat = {**near, "distance_penalty": 0.0}
    assert hand.decode(wishes, 4, "sliding_window", flat).trace.commit_step.tolist() == [[0, 0, 0, 0]]


def test_a_row_stops_once_all_before_an_end_is_written():
    wishes = always((A, 0.6), (EOS, 0.9), (C, 0.7), (D, 0.5))
    arguments = {"window": 3, "entropy_threshold": 0.0, "distance_penalty": 0.0}
    rollout = hand.decode(wishes, 4, "sliding_window", arguments, stop_at_eos=True)
    assert rollout.completion_ids == [[A, EOS]] and rollout.stop_reason == ["eos"]
    assert hand.states(rollout)[-1] == [A, EOS, C, EOS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule_args": {"window": 0}}, "window=0"),
        ({"schedule_args": {"entropy_threshold": -1}}, "entropy_threshold=-1"),
        ({"schedule_args": {"distance_penalty": -1}}, "distance_penalty=-1"),
        ({"canvas_length": 8, "block_length": 4}, "block_length=4 has no meaning.*window"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="sliding_window", **settings)


# --- what is written is seen first ------------------------------------------------------------------------------------


def reordered(shift: int, prompt: list[int], canvas: list[int]) -> torch.Tensor:
    """Logits `[L, V]` of a canvas whose tokens are fed in another order under a causal mask, with their positions."""
    tokens = torch.tensor([*prompt, *canvas])
    order = torch.cat([(tokens != BLANK).nonzero().flatten(), (tokens == BLANK).nonzero().flatten()])
    sees = torch.ones(len(tokens), len(tokens)).tril().bool()
    with torch.no_grad():
        logits = model(shift)(
            input_ids=tokens[order][None], attention_mask=sees[None, None], position_ids=order[None], use_cache=False
        ).logits[0]
    logits = torch.empty_like(logits).index_copy(0, order, logits)
    return logits[len(prompt) - shift : len(tokens) - shift]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("settings", [WINDOW, BLOCKS], ids=["window", "blocks"])
def test_log_probabilities_are_those_of_reordered_rows(settings: dict[str, Any], shift: int):
    rollout = decoded(shift, temperature=1.0, hints=HINTS, **settings)
    for step, states in enumerate(rollout.states()):
        for row, prompt in enumerate(PROMPTS):
            slots = (rollout.trace.commit_step[row] == step).nonzero().flatten().tolist()
            if slots:
                expected = reordered(shift, prompt, states[row].tolist()).log_softmax(-1)
            for slot in slots:
                found = float(rollout.trace.raw_log_prob[row, slot])
                assert found == pytest.approx(float(expected[slot, rollout.canvas[row, slot]]), abs=1e-10)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("more", [{}, {"temperature": 1.0}, {"stop_at_eos": True}], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("settings", [WINDOW, BLOCKS], ids=["window", "blocks"])
def test_caches_are_exact(settings: dict[str, Any], shift: int, more: dict[str, Any], cache: str):
    for hints in (None, HINTS):
        plain, cached = (decoded(shift, cache=name, hints=hints, **settings, **more) for name in ("none", cache))
        assert_same_rows(cached, plain)
        assert cached.exact and plain.exact
    assert decoded(shift, **settings).cache == "prefix"  # what `auto` chooses


@pytest.mark.parametrize("settings", [WINDOW, BLOCKS], ids=["window", "blocks"])
def test_a_row_is_the_same_in_every_batch_and_the_audit_finds_nothing(settings: dict[str, Any]):
    settings = {**settings, "temperature": 1.0, "hints": HINTS}
    together = decoded(**settings)
    for row in range(len(PROMPTS)):
        hints = HINTS[row : row + 1]
        assert_same_rows(decoded(rows=slice(row, row + 1), **{**settings, "hints": hints}), together, [row])
    found = audit(model(), together, rows_per_forward=7)
    assert float((found.exact - found.recorded).abs().max()) <= 1e-10


def test_scores_are_those_of_decoding():
    """One forward of a recorded state gives the log-probabilities that were drawn with, without a clean copy."""
    rollout, shift = decoded(temperature=1.0, **WINDOW), 0
    prompt, state = PROMPTS[0], next(rollout.states())[0]
    tokens = torch.tensor([[*prompt, *state.tolist()]])
    scored = torch.zeros_like(tokens).bool()
    first = (rollout.trace.commit_step[0] == 0).nonzero().flatten() + len(prompt)
    scored[0, first] = True
    targets = torch.tensor([[*prompt, *rollout.canvas[0].tolist()]])
    with torch.no_grad():
        found, *_ = model(shift)(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), score_positions=scored, score_targets=targets
        )
    assert found.tolist() == pytest.approx(rollout.trace.raw_log_prob[0, first - len(prompt)].tolist(), abs=1e-10)


def test_what_is_fed_is_the_window_and_what_was_written_before_it():
    seen: list[Progress] = []
    prompt, denoiser = PROMPTS[1], model(0)
    with watched(denoiser) as fed:
        rollout = decoded(rows=slice(1, 2), on_step=seen.append, cache="prefix", **WINDOW)
    firsts = [state[0].tolist().index(BLANK) for state in rollout.states()]
    window = WINDOW["schedule_args"]["window"]
    ends = [min(first + window, LENGTH) for first in firsts]
    starts = [-len(prompt), *firsts[:-1]]
    assert [call["input_ids"].shape[1] for call in fed] == [e - s for s, e in zip(starts, ends, strict=True)]
    assert [(int(p.start), int(p.reach)) for p in seen] == list(zip(firsts, ends, strict=True))


@pytest.mark.parametrize("settings", [{"schedule": "wino"}, {"cfg_scale": 0.5}], ids=str)
def test_what_needs_another_attention_is_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*attention='written_first'"):
        RolloutEngine(model()).generate(PROMPTS, DecodingConfig(canvas_length=8, **settings))


def test_scores_with_guidance_are_refused():
    tokens = torch.full((2, 4), BLANK)
    with pytest.raises(ValueError, match="score_cfg_scale=1.*written_first"):
        model()(input_ids=tokens, score_positions=torch.ones(1, 4).bool(), score_targets=tokens, score_cfg_scale=1.0)
