"""What a rollout records is what happened: recomputed state by state from the model's own forward."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout, StopReason
from rl4dlm.rollout.schedules.parts import even_counts
from tests.rollout.denoisers import EOS, MASK, PROMPTS, denoiser, row_logits, sampling_distribution

SETTINGS = {
    "greedy": {"steps": 6},
    "uneven": {"steps": 9},
    "one block": {"steps": 5, "block_length": None},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.45}},
    "random order": {"schedule": "random", "steps": 6, "temperature": 0.6},
    "sampled": {"steps": 6, "temperature": 1.0},
    "top-p": {"steps": 12, "temperature": 0.7, "top_p": 0.7},
    "top-k": {"steps": 6, "temperature": 1.5, "top_k": 3},
    "both": {"steps": 6, "temperature": 2.0, "top_p": 0.6, "top_k": 7},
    "guided": {"steps": 6, "temperature": 1.0, "cfg_scale": 1.5},
    "guided, greedy": {"steps": 6, "cfg_scale": 0.5},
    "all in one step": {"steps": 1, "block_length": None, "temperature": 1.0},
}


def decoded(name: str, *, shift: int = 0, **kwargs: Any) -> tuple[DecodingConfig, Rollout]:
    decoding = DecodingConfig(**{"canvas_length": 12, "block_length": 4, "stop_at_eos": False, **SETTINGS[name]})
    return decoding, RolloutEngine(denoiser(shift=shift)).generate(PROMPTS, decoding, seed=8, **kwargs)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_log_probabilities_are_the_models_on_the_recorded_states(name: str, shift: int):
    decoding, rollout = decoded(name, shift=shift)
    model, checked = denoiser(shift=shift), 0
    for step, states in enumerate(rollout.states()):
        for row, prompt in enumerate(rollout.prompt_ids):
            committed = (rollout.trace.commit_step[row] == step).nonzero().squeeze(-1)
            if not len(committed):
                continue
            logits = row_logits(model, prompt, states[row], decoding.cfg_scale)
            own = row_logits(model, prompt, states[row])
            for offset in committed.tolist():
                token = int(rollout.canvas[row, offset])
                raw = own[offset].log_softmax(-1)[token].item()  # M5: the model's own, without guidance
                assert rollout.trace.raw_log_prob[row, offset].item() == pytest.approx(raw, abs=1e-10)
                guided = logits[offset].softmax(-1)
                assert rollout.trace.confidence[row, offset].item() == pytest.approx(guided[token].item(), abs=1e-10)
                entropy = -(guided * guided.log()).sum().item()
                assert rollout.trace.entropy[row, offset].item() == pytest.approx(entropy, abs=1e-10)
                if decoding.temperature:
                    drawn = sampling_distribution(
                        logits[offset], MASK, decoding.temperature, decoding.top_p, decoding.top_k
                    )
                    assert drawn[token] > 0
                    found = rollout.trace.log_prob[row, offset].item()
                    assert found == pytest.approx(drawn[token].log().item(), abs=1e-10)
                else:
                    allowed = logits[offset].clone()
                    allowed[MASK] = -torch.inf
                    assert token == int(allowed.argmax())
                checked += 1
    assert checked == 12 * len(rollout)
    assert (rollout.trace.log_prob is None) == (decoding.temperature == 0)


@pytest.mark.parametrize("name", ["greedy", "uneven", "one block", "threshold", "guided, greedy"])
def test_what_is_committed_is_what_the_schedule_says(name: str):
    decoding, rollout = decoded(name)
    width = decoding.canvas_length // decoding.num_blocks
    for row, prompt in enumerate(rollout.prompt_ids):
        entered = {}
        for step, states in enumerate(rollout.states()):
            masked = states[row] == MASK
            if not bool(masked.any()):
                break
            logits = row_logits(denoiser(), prompt, states[row], decoding.cfg_scale)
            low = int(masked.nonzero()[0]) // width * width
            entered.setdefault(low, step)
            eligible = [i for i in range(low, low + width) if masked[i]]
            probabilities = logits.softmax(-1)
            probabilities[:, MASK] = 0  # no candidate, but it keeps its share of the softmax
            confidence = probabilities.amax(-1)
            ranked = sorted(eligible, key=lambda i: -confidence[i].item())
            if decoding.schedule == "threshold":
                expected = [i for i in eligible if confidence[i] >= 0.45] or ranked[:1]
            else:
                in_block = torch.tensor(step - entered[low])
                count = int(even_counts(torch.tensor(width), decoding.steps_per_block, in_block))
                expected = ranked[:count]
            found = (rollout.trace.commit_step[row] == step).nonzero().squeeze(-1).tolist()
            assert found == sorted(expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trace_is_a_history(name: str):
    hints = [{}, {2: 7}, {4: 8, 5: 9, 6: 10, 7: 11}, {}, {0: EOS}]
    decoding, rollout = decoded(name, hints=hints)
    steps, given = rollout.trace.commit_step, rollout.hinted
    assert torch.equal(steps >= 0, ~given)  # every slot is written once, or was given
    states = list(rollout.states())
    assert len(states) == int(rollout.trace.steps.max())
    assert torch.equal(states[0], torch.where(given, rollout.canvas, MASK))
    for step, (before, after) in enumerate(zip(states, [*states[1:], rollout.canvas], strict=True)):
        changed = before != after
        assert torch.equal(changed, (steps == step) & (before == MASK))
        assert bool((before[changed] == MASK).all())
        running = rollout.trace.steps > step
        assert torch.equal(changed.any(-1), running)  # a step that writes nothing is not made
    assert torch.equal(rollout.nfe, rollout.trace.steps * (2 if decoding.cfg_scale else 1))
    width = decoding.canvas_length // decoding.num_blocks
    for row in steps:  # blocks are written one after another
        blocks = [[s for s in block.tolist() if s >= 0] for block in row.split(width)]
        written = [block for block in blocks if block]
        assert all(max(a) < min(b) for a, b in itertools.pairwise(written))
        if decoding.schedule != "threshold":
            for block in written:
                made = max(block) - min(block) + 1
                counts = [block.count(min(block) + s) for s in range(made)]
                masked, total = torch.tensor(len(block)), decoding.steps_per_block
                assert counts == [int(even_counts(masked, total, torch.tensor(s))) for s in range(made)]
                assert made == min(len(block), total)


def test_the_valid_part_ends_with_the_first_end_of_sequence():
    _, rollout = decoded("sampled", num_generations=4)
    assert any(EOS in row for row in rollout.canvas.tolist())
    for canvas, valid, completion in zip(
        rollout.canvas.tolist(), rollout.valid.tolist(), rollout.completion_ids, strict=True
    ):
        length = canvas.index(EOS) + 1 if EOS in canvas else len(canvas)
        assert valid == [True] * length + [False] * (len(canvas) - length)
        assert completion == canvas[:length]


def test_a_rollout_says_how_it_came_about():
    engine = RolloutEngine(denoiser())
    engine.weight_version = 17
    decoding = DecodingConfig(canvas_length=4, schedule="random", cache="prefix")
    rollout = engine.generate(PROMPTS, decoding, seed=23)
    said = (rollout.schedule, rollout.cache, rollout.exact, rollout.seed, rollout.weight_version, rollout.mask_token_id)
    assert said == ("random", "prefix", False, 23, 17, MASK)
    assert engine.generate(PROMPTS, DecodingConfig(canvas_length=4)).exact


@pytest.mark.parametrize("name", SETTINGS)
def test_m5_the_record_has_the_block_of_each_token_and_the_settings(name: str):
    decoding, rollout = decoded(name)
    size = decoding.block_length or decoding.canvas_length
    assert rollout.decoding == decoding
    slots = torch.arange(rollout.canvas.shape[1])
    expected = ((slots // size + 1) * size).clamp(max=decoding.canvas_length).expand_as(rollout.canvas)
    written = rollout.trace.commit_step >= 0
    assert torch.equal(rollout.trace.block_stop[written], expected[written])
    assert bool((rollout.trace.block_stop[~written] == -1).all())


def test_reasons_of_stopping_are_an_enumeration_of_plain_strings():
    _, rollout = decoded("greedy")
    assert all(isinstance(reason, StopReason) for reason in rollout.stop_reason)
    assert rollout.stop_reason == ["complete"] * len(rollout)
    assert json.loads(json.dumps(rollout.stop_reason)) == ["complete"] * len(rollout)
