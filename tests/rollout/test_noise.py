"""Keyed randomness: uniform, independent, a function of its keys alone; and draws that follow their distribution."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import Places, Scored
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.noise import KeyedNoise, inverse_cdf, keyed_uniform
from tests.rollout.chi_square import chi_square
from tests.rollout.denoisers import sampling_distribution
from tests.rollout.table_model import TableModel, constant_table

N = 200_000


def in_integers(seed: int, purpose: str, *keys: int) -> float:
    """The definition in unbounded integers: SplitMix64's finaliser, keys absorbed one by one."""
    word = 2**64 - 1

    def finalise(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & word
        value = (value ^ value >> 27) * 0x94D049BB133111EB & word
        return value ^ value >> 31

    state = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
    for key in keys:
        state = finalise(finalise(key + 0x9E3779B97F4A7C15 & word) ^ state)
    return ((state >> 11) + 0.5) / 2**53


long_integers = st.integers(-(2**63), 2**63 - 1)


@given(seed=long_integers, purpose=st.text(max_size=5), keys=st.lists(long_integers, min_size=1, max_size=4))
def test_it_is_its_definition_in_64_bit_arithmetic(seed: int, purpose: str, keys: list[int]):
    found = keyed_uniform(seed, purpose, *(torch.tensor(key) for key in keys))
    assert found.dtype == torch.float64 and 0 < found.item() < 1
    assert found.item() == in_integers(seed, purpose, *keys)


STREAMS = {
    "positions": (0, "token", lambda i: (torch.tensor(3), torch.tensor(5), i)),
    "steps": (0, "token", lambda i: (torch.tensor(3), i, torch.tensor(5))),
    "rows": (0, "token", lambda i: (i, torch.tensor(3), torch.tensor(5))),
    "far rows": (0, "token", lambda i: (i * 2**40, torch.tensor(3), torch.tensor(5))),
    "order": (0, "order", lambda i: (torch.tensor(3), torch.tensor(5), i)),
    "next seed": (1, "token", lambda i: (torch.tensor(3), torch.tensor(5), i)),
    "next row": (0, "token", lambda i: (torch.tensor(4), torch.tensor(5), i)),
    "next step": (0, "token", lambda i: (torch.tensor(3), torch.tensor(6), i)),
    "swapped keys": (0, "token", lambda i: (torch.tensor(5), torch.tensor(3), i)),
    "one key": (0, "token", lambda i: (i,)),
}


def stream(name: str) -> torch.Tensor:
    seed, purpose, keys = STREAMS[name]
    return keyed_uniform(seed, purpose, *keys(torch.arange(N)))


@pytest.mark.parametrize("name", STREAMS)
def test_it_is_uniform(name: str):
    uniform = stream(name)
    chi_square(torch.histc(uniform, 256, 0, 1), torch.full((256,), 1 / 256))
    low_bits = (uniform * 2**40).long() % 64  # far behind the point
    chi_square(low_bits.bincount(minlength=64), torch.full((64,), 1 / 64))
    pairs = (uniform[:-1] * 16).long() * 16 + (uniform[1:] * 16).long()  # successive keys
    chi_square(pairs.bincount(minlength=256), torch.full((256,), 1 / 256))


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(STREAMS, 2)))
def test_streams_are_independent(a: str, b: str):
    cells = (stream(a) * 16).long() * 16 + (stream(b) * 16).long()
    chi_square(cells.bincount(minlength=256), torch.full((256,), 1 / 256))


def test_it_does_not_depend_on_the_batch(global_rng_untouched: None):
    rows, steps, positions = torch.tensor([5, 2, 9])[:, None], torch.tensor(4), torch.arange(7)
    together = keyed_uniform(1, "token", rows, steps, positions)
    assert together.shape == (3, 7)
    one_by_one = [
        [keyed_uniform(1, "token", row, steps, position).item() for position in positions] for row in rows[:, 0]
    ]
    assert together.tolist() == one_by_one
    order = torch.tensor([2, 0, 1])
    assert torch.equal(keyed_uniform(1, "token", rows[order], steps, positions), together[order])


# --- draws ------------------------------------------------------------------------------------------------------------

FILTERS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.75},
    "both": {"temperature": 1.5, "top_k": 5, "top_p": 0.6},
    "top-k of one": {"temperature": 1.0, "top_k": 1},
    "suppressed": {"temperature": 1.0, "suppress": (4, 6)},
}
LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.5, -1.5, 1.4, 3.0, 0.9], dtype=torch.float64)
LIKELY_MASK = 7


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_filtered_distribution(name: str):
    settings = FILTERS[name]
    rows = torch.arange(N // 4)
    noise, zero = KeyedNoise(9), torch.zeros_like(rows)
    logits = LOGITS.clone()
    logits[list(settings.get("suppress", ()))] = -torch.inf
    scored = Scored(
        logits.expand(len(rows), -1),
        settings["temperature"],
        settings.get("top_p", 1.0),
        settings.get("top_k", 0),
        LIKELY_MASK,
        None,
        Places(rows, zero, zero, rows, zero, noise, Memory()),
    )
    drawn = scored.drawn()
    expected = sampling_distribution(
        logits, LIKELY_MASK, settings["temperature"], settings.get("top_p", 1.0), settings.get("top_k", 0)
    )
    chi_square(drawn.token.bincount(minlength=len(LOGITS)), expected)
    torch.testing.assert_close(drawn.log_prob, expected[drawn.token].log(), rtol=0, atol=1e-12)
    raw = logits.log_softmax(-1)
    torch.testing.assert_close(drawn.raw_log_prob, raw[drawn.token], rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn.confidence, raw.exp()[drawn.token], rtol=0, atol=1e-12)
    entropy = -(raw.exp() * raw)[raw > -torch.inf].sum()
    torch.testing.assert_close(drawn.entropy, entropy.expand(len(rows)), rtol=0, atol=1e-12)


def test_the_engine_draws_independently_at_every_position():
    engine = RolloutEngine(TableModel(constant_table([0.5, 0.0, -0.5, 1.0]), 4, mask_token_id=3))
    # Not with low_confidence, which commits the likelier of several candidates and draws the others again.
    decoding = DecodingConfig(canvas_length=4, steps=2, temperature=1.0, schedule="random")
    canvas = engine.generate([[0]], decoding, num_generations=4000, seed=1).canvas
    single = torch.tensor([0.5, 0.0, -0.5]).softmax(-1)
    for a, b in itertools.combinations(range(4), 2):
        counts = (canvas[:, a] * 3 + canvas[:, b]).bincount(minlength=9)
        chi_square(counts, torch.outer(single, single).flatten())


def test_a_noise_source_is_asked_by_row_id_step_and_canvas_offset():
    asked = []

    class Watched(KeyedNoise):
        def draw(self, probabilities: torch.Tensor, *keys: torch.Tensor) -> torch.Tensor:
            asked.extend(zip(*(key.tolist() for key in keys), strict=True))
            return super().draw(probabilities, *keys)

    engine = RolloutEngine(TableModel(constant_table([0.5, 0.0, -0.5, 1.0]), 4, mask_token_id=3))
    decoding = DecodingConfig(canvas_length=4, block_length=2, steps=4, temperature=1.0)
    rollout = engine.generate([[0], [1, 2]], decoding, row_ids=[7, 5], noise=Watched(0))
    expected = set()
    for row_id, commit_step in zip([7, 5], rollout.trace.commit_step.tolist(), strict=True):
        for step in range(4):  # one token at a time, so two steps in each block
            active = range(0, 2) if step < 2 else range(2, 4)
            expected |= {(row_id, step, offset) for offset in active if commit_step[offset] >= step}
    assert len(asked) == len(set(asked)) and set(asked) == expected


def test_random_order_is_a_uniform_permutation():
    engine = RolloutEngine(TableModel(constant_table([0.5, 0.0, -0.5, 1.0]), 4, mask_token_id=3))
    decoding = DecodingConfig(canvas_length=3, steps=3, schedule="random")
    steps = engine.generate([[0]], decoding, num_generations=6000, seed=1).trace.commit_step
    code = (steps * torch.tensor([9, 3, 1])).sum(-1)
    counts = torch.stack([(code == a * 9 + b * 3 + c).sum() for a, b, c in itertools.permutations(range(3))])
    assert int(counts.sum()) == 6000
    chi_square(counts, torch.full((6,), 1 / 6))


@pytest.mark.parametrize("uniform", [0.5 / 2**53, 0.3, 0.5, 1 - 0.5 / 2**53])
def test_an_entry_without_probability_is_never_drawn(uniform: float):
    probabilities = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 1e-30, 0.0, 0.0, 0.0, 0.0]])
    token = inverse_cdf(probabilities, torch.full((2,), uniform, dtype=torch.float64))
    assert token.tolist() == [2 if uniform < 0.5 else 4, 1]


def test_the_tail_of_a_large_vocabulary_is_reached():
    probabilities = torch.full((1, 126_464), 1e-9)  # float32, as in a model; most of the mass is in front
    probabilities[0, 0] = 1.0
    last = inverse_cdf(probabilities, torch.tensor([1 - 1e-12], dtype=torch.float64))
    middle = inverse_cdf(probabilities, torch.tensor([1 - 63_232e-9 / (1 + 126_463e-9)], dtype=torch.float64))
    assert last.item() == 126_463
    assert abs(middle.item() - 63_231) <= 10


def test_numbers_that_are_looked_up_are_those_that_are_computed():
    rows = torch.tensor([0, 7, 2**40, 5, 5])
    steps, positions = torch.tensor([0, 3, 99, 1, 2]), torch.tensor([4, 0, 17, 2, 1])
    expected = keyed_uniform(3, "token", rows, steps, positions)
    assert torch.equal(KeyedNoise(3, limit=100).uniform("token", rows, steps, positions), expected)
    assert torch.equal(KeyedNoise(3).uniform("token", rows, steps, positions), expected)
