"""Levenshtein editing: slots of a block that come and go, against the same rule for one row in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.tracking.replay import OPEN, make_replay
from tests.models.block_denoisers import LENGTH as BLOCKS_LENGTH, PROMPTS as BLOCKS_PROMPTS, block_denoiser
from tests.rollout.schedules import hand_tables as hand
from tests.rollout.schedules.hand_tables import MASK, PROMPT, VOCAB, A, B, C, D, E, Wish, always
from tests.rollout.table_model import TableModel
from tests.tracking.rollouts import Words

DELETE, INSERT = 10, 11
IDS = {"delete_token_id": DELETE, "insert_token_id": INSERT}


def decode(wishes: Any, length: int, arguments: dict[str, Any] | None = None, **more: Any) -> Rollout:
    return hand.decode(wishes, length, "levenshtein", {**IDS, **(arguments or {})}, **more)


# --- by hand, from what SGLang's own tests of its decoder say ---------------------------------------------------------


def only_first(*wishes: Wish) -> Any:
    """These wishes in the first state; afterwards what stands there, or A."""
    return lambda canvas: (
        wishes if all(token == MASK for token in canvas) else [(A if t == MASK else t, 0.99) for t in canvas]
    )


def test_a_slot_is_put_in_and_another_taken_out():
    """Both edits at open slots: the one that asks for a slot before it stays open itself."""
    rollout = decode(only_first((INSERT, 0.9), (DELETE, 0.9), (C, 0.9), (D, 0.9)), 4)
    assert hand.states(rollout)[:2] == [[MASK] * 4, [MASK, MASK, C, D]]
    assert hand.states(rollout)[-1] == [A, A, C, D]
    assert hand.happened(rollout, EventKind.INSERT) == [(0, 0, MASK)]
    assert hand.happened(rollout, EventKind.DELETE) == [(0, 2, MASK)]
    assert DELETE not in rollout.canvas and INSERT not in rollout.canvas


def written_then(second: list[Wish]) -> Any:
    """First C to E and A are written, then the wishes come, then what stands stays and A fills."""
    first = [(C, 0.9), (D, 0.9), (E, 0.9), (A, 0.9)]

    def wishes(canvas: tuple[int, ...]) -> list[Wish]:
        if all(token == MASK for token in canvas):
            return first
        if canvas == (C, D, E, A):
            return second
        return [(B if token == MASK else token, 0.99) for token in canvas]

    return wishes


def test_written_tokens_keep_what_they_are_behind_a_slot_that_is_put_in():
    """The block keeps its length: what stands behind its end is cut off."""
    rollout = decode(written_then([(C, 0.9), (INSERT, 0.9), (E, 0.9), (A, 0.9)]), 4)
    assert hand.states(rollout) == [[MASK] * 4, [C, D, E, A], [C, MASK, D, E], [C, B, D, E], [C, B, D, E]]
    assert hand.happened(rollout, EventKind.INSERT) == [(1, 1, MASK)]
    assert hand.happened(rollout, EventKind.DELETE) == [(1, 4, -1)]
    assert rollout.trace.commit_step.tolist() == [[0, 2, 0, 0]]


def test_what_is_missing_at_the_end_is_open():
    rollout = decode(written_then([(DELETE, 0.9), (D, 0.9), (DELETE, 0.9), (A, 0.9)]), 4)
    assert hand.states(rollout)[1:4] == [[C, D, E, A], [D, A, MASK, MASK], [D, A, B, B]]
    assert hand.happened(rollout, EventKind.DELETE) == [(1, 2, E), (1, 0, C)]
    assert hand.happened(rollout, EventKind.INSERT) == [(1, 2, MASK), (1, 2, MASK)]


def test_a_written_token_is_replaced_at_any_probability_unless_said_otherwise():
    second: list[Wish] = [(B, 0.3), (D, 0.9), (E, 0.9), (A, 0.9)]
    assert decode(written_then(second), 4).canvas.tolist() == [[B, D, E, A]]
    kept = decode(written_then(second), 4, {"editing_threshold": 0.31})
    assert kept.canvas.tolist() == [[C, D, E, A]] and kept.nfe.tolist() == [2]  # the second step has nothing to do


def test_more_slots_are_written_while_some_were_put_in():
    """One of those that were open at first is always among them: as many as were put in, and one."""

    def wishes(canvas: tuple[int, ...]) -> list[Wish]:
        if all(token == MASK for token in canvas):
            return [(INSERT, 0.9), (A, 0.9), (B, 0.1), (C, 0.1)]
        return [(D, 0.4), (E, 0.3), (A, 0.99), (C, 0.2)]

    rollout = decode(wishes, 4, {"threshold": 0.5})
    assert hand.states(rollout)[1:4] == [[MASK, MASK, A, MASK], [D, E, A, MASK], [D, E, A, C]]


def test_the_last_step_leaves_no_edit_and_nothing_open():
    """A model that asks for nothing else: all slots are taken out twice, then edits are no candidates."""
    rollout = decode(always(*[(DELETE, 0.9)] * 3), 3, {"max_post_steps": 2})
    assert hand.states(rollout) == [[MASK] * 3] * 3 + [[0] * 3]  # the lowest of the ids that are left, all as likely


def test_a_state_that_comes_again_takes_another_way():
    """Two tokens that alternate at slot 0: in the state that is known, the best token not taken there is next."""

    def wishes(canvas: tuple[int, ...]) -> list[Wish]:
        return [(B, 0.6) if canvas[0] == A else (A, 0.6), (C, 0.9)]

    slots = [state[0] for state in hand.states(decode(wishes, 2, {"max_post_steps": 6}))]
    # A and B are written, and the state with A is known: with neither of them left, the lowest other id is taken.
    assert slots[:5] == [MASK, A, B, A, 0]


# --- against the rule for one row -------------------------------------------------------------------------------------


def table(seed: int) -> Any:
    """Random logits for every state, in which the two edits are likelier than other tokens."""

    def logits(tokens: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *tokens)) % 2**62)
        values = 1.5 * torch.randn(len(tokens), VOCAB, generator=generator, dtype=torch.float64)
        values[:, [DELETE, INSERT]] += 0.7
        return values

    return logits


def reference(
    logits: Any, length: int, size: int, threshold: float, editing: float, post_steps: int
) -> list[list[int]]:
    """The states of a row, the last one included."""
    canvas, states = [MASK] * length, []
    for start in range(0, length, size):
        stop = min(start + size, length)
        original, taken = [True] * (stop - start), [set() for _ in range(stop - start)]
        seen: list[tuple[int, ...]] = []
        made = post = 0
        while True:
            block = canvas[start:stop]
            made += 1
            filled = not any(t == MASK and first for t, first in zip(block, original, strict=True))
            post += filled
            last = made > 1 and ((filled and post >= post_steps) or made > size + post_steps)
            states.append(list(canvas))
            values = logits((*PROMPT, *canvas))[len(PROMPT) + start : len(PROMPT) + stop].clone()
            if last:
                values[:, [DELETE, INSERT]] = -torch.inf
            sure = values.softmax(-1)
            values[:, MASK] = -torch.inf
            token = values.argmax(-1).tolist()
            p = [sure[i, token[i]].item() for i in range(len(block))]
            slots = [i for i, t in enumerate(block) if t == MASK]
            needed = 1 + sum(not original[i] for i in slots)
            likely = [i for i in slots if p[i] > threshold]
            if filled or last:
                chosen = list(slots)
            elif len(likely) >= needed:
                chosen = likely
            else:
                chosen = sorted(slots, key=lambda i: (-p[i], i))[:needed]
            chosen += [i for i, t in enumerate(block) if t != MASK and token[i] != t and p[i] > editing]
            if not chosen:
                break
            if tuple(block) in seen and not last:
                doubtful = min(chosen, key=lambda i: (p[i], i))
                values[doubtful, list(taken[doubtful])] = -torch.inf
                token[doubtful] = int(values[doubtful].argmax())
            seen.append(tuple(block))
            after: list[tuple[int, bool, set[int]]] = []
            for i, held in enumerate(block):
                if i in chosen:
                    taken[i].add(token[i])
                if i not in chosen or token[i] not in (DELETE, INSERT):
                    after.append((token[i] if i in chosen else held, original[i], taken[i]))
                elif token[i] == INSERT:
                    after += [(MASK, False, set()), (held, original[i], taken[i])]
            after += [(MASK, False, set()) for _ in block]
            canvas[start:stop] = [entry[0] for entry in after[: len(block)]]
            original, taken = ([entry[k] for entry in after[: len(block)]] for k in (1, 2))
            if last:
                break
    return [*states, list(canvas)]


@pytest.mark.parametrize("size", [4, 6, 12])
def test_a_row_goes_the_way_of_the_rule(size: int):
    edits = again = 0
    for seed in range(6):
        arguments = {"threshold": 0.35, "editing_threshold": 0.1 * (seed % 3), "max_post_steps": 1 + seed % 5}
        model = TableModel(table(seed), VOCAB, mask_token_id=MASK, eos_token_ids=(1,))
        config = DecodingConfig(
            canvas_length=12, schedule="levenshtein", schedule_args={**IDS, **arguments}, block_length=size,
            stop_at_eos=False,
        )  # fmt: skip
        rollout = RolloutEngine(model).generate([PROMPT], config)
        expected = reference(
            table(seed), 12, size, arguments["threshold"], arguments["editing_threshold"], arguments["max_post_steps"]
        )
        assert hand.states(rollout) == expected
        edits += len(hand.happened(rollout, EventKind.DELETE)) + len(hand.happened(rollout, EventKind.INSERT))
        again += len(expected) - 1 > len({tuple(state) for state in expected[:-1]})
    assert edits > 30 and (again or size > 4)


def test_a_replay_ends_with_the_canvas():
    model = TableModel(table(3), VOCAB, mask_token_id=MASK, eos_token_ids=(1,))
    config = DecodingConfig(canvas_length=8, block_length=4, schedule="levenshtein", schedule_args=IDS, temperature=1.0)
    rollout = RolloutEngine(model).generate([PROMPT] * 3, config, seed=1)
    assert rollout.trace.events is not None and len(rollout.trace.events.of(EventKind.DELETE))
    for row in make_replay(rollout, Words()).rows:
        *_, last = row.states()
        canvas = rollout.canvas[row.row].tolist()
        assert all(slot.token in (token, OPEN) for slot, token in zip(last, canvas, strict=True))
        assert OPEN not in [slot.token for slot in last] or row.stop_reason == "eos"


@pytest.mark.parametrize("kind", ["block_causal", "context_causal"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_models_with_blocks_are_cached_exactly(kind: str, temperature: float):
    """LLaDA2's own setting: the block is fed again and again, what is before it is stored."""
    runs = []
    for cache in ("none", "prefix"):
        config = DecodingConfig(
            canvas_length=BLOCKS_LENGTH,
            schedule="levenshtein",
            schedule_args={"delete_token_id": 4, "insert_token_id": 6, "threshold": 0.3, "max_post_steps": 4},
            temperature=temperature,
            cache=cache,
        )
        engine = RolloutEngine(block_denoiser(kind, "position_zero"))
        runs.append(engine.generate(BLOCKS_PROMPTS, config, seed=2))
    whole, cached = runs
    assert whole.trace.events is not None and cached.trace.events is not None and cached.exact
    assert len(whole.trace.events.of(EventKind.INSERT)) and len(whole.trace.events.of(EventKind.DELETE))
    assert torch.equal(whole.canvas, cached.canvas)
    torch.testing.assert_close(whole.trace.events.raw_log_prob, cached.trace.events.raw_log_prob, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"insert_token_id": 4}, "delete_token_id=None is not allowed"),
        ({"delete_token_id": 4}, "insert_token_id=None is not allowed"),
        ({"delete_token_id": 4, "insert_token_id": 4}, "insert_token_id=4 is not allowed"),
        ({**IDS, "max_post_steps": 0}, "max_post_steps=0"),
        ({"delete_token_id": MASK, "insert_token_id": 4}, "delete_token_id=2 is not allowed.*mask token 2"),
        ({"delete_token_id": 4, "insert_token_id": 1}, "insert_token_id=1 is not allowed.*end of sequence"),
        ({"delete_token_id": 4, "insert_token_id": VOCAB}, f"insert_token_id={VOCAB} is not allowed.*below {VOCAB}"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        hand.decode(always((A, 0.9)), 1, "levenshtein", arguments)


@pytest.mark.parametrize("waits", [[t for t in range(VOCAB) if t % 2], [t for t in range(VOCAB) if t != A]])
def test_where_all_that_is_chosen_waits_other_slots_are_written(waits: list[int]):
    """Edits stay edits, and no step goes by with nothing done."""
    wishes = [(B, 0.9), (C, 0.8), (D, 0.4), (A, 0.3)]
    rollout = decode(always(*wishes), 4, {"editing_threshold": 1.0}, defer_token_ids=waits)
    states = hand.states(rollout)
    assert len(states) <= 6 and rollout.canvas.tolist() == [[B, C, D, A]]
    edits = [(DELETE, 0.9), (INSERT, 0.8)]

    def then(canvas: tuple[int, ...]) -> list[Wish]:
        return edits if all(token == MASK for token in canvas) else [(B, 0.9), (C, 0.8)]

    rollout = decode(then, 2, {"editing_threshold": 1.0, "max_post_steps": 2}, defer_token_ids=[DELETE, INSERT, B, C])
    assert DELETE not in rollout.canvas and INSERT not in rollout.canvas and len(hand.states(rollout)) <= 6
