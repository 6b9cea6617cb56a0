"""The lean draw gives what the plain one gives: running sums, sorted vocabularies and whole log-softmaxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rl4dlm.rollout.drawing import (
    GROWTH,
    NUCLEUS,
    Drawn,
    Places,
    Scored,
    entropy_of,
    filtered,
    in_parts,
    lowest_argmax,
)
from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.noise import BLOCK, KeyedNoise, inverse_cdf

LLADA = 126_464
SIZES = (1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 1000, 4099)
TINY = 0.5 / 2**53
EDGES = (TINY, 1e-15, 1e-9, 0.5, 1 - 1e-9, 1 - 1e-12, 1 - TINY)
"""Uniform numbers; the first and the last, which is 1.0, are the extreme ones that `keyed_uniform` can give."""


# --- the plain definitions --------------------------------------------------------------------------------------------


def running_sum(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """An inverse-CDF draw by a running sum in float64 over the whole vocabulary."""
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def lowest_of_best(logits: Tensor) -> Tensor:
    best = logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1])
    return torch.where(logits >= best, ids, logits.shape[-1] - 1).amin(-1)


def by_sorting(log_probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Top-k and then top-p by a stable sort of the whole vocabulary."""
    if top_p >= 1.0 and not 0 < top_k < log_probs.shape[-1]:
        return log_probs
    ordered, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1])
    drop = (rank >= top_k).expand_as(ordered) if top_k > 0 else torch.zeros_like(ordered, dtype=torch.bool)
    if top_p < 1.0:
        kept = ordered.masked_fill(drop, -torch.inf).softmax(-1)
        drop = drop | (kept.cumsum(-1) - kept >= top_p)
    dropped = torch.zeros_like(drop).scatter(-1, ids, drop)
    return log_probs.masked_fill(dropped, -torch.inf).log_softmax(-1)


def plain_entropy(log_probs: Tensor) -> Tensor:
    probabilities = log_probs.exp()
    return -torch.where(probabilities > 0, probabilities * log_probs, 0.0).sum(-1)


def plainly_drawn(scored: Scored) -> Drawn:
    """Every number by its definition, each from a log-softmax of its own."""
    raw = scored.logits.log_softmax(-1)
    own = raw if scored.own_logits is None else scored.own_logits.log_softmax(-1)
    allowed = scored.logits.index_fill(-1, torch.tensor([scored.mask_token_id]), -torch.inf)
    if scored.banned is not None:
        allowed = allowed.masked_fill(scored.banned, -torch.inf)
    sampling = (allowed / (scored.temperature or 1.0)).log_softmax(-1)
    sampling = by_sorting(sampling, scored.top_p, scored.top_k)
    at = scored.places
    token = lowest_of_best(allowed)
    if scored.temperature > 0:
        token = running_sum(sampling.exp(), at.noise.uniform("token", at.row_ids, at.steps, at.positions))
    raw_at, own_at, drawn_at = (values.gather(-1, token[:, None]).squeeze(-1) for values in (raw, own, sampling))
    log_prob = drawn_at if scored.temperature > 0 else torch.zeros_like(raw_at)
    return Drawn(token, raw_at.exp(), own_at, log_prob, plain_entropy(raw))


# --- draws ------------------------------------------------------------------------------------------------------------


def distributions(rows: int, size: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    for scale in (0.0, 1.0, 4.0, 12.0):
        yield f"softmax of scale {scale}", (normal * scale).softmax(-1).to(dtype)
    sparse = (normal * 2).softmax(-1) * (torch.rand(rows, size, generator=generator) < 0.02)
    sparse[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] += 1e-3
    yield "mostly zeros", sparse.to(dtype)
    yield "not normalised", (normal.softmax(-1) * 1e4).to(dtype)
    one = torch.zeros(rows, size, dtype=dtype)
    one[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] = 1e-30
    yield "a single entry", one
    ends = torch.zeros(rows, size, dtype=dtype)
    ends[:, 0], ends[:, -1] = 0.5, 1e-6
    yield "both ends", ends
    tail = torch.full((rows, size), 1e-9, dtype=dtype)
    tail[:, 0] = 1.0
    yield "a long tail", tail


def assert_same_draw(probabilities: Tensor, uniforms: Tensor, *, within_rounding: bool = False) -> None:
    """The same tokens as by a running sum, or, `within_rounding`, tokens between which it grows by no more than that:
    V 2^-52 of the total."""
    found, expected = inverse_cdf(probabilities, uniforms), running_sum(probabilities, uniforms)
    assert bool((probabilities.gather(-1, found[:, None]) > 0).all())
    if not within_rounding:
        assert torch.equal(found, expected)
        return
    cumulative = probabilities.double().cumsum(-1)
    total, rounding = cumulative[:, -1:], probabilities.shape[-1] * 2.0**-52
    other = found != expected
    low, high = (pair[:, None] for pair in (torch.minimum(found, expected), torch.maximum(found, expected)))
    threshold = uniforms[:, None] * total
    assert bool(((cumulative.gather(-1, low) - threshold).abs() <= rounding * total)[other].all())
    until = cumulative.gather(-1, high) - probabilities.double().gather(-1, high)
    assert bool(((until - threshold).abs() <= rounding * total)[other].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [*SIZES, LLADA])
def test_a_draw_by_blocks_is_the_draw_by_a_running_sum(size: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    rows = 4 if size == LLADA else 64
    for name, probabilities in distributions(rows, size, dtype):
        for uniforms in torch.rand(3 if size == LLADA else 20, rows, generator=generator, dtype=torch.float64):
            assert_same_draw(probabilities, uniforms.clamp(min=TINY))
        for edge in EDGES:
            # The last unit in front of 1 is within rounding of every entry of a tail that the sum does not see.
            on_edge = edge == EDGES[-1] or name.endswith("scale 0.0")
            assert_same_draw(probabilities, torch.full((rows,), edge, dtype=torch.float64), within_rounding=on_edge)


@pytest.mark.parametrize("size", [1000, 4099])
def test_on_a_boundary_a_draw_is_within_rounding_of_it_and_never_an_entry_of_probability_0(size: int):
    for _, probabilities in distributions(16, size, torch.float64):
        cumulative = probabilities.cumsum(-1) / probabilities.sum(-1, keepdim=True)
        for exact in cumulative[:, :: size // 97].T:
            for uniforms in (exact, exact.nextafter(torch.zeros_like(exact)), exact.nextafter(torch.ones_like(exact))):
                assert_same_draw(probabilities, uniforms.clamp(TINY, 1 - TINY), within_rounding=True)


@pytest.mark.parametrize("size", [5, BLOCK, BLOCK + 3, 1000])
def test_what_is_not_a_distribution_is_drawn_from_as_by_a_running_sum(size: int):
    probabilities = torch.rand(6, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probabilities[0] = 0.0
    probabilities[1] = torch.nan
    probabilities[2, size // 2] = torch.nan
    probabilities[3, size - 1] = torch.nan
    probabilities[4, size // 2] = torch.inf
    probabilities[5, 0] = torch.inf
    for uniform in (*EDGES, 0.3):
        uniforms = torch.full((6,), uniform, dtype=torch.float64)
        assert torch.equal(inverse_cdf(probabilities, uniforms), running_sum(probabilities, uniforms))
    assert inverse_cdf(probabilities[:0], torch.zeros(0).double()).tolist() == []


@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 1, 1000, 4 * BLOCK])
def test_the_lowest_of_equal_maxima_is_the_argmax(size: int):
    generator = torch.Generator().manual_seed(size)
    for levels in (1, 2, 5, 1000):
        logits = torch.randint(levels, (200, size), generator=generator).float()
        logits[torch.rand(200, size, generator=generator) < 0.3] = -torch.inf
        logits[0] = -torch.inf
        assert torch.equal(lowest_argmax(logits), lowest_of_best(logits))
    assert lowest_argmax(logits[:0]).tolist() == []
    nested = logits.view(10, 20, size)
    assert torch.equal(lowest_argmax(nested), lowest_of_best(nested))


# --- filters ----------------------------------------------------------------------------------------------------------


def rows_of_many_kinds(size: int, dtype: torch.dtype) -> Tensor:
    """Log-probabilities: peaked, flat and all equal rows, rows with ties as of a bfloat16 head, rows with -inf."""
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(6, size, generator=generator, dtype=dtype)
    rows = [normal * scale for scale in (0.5, 2.0, 4.0, 8.0)]
    rows.append((normal * 4).to(torch.bfloat16).to(dtype))
    rows.append((normal * 2).round())
    rows.append(torch.zeros(1, size, dtype=dtype))
    sparse = normal.clone()
    sparse[torch.rand(6, size, generator=generator) < 0.995] = -torch.inf
    sparse[:, -1] = 0.0
    rows.append(sparse)
    few = torch.full((1, size), -torch.inf, dtype=dtype)
    few[:, [size // 3, size // 2, size - 1]] = 0.0
    rows.append(few)
    return torch.cat(rows).log_softmax(-1)


FILTERS = [(0.95, 0), (0.5, 0), (0.999, 0), (1e-6, 0), (1.0, 1), (1.0, 40), (1.0, 1500), (0.9, 40), (0.3, 2000)]


@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
@pytest.mark.parametrize("size", [3, 24, 900, 3000, 50_001])
def test_filters_keep_what_a_sort_of_the_vocabulary_keeps(size: int, top_p: float, top_k: int):
    log_probs = rows_of_many_kinds(size, torch.float64)
    found, expected = filtered(log_probs, top_p, top_k), by_sorting(log_probs, top_p, top_k)
    assert torch.equal(found.isneginf(), expected.isneginf())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [900, 50_001])
@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
def test_in_float32_only_tokens_on_the_edge_of_the_nucleus_differ(size: int, top_p: float, top_k: int):
    """Sums in float32, as a sort of float32 gives them, are off by some 1e-5 at such sizes; ours run in float64."""
    log_probs = rows_of_many_kinds(size, torch.float32)
    found, expected = filtered(log_probs, top_p, top_k), by_sorting(log_probs, top_p, top_k)
    other = found.isneginf() != expected.isneginf()
    ordered, ids = log_probs.double().sort(dim=-1, descending=True, stable=True)
    mass = ordered.masked_fill(torch.arange(size) >= (top_k or size), -torch.inf).softmax(-1)
    before = torch.zeros_like(mass).scatter(-1, ids, mass.cumsum(-1) - mass)
    assert bool(((before - top_p).abs()[other] < 1e-4).all())
    same = ~other.any(-1)
    torch.testing.assert_close(found[same], expected[same], rtol=0, atol=1e-6)


class Sorted(TorchDispatchMode):
    """Shapes of what is sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.sort:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_only_rows_that_need_it_are_sorted_whole():
    size, generator = 2 * GROWTH * NUCLEUS, torch.Generator().manual_seed(0)
    flat = torch.zeros(1, size).log_softmax(-1)
    middling = (torch.randn(1, size, generator=generator) * 3).log_softmax(-1)
    peaked = (torch.randn(6, size, generator=generator) * 8).log_softmax(-1)
    for rows, whole in ((peaked, 0), (torch.cat([peaked, middling]), 0), (torch.cat([peaked, flat, middling]), 1)):
        with Sorted() as sorts:
            filtered(rows, 0.95, 0)
        assert [shape for shape in sorts.shapes if shape[-1] == size] == [(1, size)] * whole
    with Sorted() as sorts:
        filtered(torch.cat([peaked, middling]), 1.0, 50)
    assert max(shape[-1] for shape in sorts.shapes) < 200


# --- all of it --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "cool": {"temperature": 0.3},
    "d1": {"temperature": 0.9},
    "one": {"temperature": 1.0},
    "hot": {"temperature": 2.0},
    "top-p": {"temperature": 0.9, "top_p": 0.95},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "both": {"temperature": 1.5, "top_p": 0.9, "top_k": 300},
    "greedy, filtered": {"temperature": 0.0, "top_p": 0.9},
}


def scored(size: int, dtype: torch.dtype, seed: int, *, banned: bool, own: bool, **settings: Any) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 if size == LLADA else 32
    logits = torch.randn(rows, size, generator=generator, dtype=dtype) * 5
    logits[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] += 20.0
    logits[:, torch.randint(size, (3,), generator=generator)] = -torch.inf
    logits[0] = logits[0].round()
    out = torch.rand(rows, size, generator=generator) < 0.5 if banned else None
    place = torch.arange(rows)
    zero = torch.zeros_like(place)
    return Scored(
        logits=logits,
        temperature=settings["temperature"],
        top_p=settings.get("top_p", 1.0),
        top_k=settings.get("top_k", 0),
        mask_token_id=size - 2,
        banned=out,
        places=Places(zero, place, zero, zero + seed, zero + 3, KeyedNoise(5), Memory()),
        own_logits=torch.randn(rows, size, generator=generator, dtype=dtype) if own else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [24, 1000, 4099, LLADA])
def test_candidates_and_their_numbers_are_the_plain_ones(size: int, name: str, dtype: torch.dtype):
    exact = dtype == torch.float64
    for seed in range(1 if size == LLADA else 6):
        case = scored(size, dtype, seed, banned=seed % 2 == 1, own=seed % 3 == 2, **SETTINGS[name])
        before = case.logits.clone()
        found, expected = case.drawn(), plainly_drawn(case)
        assert torch.equal(case.logits, before)  # which others read too
        assert torch.equal(found.token, expected.token)
        for field in ("confidence", "raw_log_prob"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field
        torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-12 if exact else 2e-5)
        if "top_p" not in SETTINGS[name]:
            torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-12 if exact else 1e-6)
        torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-12 if exact else 2e-5)
        assert bool((found.token != case.mask_token_id).all())


@pytest.mark.parametrize("own", [False, True])
def test_rows_reduced_in_parts_are_those_reduced_together(own: bool, monkeypatch: pytest.MonkeyPatch):
    case = scored(1000, torch.float64, 1, banned=False, own=own, temperature=0.9, top_p=0.9)
    sizes, whose = [], case.own_logits if own else case.logits

    def reduce(logits: Tensor, part: slice, own_logits: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(logits))
        assert (own_logits is logits) == (not own)
        return dataclasses.replace(
            case, logits=logits, places=case.places.at(part), own_logits=own_logits, banned=None
        ).drawn()

    whole = in_parts(reduce)(case.logits, slice(0, 32), whose)
    monkeypatch.setattr("rl4dlm.rollout.drawing.PART_ELEMENTS", 7_999)
    parts = in_parts(reduce)(case.logits, slice(0, 32), whose)
    assert sizes == [32, 7, 7, 7, 7, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    rest = case.logits[4:]
    shifted = in_parts(reduce)(rest, slice(4, 32), whose[4:] if own else rest)  # a later chunk of the head's
    assert all(torch.equal(a[4:], b) for a, b in zip(whole, shifted, strict=True))


def test_readings_of_the_same_logits_are_the_plain_ones():
    for seed, name in enumerate(SETTINGS):
        case = scored(1000, torch.float64, seed, banned=seed % 2 == 1, own=False, **SETTINGS[name])
        allowed = case.logits.index_fill(-1, torch.tensor([case.mask_token_id]), -torch.inf)
        if case.banned is not None:
            allowed = allowed.masked_fill(case.banned, -torch.inf)
        assert torch.equal(case.allowed, allowed)
        assert torch.equal(case.log_probs, case.logits.log_softmax(-1))
        warm = case.temperature or 1.0
        for values, logits in ((case.sampling, allowed), (case.tempered, case.logits)):
            expected = by_sorting((logits / warm).log_softmax(-1), case.top_p, case.top_k)
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(entropy_of(values), plain_entropy(expected), rtol=0, atol=1e-12)


def test_entropy_counts_what_has_no_probability_as_nothing():
    log_probs = torch.tensor([[0.0, -torch.inf, -torch.inf], [-torch.inf, 0.5, 0.5]]).double()
    log_probs[1, 1:] = torch.tensor(0.5).double().log()
    assert entropy_of(log_probs).tolist() == pytest.approx([0.0, 0.6931471805599453], abs=1e-15)
    assert entropy_of(log_probs)[0].item() == 0.0
