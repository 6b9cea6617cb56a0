"""Constraints: automata against enumeration, and what the engine does with what is not admissible."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from rl4dlm.rollout.constraints.automata import (
    CANDIDATES,
    Automaton,
    Canvas,
    any_of,
    candidates,
    literal,
    one_of,
    repeat,
    sequence,
    sized,
)
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import Scored
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser
from tests.rollout.table_model import TableModel, constant_table, random_table

# --- automata ---------------------------------------------------------------------------------------------------------

TOKENS = (0, 1, 2)
states, tokens = st.integers(0, 3), st.sampled_from(TOKENS)
tables = st.dictionaries(states, st.dictionaries(tokens, states), max_size=4)
canvases = st.lists(st.one_of(st.none(), tokens), min_size=1, max_size=4)


def accepts(table: dict[int, dict[int, int]], start: int, accept: set[int], string: tuple[int, ...]) -> bool:
    """The definition, one token after another."""
    state: int | None = start
    for token in string:
        state = table.get(state, {}).get(token) if state is not None else None
    return state in accept


def completions(canvas: Canvas) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(TOKENS if token is None else (token,) for token in canvas))


@given(table=tables, start=states, accept=st.sets(states, min_size=1), canvas=canvases)
def test_a_canvas_is_completable_if_a_completion_is_accepted(
    table: dict[int, dict[int, int]], start: int, accept: set[int], canvas: list[int | None]
):
    automaton = Automaton.of(table, start, accept)
    allowed = [string for string in completions(canvas) if accepts(table, start, accept, string)]
    assert automaton.completable(canvas) == bool(allowed)
    for offset in (i for i, held in enumerate(canvas) if held is None):
        for token in TOKENS:
            assert automaton.admissible(canvas, offset, token) == any(string[offset] == token for string in allowed)


@given(table=tables, start=states, accept=st.sets(states, min_size=1), length=st.integers(0, 4))
def test_choices_are_the_tokens_that_occur(table: dict[int, dict[int, int]], start: int, accept: set[int], length: int):
    automaton = Automaton.of(table, start, accept)
    allowed = [s for s in itertools.product(TOKENS, repeat=length) if accepts(table, start, accept, s)]
    if not allowed:
        for impossible in (automaton.choices, lambda n: sized(automaton, n)):
            with pytest.raises(ValueError, match=f"no string of {length} tokens"):
                impossible(length)
        return
    assert automaton.choices(length) == {i: frozenset(s[i] for s in allowed) for i in range(length)}
    exactly = sized(automaton, length)
    for other in range(5):
        for string in itertools.product(TOKENS, repeat=other):
            assert exactly.completable(string) == (string in allowed)


def letters(text: str) -> list[int]:
    return ["abc".index(letter) for letter in text]


LANGUAGES = {
    "": literal([]),
    "ab": literal(letters("ab")),
    "[ac]": one_of(letters("ac")),
    "[abc]b": sequence(one_of(None), one_of(letters("b"))),
    "a|bc|": any_of(literal(letters("a")), literal(letters("bc")), literal([])),
    "(ab)*": repeat(literal(letters("ab"))),
    "a*b*": sequence(repeat(one_of(letters("a"))), repeat(one_of(letters("b")))),
    "(a*b)*": repeat(sequence(repeat(one_of(letters("a"))), one_of(letters("b")))),
    "([ac]*b)*": repeat(Automaton.of({0: {0: 0, 2: 0, 1: 1}}, 0, {1})),  # whose start is come back to
    "(a|ab)(c|bc)": sequence(
        any_of(literal(letters("a")), literal(letters("ab"))), any_of(literal(letters("c")), literal(letters("bc")))
    ),
    "(a|)(b|)c": sequence(
        any_of(literal(letters("a")), literal([])), any_of(literal(letters("b")), literal([])), literal(letters("c"))
    ),
    "[ab]{2,3}": repeat(one_of(letters("ab")), 2, 3),
    "(a|bb){1,}": repeat(any_of(literal(letters("a")), literal(letters("bb"))), 1),
    "((a|)*b)?": repeat(sequence(repeat(any_of(literal(letters("a")), literal([]))), literal(letters("b"))), 0, 1),
}


@pytest.mark.parametrize("pattern", LANGUAGES)
def test_languages_are_those_of_regular_expressions(pattern: str):
    for length in range(6):
        for string in itertools.product("abc", repeat=length):
            expected = re.fullmatch(pattern, "".join(string)) is not None
            assert LANGUAGES[pattern].completable(letters("".join(string))) == expected, string


def test_a_slot_that_takes_any_token_has_no_choices():
    assert sequence(one_of({1}), one_of(None)).choices(2) == {0: frozenset({1})}


def test_what_cannot_be_an_automaton_is_refused():
    with pytest.raises(ValueError, match="accept is empty"):
        Automaton.of({}, 0, ())
    with pytest.raises(ValueError, match="tokens is empty"):
        one_of(())
    with pytest.raises(ValueError, match="any_of needs"):
        any_of()
    with pytest.raises(ValueError, match="at_least=2, at_most=1"):
        repeat(one_of(None), 2, 1)


# --- in the engine ----------------------------------------------------------------------------------------------------

MASK, EOS, VOCAB, LENGTH = 4, 3, 5, 5
ALTERNATING = sequence(repeat(literal([0, 1])), any_of(literal([]), literal([0])))
ENDED = sequence(any_of(*(literal(s) for s in ([0, 0, 1], [2, 1, 0], [1, 2, 2]))), repeat(one_of({EOS})))


def engine(table: Any, **more: Any) -> RolloutEngine:
    return RolloutEngine(TableModel(table, VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,)), **more)


def config(**settings: Any) -> DecodingConfig:
    return DecodingConfig(**{"canvas_length": LENGTH, "steps": LENGTH, **settings})


def holes(rollout: Rollout) -> Iterator[list[int | None]]:
    """Every state of every row, None where it is masked."""
    for canvas in [*rollout.states(), rollout.canvas]:
        for state in canvas.tolist():
            yield [None if token == rollout.mask_token_id else token for token in state]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("language", [ALTERNATING, ENDED], ids=["alternating", "ended"])
@pytest.mark.parametrize(
    "more",
    [{}, {"steps": 2}, {"steps": 1, "temperature": 1.0}, {"schedule": "random", "temperature": 0.7}],
    ids=["one token a step", "several", "all at once", "random order"],
)
def test_every_state_can_be_completed(more: dict[str, Any], language: Automaton, seed: int):
    allowed = {s for s in itertools.product(range(VOCAB - 1), repeat=LENGTH) if language.completable(s)}
    rollout = engine(random_table(seed, VOCAB, 3.0)).generate([[0], [1, 2], [2]], config(**more), constraint=language)
    assert set(rollout.stop_reason) <= {"complete", "eos"}
    for state in holes(rollout):
        assert any(all(h is None or h == t for h, t in zip(state, s, strict=True)) for s in allowed), state
    assert {tuple(row) for row in rollout.canvas.tolist()} <= allowed


@dataclass(frozen=True)
class Everything:
    def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
        assert canvas[offset] is None and token != MASK
        return True


@dataclass(frozen=True)
class Nothing:
    def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
        return False


@dataclass(frozen=True)
class Only:
    """One token at one slot, anything elsewhere."""

    offset: int
    token: int

    def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
        return offset != self.offset or token == self.token


@pytest.mark.parametrize("more", [{"steps": 6}, {"steps": 3, "temperature": 1.0, "block_length": 4}])
def test_a_constraint_that_allows_everything_changes_nothing(more: dict[str, Any]):
    settings = DecodingConfig(**{"canvas_length": 12, **more})
    free = RolloutEngine(denoiser()).generate(PROMPTS, settings)
    assert_same_rows(RolloutEngine(denoiser()).generate(PROMPTS, settings, constraint=Everything()), free)


def test_a_row_without_admissible_tokens_is_a_dead_end():
    rollout = engine(random_table(0, VOCAB)).generate([[0], [1]], config(), constraint=Nothing())
    assert rollout.stop_reason == ["constraint_dead_end"] * 2
    assert rollout.nfe.tolist() == [1, 1] and rollout.canvas.tolist() == [[EOS] * LENGTH] * 2


def test_a_dead_end_stops_its_row_alone():
    class FirstIsZero:
        def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
            return canvas[0] == 0 and token != EOS

    model = engine(random_table(0, VOCAB))
    hints = [{0: 0}, {0: 1}]
    rollout = model.generate([[0], [1]], config(), hints=hints, constraint=FirstIsZero())
    assert rollout.stop_reason == ["complete", "constraint_dead_end"]
    assert_same_rows(model.generate([[0]], config(), hints=hints[:1], constraint=FirstIsZero()), rollout, rows=[0])


def peaked(tokens: tuple[int, ...]) -> Tensor:
    """Slot j: token 0 first, then 1, then 2, the more certain the earlier; the end last."""
    logits = torch.tensor([3.0, 2.0, 1.0, -5.0, 0.0], dtype=torch.float64)
    return torch.stack([logits * (2 - i / len(tokens)) for i in range(len(tokens))])


def test_the_most_probable_admissible_token_is_written_with_its_own_numbers():
    free = engine(peaked).generate([[0]], config(steps=1))
    rollout = engine(peaked).generate([[0]], config(steps=1), constraint=Only(2, 1))
    assert free.canvas.tolist() == [[0] * LENGTH] and rollout.canvas.tolist() == [[0, 0, 1, 0, 0]]
    expected = peaked(tuple([0] + [MASK] * LENGTH))[1:].log_softmax(-1)
    torch.testing.assert_close(rollout.trace.raw_log_prob[0, 2], expected[2, 1], rtol=0, atol=1e-12)
    assert torch.equal(rollout.trace.raw_log_prob[0, :2], free.trace.raw_log_prob[0, :2])


def test_the_recorded_log_probability_is_tempered_and_never_minus_infinity():
    # The filter keeps token 0 only, so that what takes its place lies outside.
    settings = config(steps=1, temperature=2.0, top_k=1)
    rollout = engine(peaked).generate([[0]], settings, constraint=Only(2, 1))
    logits = peaked(tuple([0] + [MASK] * LENGTH))[3] / 2
    logits[MASK] = -torch.inf
    torch.testing.assert_close(rollout.trace.log_prob[0, 2], logits.log_softmax(-1)[1], rtol=0, atol=1e-12)
    assert rollout.trace.log_prob[0, :2].tolist() == [0.0, 0.0]


def test_tokens_of_one_step_are_checked_beside_each_other():
    # All slots want token 0; the canvas must alternate, starting with whatever the most certain slot takes.
    class Alternating:
        def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
            beside = [canvas[i] for i in (offset - 1, offset + 1) if 0 <= i < len(canvas)]
            return token not in beside

    rollout = engine(peaked).generate([[0]], config(steps=1), constraint=Alternating())
    assert rollout.canvas.tolist() == [[0, 1, 0, 1, 0]] and rollout.nfe.tolist() == [1]


def test_a_row_moves_on_to_the_next_slot_where_one_has_nothing():
    # The most certain slot waits until the last one is written.
    class FirstWaits:
        def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
            return offset != 0 or canvas[-1] is not None

    rollout = engine(peaked).generate([[0]], config(), constraint=FirstWaits())
    assert rollout.trace.commit_step.tolist() == [[4, 0, 1, 2, 3]]


def test_a_constrained_row_does_not_depend_on_its_batch():
    model, language = random_table(7, VOCAB, 2.0), ENDED
    settings = config(steps=2, temperature=1.0)
    prompts = [[0], [1, 2], [2], [0, 0, 1]]
    together = engine(model).generate(prompts, settings, row_ids=[5, 3, 9, 1], constraint=language)
    alone = engine(model, max_batch_rows=1).generate(prompts, settings, row_ids=[5, 3, 9, 1], constraint=language)
    assert_same_rows(alone, together)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 0.5, 2.0]))
def test_candidates_are_the_best_tokens_that_may_be_drawn(seed: int, temperature: float):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (3, 20), generator=generator).double()
    banned = torch.rand(3, 20, generator=generator) < 0.5
    scored = Scored(logits, temperature, 0.5, 3, 19, banned, places=None, own_logits=logits + 1.0 * (logits > 0))
    found = candidates(scored)
    assert found.shape == (3, CANDIDATES, 4)
    for row in range(3):
        allowed = [t for t in range(19) if not banned[row, t]]
        best = sorted(allowed, key=lambda t: (-logits[row, t].item(), t))[:CANDIDATES]
        listed = [int(t) for t in found[row, :, 0].tolist() if t >= 0]
        assert {logits[row, t].item() for t in listed} == {logits[row, t].item() for t in best}
        assert len(listed) == len(best) and listed == sorted(listed, key=lambda t: (-logits[row, t].item(), t))
        drawn_from = logits[row].clone()
        drawn_from[[t for t in range(20) if t not in allowed]] = -torch.inf
        for token, raw, log_prob, confidence in found[row, : len(listed)].tolist():
            token = int(token)
            assert raw == pytest.approx(scored.own_logits[row].log_softmax(-1)[token].item())
            tempered = (drawn_from / temperature).log_softmax(-1)[token].item() if temperature else 0.0
            assert log_prob == pytest.approx(tempered)
            assert confidence == pytest.approx(logits[row].softmax(-1)[token].item())


@pytest.mark.parametrize("schedule", ["editing", "daedal"])
def test_schedules_that_would_get_around_a_constraint_are_refused(schedule: str):
    settings = DecodingConfig(canvas_length=8, schedule=schedule)
    with pytest.raises(ValueError, match=f"constraint is not supported for schedule='{schedule}'"):
        engine(constant_table([0.0] * VOCAB)).generate([[0]], settings, constraint=Everything())
