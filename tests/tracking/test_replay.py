"""A replay says what the rollout recorded, slot by slot and step by step."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from rl4dlm.models.tiny import tiny_tokenizer
from rl4dlm.rollout.rollout import EventKind
from rl4dlm.tracking.replay import OPEN, Slot, make_replay, printable, token_texts
from tests.rollout.denoisers import MASK
from tests.tracking.rollouts import HOSTILE, SETTINGS, Words, by_hand, decoded


@pytest.mark.parametrize("name", SETTINGS)
def test_states_are_those_of_the_rollout(name: str) -> None:
    rollout, _ = decoded(name)
    replay = make_replay(rollout, Words())
    states = [list(row.states()) for row in replay.rows]
    for row, own in zip(replay.rows, states, strict=True):
        assert len(own) == row.steps + 1 and row.steps == rollout.trace.steps[row.row]
    for step, canvases in enumerate(rollout.states()):
        for own, canvas in zip(states, canvases.tolist(), strict=True):
            if step < len(own):
                tokens = canvas if name in ("refines",) else [token for token in canvas if token != -1]
                expected = [OPEN if token in (rollout.mask_token_id, -1) else token for token in tokens]
                assert [slot.token for slot in own[step]] == expected
    for own, canvas, reason in zip(states, rollout.canvas.tolist(), rollout.stop_reason, strict=True):
        last = [slot.token for slot in own[-1]]
        assert all(token in (OPEN, end) for token, end in zip(last, canvas, strict=False))
        assert reason == "eos" or OPEN not in last


def test_the_rollouts_above_hold_what_they_are_named_for() -> None:
    def kinds(name: str) -> Counter[EventKind]:
        return Counter(event.kind for row in make_replay(decoded(name)[0], Words()).rows for event in row.events)

    for name in ("greedy", "sampled", "given tokens", "ends early"):
        assert set(kinds(name)) == {EventKind.COMMIT}
    assert "eos" in decoded("ends early")[0].stop_reason
    assert kinds("takes back")[EventKind.REMASK] and kinds("verifies")[EventKind.REMASK]
    assert kinds("replaces")[EventKind.REPLACE] and kinds("refines")[EventKind.REPLACE]
    assert kinds("grows")[EventKind.INSERT]
    assert kinds("edits")[EventKind.INSERT] and kinds("edits")[EventKind.DELETE]


def test_probabilities_come_from_the_trace() -> None:
    rollout, _ = decoded("sampled")
    assert rollout.trace.log_prob is not None
    for row in make_replay(rollout, Words()).rows:
        steps = [event.step for event in row.events]
        assert steps == sorted(steps)
        for event in row.events:
            assert event.step == rollout.trace.commit_step[row.row, event.position]
            raw, drawn = (
                t[row.row, event.position].exp() for t in (rollout.trace.raw_log_prob, rollout.trace.log_prob)
            )
            assert event.probability == pytest.approx(raw.item(), rel=1e-3)
            assert event.drawn == pytest.approx(drawn.item(), rel=1e-3)
    greedy = make_replay(decoded("greedy")[0], Words()).rows[0].events
    assert all(event.drawn is None and event.confidence is None for event in greedy)


def test_every_kind_of_event_does_what_it_says() -> None:
    (row,) = make_replay(by_hand(), Words()).rows
    assert list(row.states()) == [
        [Slot(OPEN)] * 4,
        [Slot(OPEN), Slot(11, 0, 0.5, "written"), Slot(OPEN), Slot(OPEN)],  # slot 3 was written and taken back at once
        [Slot(13, 1, 0.5, "written"), Slot(14, 1, 0.75, "replaced"), Slot(OPEN), Slot(OPEN)],
        [
            Slot(OPEN, mark="remasked"), Slot(15, mark="inserted"), Slot(OPEN, mark="inserted"), Slot(14, 1, 0.75),
            Slot(OPEN), Slot(OPEN),
        ],
        [Slot(16, 3, 0.5, "written"), Slot(15), Slot(OPEN)],
    ]  # fmt: skip
    assert (row.row_id, row.steps, row.nfe, row.stop_reason) == (7, 4, 8, "eos")
    assert [event.confidence for event in row.events][:3] == [0.5, 0.25, None]


@pytest.mark.parametrize("name", ["greedy", "grows"])
def test_active_blocks_are_remembered(name: str) -> None:
    rollout, blocks = decoded(name)
    assert set(blocks.rows) == set(range(len(rollout)))
    for row in make_replay(rollout, Words(), blocks=blocks.rows).rows:
        states = list(row.states())
        assert row.block(0) == row.block(1)
        for step in range(1, row.steps + 1):
            start, stop = row.block(step)
            assert 0 <= start < stop <= len(states[step])
            for position, slot in enumerate(states[step]):
                assert slot.mark != "written" or position < stop
    if name == "greedy":
        first = make_replay(rollout, Words(), blocks=blocks.rows).rows[0]
        assert [first.block(step) for step in (1, 2, 3, 4, 5, 6)] == [(0, 4)] * 2 + [(4, 8)] * 2 + [(8, 12)] * 2
    assert make_replay(rollout, Words()).rows[0].block(1) is None


def test_rows_are_chosen() -> None:
    rollout, _ = decoded("greedy")
    replay = make_replay(rollout, Words(), rows=[3, 1], notes={1: {"reward": "0.5"}})
    assert [row.row for row in replay.rows] == [3, 1]
    assert [row.notes for row in replay.rows] == [{}, {"reward": "0.5"}]
    assert replay.rows[1].events == make_replay(rollout, Words()).rows[1].events
    assert make_replay(rollout, Words(), rows=[]).rows == []
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"rows has {wrong}, but the rollout has rows 0..4"):
            make_replay(rollout, Words(), rows=[wrong])


def test_a_row_that_was_given_whole_has_no_steps() -> None:
    rollout, _ = decoded("greedy")
    changed = torch.full_like(rollout.trace.commit_step, -1)
    trace = type(rollout.trace)(changed, rollout.trace.raw_log_prob, None, torch.zeros(len(rollout), dtype=torch.long))
    whole = type(rollout)(**{**vars(rollout), "trace": trace, "hinted": torch.ones_like(rollout.hinted)})
    row = make_replay(whole, Words()).rows[0]
    assert [[slot.token for slot in state] for state in row.states()] == [rollout.canvas[0].tolist()]
    assert row.events == []


def test_it_is_plain_values() -> None:
    rollout, blocks = decoded("takes back")
    replay = make_replay(rollout, Words(), blocks=blocks.rows)
    written = json.loads(json.dumps(replay.to_dict()))
    for row, own in zip(written["rows"], replay.rows, strict=True):
        assert set(map(len, row["events"].values())) == {len(own.events)}
        assert row["events"]["token"] == [event.token for event in own.events]
        used = {token for token in [*row["start"], *row["events"]["token"]] if token != OPEN}
        assert {str(token) for token in used} <= set(written["texts"])
    assert "drawn" in written["rows"][0]["events"]
    assert "drawn" not in make_replay(decoded("greedy")[0], Words()).to_dict()["rows"][0]["events"]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_what_the_tokenizer_says() -> None:
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer.encode("a b\n"), tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert [texts[token] for token in ids] == ["a", " ", "b", "\n", "<eos>"]
    assert token_texts(tokenizer, []) == {}


def test_spaces_of_sentencepiece_are_kept_and_nameless_ids_have_a_number() -> None:
    class Pieces(Words):
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
            return [{0: "\u2581the", 1: "\u2581", 2: None, 3: "<0x0A>"}[token] for token in ids]

        def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
            return [{0: "the", 1: "", 2: "", 3: "\n"}[token] for (token,) in rows]

    assert token_texts(Pieces(), [0, 1, 2, 3]) == {0: " the", 1: "\u2581", 2: "<2>", 3: "\n"}


def test_nothing_that_commands_a_terminal_is_left_in_texts() -> None:
    assert printable("a b\n\u00e9\u4e2d") == "a b\n\u00e9\u4e2d"
    assert printable("\x1b[2J\x9b\r\t\u202e\u2028\ud800") == r"\x1b[2J\x9b\r\t\u202e\u2028\ud800"
    rollout = by_hand()
    rollout.prompt_ids = [list(range(3, 3 + len(HOSTILE)))]
    replay = make_replay(rollout, Words())
    shown = [*replay.texts.values(), replay.rows[0].prompt, replay.rows[0].completion]
    assert all(character.isprintable() or character == "\n" for text in shown for character in text)
    assert MASK not in replay.texts
