"""WINO: a capped draft, and a verification that takes back fewer than were drafted at the step before."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from tests.rollout.denoisers import EOS, MASK, PROMPTS, denoiser

LENGTH, BLOCK = 12, 6
ARGUMENTS = {"threshold": 0.25, "verify_threshold": 0.35, "min_cap": 2, "max_cap": 4}


@functools.cache
def decoded(block: int = BLOCK, prompts: tuple[int, ...] = (0, 1, 2, 3, 4), **arguments: Any) -> Rollout:
    config = DecodingConfig(
        canvas_length=LENGTH,
        block_length=block,
        schedule="wino",
        stop_at_eos=False,
        schedule_args={**ARGUMENTS, **arguments},
    )
    return RolloutEngine(denoiser()).generate([PROMPTS[i] for i in prompts], config)


def happened(rollout: Rollout, kind: EventKind) -> dict[tuple[int, int], int]:
    """How many events of a kind there are, by row and step."""
    assert rollout.trace.events is not None
    events = rollout.trace.events.of(kind)
    count: dict[tuple[int, int], int] = {}
    for key in zip(events.row.tolist(), events.step.tolist(), strict=True):
        count[key] = count.get(key, 0) + 1
    return count


def logits_with_shadow(tokens: list[int], first: int, block: int) -> Tensor:
    """`[T + B, V]` of a row and a copy of mask tokens of the block that starts at `first`: rows do not see the copies,
    each copy sees the row but the token it stands for, and itself."""
    width = len(tokens)
    sees = torch.ones(width + block, width + block, dtype=torch.bool)
    sees[:, width:] = False
    for i in range(block):
        sees[width + i, width + i] = True
        sees[width + i, first + i] = False
    positions = torch.tensor([[*range(width), *range(first, first + block)]])
    with torch.no_grad():
        return denoiser()(
            input_ids=torch.tensor([tokens + [MASK] * block]), attention_mask=sees[None, None], position_ids=positions
        ).logits[0]


def by_the_book(prompt: list[int], block: int, threshold: float, verify_threshold: float, min_cap: int, max_cap: int):
    """One row, one slot after another, in plain Python: its canvases."""
    tokens, start = prompt + [MASK] * LENGTH, len(prompt)
    open_slots, canvases = set(range(LENGTH)), []
    for low in range(0, LENGTH, block):
        before = 0
        while inside := sorted(slot for slot in open_slots if slot < low + block):
            canvases.append(tokens[start:])
            probabilities = logits_with_shadow(tokens, start + low, block).softmax(-1)
            allowed = probabilities.clone()
            allowed[:, MASK] = 0
            best = {slot: int(allowed[start + slot].argmax()) for slot in inside}
            ranked = sorted(inside, key=lambda slot: -float(probabilities[start + slot, best[slot]]))
            sure = [slot for slot in ranked if probabilities[start + slot, best[slot]] > threshold]
            cap = min(max(int(len(inside) * 7 / 10), min_cap), max_cap)
            drafted = sure[:cap] or ranked[:1]
            held = [slot for slot in range(low, low + block) if slot not in open_slots]
            seen = {slot: float(probabilities[len(tokens) + slot - low, tokens[start + slot]]) for slot in held}
            doubtful = sorted((p, slot) for slot, p in seen.items() if p < verify_threshold)
            taken = [slot for _, slot in doubtful[: before - 1]] if len(drafted) > 1 and before else []
            for slot in drafted:
                tokens[start + slot] = best[slot]
            for slot in taken:
                tokens[start + slot] = MASK
            open_slots = open_slots - set(drafted) | set(taken)
            before = len(drafted)
    return [*canvases, tokens[start:]]


@pytest.mark.parametrize("block", [BLOCK, LENGTH])
def test_it_does_what_a_plain_loop_does(block: int):
    rollout = decoded(block)
    assert len(happened(rollout, EventKind.REMASK)) >= 3
    states = list(rollout.states())
    for row, prompt in enumerate(PROMPTS):
        expected = by_the_book(prompt, block, **ARGUMENTS)
        steps = int(rollout.trace.steps[row])
        assert [state[row].tolist() for state in states[:steps]] + [rollout.canvas[row].tolist()] == expected
        assert int(rollout.nfe[row]) == steps == len(expected) - 1


def test_fewer_are_taken_back_than_were_drafted_at_the_step_before():
    rollout = decoded(LENGTH, threshold=0.1, verify_threshold=1.0)
    drafted, taken = happened(rollout, EventKind.COMMIT), happened(rollout, EventKind.REMASK)
    assert taken
    for (row, step), number in taken.items():
        assert number < drafted[row, step - 1]
        assert drafted[row, step] > 1


def test_a_row_may_lose_slots_in_a_step_and_still_ends():
    rollout = decoded(LENGTH, threshold=0.15, verify_threshold=1.0, max_cap=6)
    masks = torch.stack([(state == MASK).sum(-1) for state in rollout.states()])  # [S, N]
    assert bool((masks.diff(dim=0) > 0).any())
    assert set(rollout.stop_reason) == {"complete"}


def test_without_verification_it_is_a_capped_threshold():
    rollout = decoded(verify_threshold=0.0)
    assert not happened(rollout, EventKind.REMASK)
    drafted = happened(rollout, EventKind.COMMIT)
    assert max(drafted.values()) == ARGUMENTS["max_cap"]
    # Without the cap, too, it is the threshold schedule.
    loose = decoded(verify_threshold=0.0, min_cap=BLOCK, max_cap=BLOCK)
    config = DecodingConfig(
        canvas_length=LENGTH,
        block_length=BLOCK,
        schedule="threshold",
        stop_at_eos=False,
        schedule_args={"threshold": 0.25},
    )
    plain = RolloutEngine(denoiser()).generate(PROMPTS, config)
    assert torch.equal(loose.canvas, plain.canvas)
    assert torch.equal(loose.trace.commit_step, plain.trace.commit_step)


def test_the_shadow_changes_nothing_that_is_drafted():
    """Rows do not see the copies: the first draft is that of a model without them."""
    rollout = decoded(threshold=0.0, min_cap=BLOCK, max_cap=BLOCK, prompts=(0,))
    config = DecodingConfig(canvas_length=LENGTH, block_length=BLOCK, steps=2, stop_at_eos=False)
    plain = RolloutEngine(denoiser()).generate([PROMPTS[0]], config)
    assert torch.equal(rollout.canvas, plain.canvas)
    torch.testing.assert_close(rollout.trace.raw_log_prob, plain.trace.raw_log_prob, rtol=0, atol=1e-10)


def test_given_tokens_are_not_verified():
    hints = [{1: 7, 3: 9, 8: EOS}] * len(PROMPTS)
    config = DecodingConfig(
        canvas_length=LENGTH, schedule="wino", stop_at_eos=False, schedule_args={**ARGUMENTS, "verify_threshold": 1.0}
    )
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config, hints=hints)
    assert rollout.trace.events is not None
    taken = rollout.trace.events.of(EventKind.REMASK)
    assert len(taken) and not set(taken.position.tolist()) & {1, 3, 8}
    assert rollout.canvas[:, [1, 3, 8]].tolist() == [[7, 9, EOS]] * len(PROMPTS)


def test_the_cap_is_a_share_of_the_masked_slots():
    """0.7 of 12, of 4 and so on, rounded down, but two at least."""
    rollout = decoded(LENGTH, threshold=0.0, verify_threshold=0.0, min_cap=2, max_cap=20)
    sizes = [happened(rollout, EventKind.COMMIT)[0, step] for step in range(int(rollout.trace.steps[0]))]
    assert sizes == [8, 2, 2]
    assert list(itertools.accumulate(sizes)) == [8, 10, 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -1}, "threshold=-1 .* 0 or larger"),
        ({"fraction": 1.2}, "fraction=1.2 .* 0 to 1"),
        ({"min_cap": 0}, "min_cap=0 .* 1 or larger"),
        ({"min_cap": 9, "max_cap": 4}, "min_cap=9 .* max_cap=4"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(schedule="wino", schedule_args=arguments)


def test_caches_and_models_with_blocks_are_refused():
    with pytest.raises(ValueError, match="needs a forward of the whole row"):
        DecodingConfig(schedule="wino", cache="prefix")
    spec = DiffusionSpec(mask_token_id=2, eos_token_ids=(1,), attention="block_causal", block_length=4)
    with pytest.raises(ValueError, match="looks beyond the active block"):
        DecodingConfig(schedule="wino", canvas_length=16).for_model(spec)
