"""M9: where a canvas can be completed, it is, whatever the model thinks of it and however large the vocabulary is."""

from __future__ import annotations

import itertools
import random
import string

import pytest
import torch

from rl4dlm.rollout.constraints.automata import Automaton, any_of, literal, one_of, repeat, sequence, sized
from rl4dlm.rollout.constraints.paths import Paths
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.rollout.table_model import TableModel, constant_table

VOCAB, MASK, LENGTH = 6, 5, 4


def scenario(seed: int) -> tuple[set[tuple[int, ...]], Automaton, TableModel]:
    """Some allowed canvases, and a model whose favourites lead elsewhere."""
    rng = random.Random(seed)
    every = list(itertools.product(range(MASK), repeat=LENGTH))
    allowed = set(rng.sample(every, rng.randint(1, 6)))
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(64, VOCAB, generator=generator, dtype=torch.float64)
    model = TableModel(lambda row: logits[: len(row)], VOCAB, mask_token_id=MASK, eos_token_ids=(4,))
    return allowed, any_of(*(literal(one) for one in sorted(allowed))), model


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_m9_a_canvas_that_can_be_completed_is(seed: int, temperature: float) -> None:
    allowed, automaton, model = scenario(seed)
    steps = (1, 2, 4)[seed % 3]
    config = DecodingConfig(canvas_length=LENGTH, steps=steps, temperature=temperature, stop_at_eos=False)
    rollout = RolloutEngine(model).generate([[1]], config, num_generations=3, seed=seed, constraint=automaton)
    assert rollout.stop_reason == ["complete"] * 3
    assert {tuple(row) for row in rollout.canvas.tolist()} <= allowed


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("how", ["suppressed", "unknown"])
def test_m9_edges_without_a_drawable_token_are_no_way(seed: int, how: str) -> None:
    allowed, automaton, model = scenario(seed)
    banned = seed % MASK if how == "suppressed" else MASK - 1
    settings = {"suppress_token_ids": (banned,)} if how == "suppressed" else {"known_tokens": banned}
    possible = {one for one in allowed if banned not in one}
    config = DecodingConfig(canvas_length=LENGTH, steps=2, stop_at_eos=False, **settings)
    rollout = RolloutEngine(model).generate([[1]], config, constraint=automaton)
    if possible:
        assert rollout.stop_reason == ["complete"] and tuple(rollout.canvas[0].tolist()) in possible
    else:
        assert rollout.stop_reason == ["constraint_dead_end"]


@pytest.mark.parametrize("how", ["suppressed", "unknown"])
def test_m9_a_token_that_may_not_be_drawn_is_not_chosen_however_probable(how: str) -> None:
    settings = {"suppress_token_ids": (2,)} if how == "suppressed" else {"known_tokens": 2}
    model = TableModel(constant_table([0.0, 1.0, 9.0, 8.0, 0.0, 0.0]), VOCAB, mask_token_id=MASK, eos_token_ids=(4,))
    config = DecodingConfig(canvas_length=1, steps=1, stop_at_eos=False, **settings)
    either = any_of(literal([0]), literal([2]))
    assert RolloutEngine(model).generate([[1]], config, constraint=either).canvas.tolist() == [[0]]
    rollout = RolloutEngine(model).generate([[1]], config, constraint=literal([2]))
    assert rollout.stop_reason == ["constraint_dead_end"]


@pytest.mark.parametrize("seed", range(30))
def test_m9_paths_are_those_of_enumeration(seed: int) -> None:
    allowed, automaton, _ = scenario(seed)
    rng = random.Random(seed)
    canvas: list[int | None] = [rng.choice([None, None, 0, 1]) for _ in range(LENGTH)]
    paths = Paths(automaton, list(canvas), [None] * LENGTH)
    for slot in range(LENGTH):
        if canvas[slot] is not None:
            continue
        fitting = {
            one[slot]
            for one in allowed
            if all(token is None or token == other for token, other in zip(canvas, one, strict=True))
        }
        found = set().union(*(automaton.token_sets[n] or set(range(MASK)) for n in paths.sets(slot)))
        assert found == fitting
        assert {token for token in range(MASK) if paths.admits(slot, token)} == fitting


def test_m9_a_schema_over_a_large_vocabulary_is_completed() -> None:
    size = 49_152
    characters = {character: 1000 + i for i, character in enumerate(string.printable)}

    def text(value: str) -> Automaton:
        return literal([characters[c] for c in value])

    digits = one_of([characters[c] for c in string.digits])
    space = repeat(one_of([characters[" "]]))
    language = sequence(
        text('{"age": '), repeat(digits, at_least=1, at_most=3), text(', "kind": "'), any_of(text("cat"), text("dog")),
        text('"}'), space,
    )  # fmt: skip
    length = 32
    logits = torch.zeros(size)
    logits[:900] = torch.linspace(9, 8, 900)  # far more than any list of candidates, and none of it admissible
    model = TableModel(constant_table(logits.tolist()), size, mask_token_id=size - 1, eos_token_ids=(2,))
    config = DecodingConfig(canvas_length=length, steps=8, temperature=1.0, stop_at_eos=False)
    rollout = RolloutEngine(model).generate([[5]], config, num_generations=2, constraint=sized(language, length))
    assert rollout.stop_reason == ["complete"] * 2
    letters = {token: character for character, token in characters.items()}
    for row in rollout.canvas.tolist():
        written = "".join(letters[token] for token in row)
        assert written.startswith('{"age": ') and written.rstrip().endswith(('"cat"}', '"dog"}'))
