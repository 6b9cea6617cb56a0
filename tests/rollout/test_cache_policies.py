"""Every cache policy with every attention kind: exact where it says so, and known in what it feeds where it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.attention import LEFT_TO_RIGHT
from rl4dlm.rollout.caches import build_cache
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.parts import ranks, top
from tests.models.block_denoisers import PROMPTS as GRID_PROMPTS, block_denoiser
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser

LENGTH, BLOCK = 12, 4
NAMES = ("delayed_prefix", "dkv_decode", "dkv_greedy", "dkv_prefill", "frozen_prompt", "vicinity")
SMALL = {"vicinity": {"before": 2, "after": 1, "warmup_steps": 1}, "dkv_greedy": {"window": 1, "refresh_steps": 4}}
"""Settings with which a canvas of three short blocks is not all near the block."""
FULL = [("full", shift) for shift in (0, 1)]
KINDS = [*FULL, *((kind, shift) for kind in LEFT_TO_RIGHT for shift in (0, 1))]
SHIFTED = pytest.mark.parametrize("shift", [0, 1])
POLICY = pytest.mark.parametrize("name", NAMES)


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    """Decoding settings of a policy: two tokens per step, in an order that is known where that is needed."""
    arguments = {**SMALL.get(name, {}), **changes.pop("cache_args", {})}
    schedule = "random" if name == "dkv_greedy" else "low_confidence"
    common = {"canvas_length": LENGTH, "block_length": BLOCK, "schedule": schedule, "steps": 6, "stop_at_eos": False}
    return {**common, "cache": name, "cache_args": arguments, **changes}


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "cache": "none", "cache_args": {}}


def engine_of(kind: str, shift: int, **kwargs: Any) -> RolloutEngine:
    if kind == "full":
        return RolloutEngine(denoiser(shift=shift), **kwargs)
    return RolloutEngine(block_denoiser(kind, "position_zero", shift=shift), **kwargs)


def decoded(kind: str, shift: int, settings: dict[str, Any]) -> Rollout:
    prompts = PROMPTS if kind == "full" else GRID_PROMPTS
    if kind in ("block_causal", "context_causal"):  # rows end inside a block, or begin there
        settings = {**settings, "canvas_length": 10, "block_length": None}
    return engine_of(kind, shift).generate(prompts, DecodingConfig(**settings), seed=4)


@contextmanager
def forwards_of(model: torch.nn.Module) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Positions and token ids of every forward of one row."""
    seen: list[tuple[list[int], list[int]]] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["position_ids"][0].tolist(), kwargs["input_ids"][0].tolist()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


# --- exact where it must be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shift"), KINDS)
@pytest.mark.parametrize(
    "name", ["prefix", "dual", "dual_masked", "delayed_prefix", "dkv_decode", "dkv_greedy", "vicinity"]
)
def test_refreshing_at_every_step_is_no_cache(name: str, kind: str, shift: int):
    always = {"delay": 99} if name == "delayed_prefix" else {"refresh_steps": 1}
    settings = settings_of(name, temperature=1.0, cache_args=always)
    refreshed, full = decoded(kind, shift, settings), decoded(kind, shift, plain(settings))
    assert_same_rows(refreshed, full)
    assert (refreshed.trace.raw_log_prob - full.trace.raw_log_prob).abs().max() <= 1e-12


@SHIFTED
@pytest.mark.parametrize("name", ["none", "prefix", "dual", "dual_masked", *NAMES])
@pytest.mark.parametrize("kind", ["full", *LEFT_TO_RIGHT])
def test_a_policy_is_exact_where_it_says_so(kind: str, name: str, shift: int):
    settings = settings_of(name, steps=12, temperature=1.0)  # one token per step, so that all go stale
    cached, full = decoded(kind, shift, settings), decoded(kind, shift, plain(settings))
    assert cached.exact == (kind in build_cache(name).exact_for)
    if cached.exact:
        assert_same_rows(cached, full)
    elif not (kind == "written_first" and shift):  # a written token that another follows is fed again there
        assert not torch.allclose(cached.trace.raw_log_prob, full.trace.raw_log_prob, atol=1e-6)


@SHIFTED
@pytest.mark.parametrize("name", ["prefix", "dual", "dual_masked", *NAMES])
def test_logits_are_exact_while_nothing_has_changed(name: str, shift: int, monkeypatch: pytest.MonkeyPatch):
    """Every other step writes nothing and is followed by one that feeds less: what is written is as without a cache."""
    build = DecodingConfig.build_schedule

    def lazy(config: DecodingConfig) -> Any:
        schedule = build(config)
        counts = torch.ones(1, dtype=torch.long)

        def commit(step: Any, scores: Tensor) -> Tensor:
            return top(scores, step.eligible, counts) & (step.step % 2 == 1)[:, None]

        def upcoming(ahead: Any) -> Tensor:
            assert schedule.upcoming is not None
            place = ranks(schedule_scores(ahead), ahead.eligible)
            return torch.where(ahead.eligible & (place == 0), 0, -1)

        def schedule_scores(ahead: Any) -> Tensor:
            everything = dataclasses.replace(ahead, masked_at_start=ahead.eligible.sum(-1), step=ahead.step * 0)
            order = schedule.upcoming(everything)
            return -torch.where(order < 0, order.shape[1], order).double()

        foresight = None if schedule.upcoming is None else upcoming
        return dataclasses.replace(schedule, commit=commit, upcoming=foresight, patience=2)

    monkeypatch.setattr(DecodingConfig, "build_schedule", lazy)
    steps = LENGTH // BLOCK  # one per block, so that all of a block's order is known
    refreshed = "refresh_steps" in {field.name for field in dataclasses.fields(build_cache(name))}
    arguments: dict[str, Any] = {"refresh_steps": 2} if refreshed else {}
    if name == "delayed_prefix":  # it refreshes where blocks end, not in them
        refreshed, arguments = False, {"delay": 0}
    settings = settings_of(name, steps=steps, cache_args=arguments)
    model = denoiser(shift=shift)
    with forwards_of(model) as fed:
        cached = RolloutEngine(model).generate(PROMPTS[:1], DecodingConfig(**settings))
    full = RolloutEngine(model).generate(PROMPTS[:1], DecodingConfig(**plain(settings)))
    whole = len(PROMPTS[0]) + LENGTH
    assert all(len(positions) < whole for positions, _ in fed[1::2])
    if refreshed:
        assert_same_rows(cached, full)
        assert (cached.trace.raw_log_prob - full.trace.raw_log_prob).abs().max() <= 1e-12
    else:
        first = cached.trace.commit_step == 1
        assert bool(first.any()) and torch.equal(first, full.trace.commit_step == 1)
        assert torch.equal(cached.canvas[first], full.canvas[first])
        difference = cached.trace.raw_log_prob - full.trace.raw_log_prob
        assert difference[first].abs().max() <= 1e-12 and difference[~first].abs().max() > 1e-6


# --- rows do not know of each other -----------------------------------------------------------------------------------


@SHIFTED
@POLICY
def test_a_row_is_what_it_is_alone(name: str, shift: int):
    """Other rows, padding, early ends and places that are taken again change nothing."""
    config = DecodingConfig(**settings_of(name, temperature=1.0, stop_at_eos=True))
    engine = engine_of("full", shift)
    together = engine.generate(PROMPTS, config, num_generations=3, seed=4)
    assert len(set(together.nfe.tolist())) > 1
    queued = engine_of("full", shift, max_batch_rows=4).generate(PROMPTS, config, num_generations=3, seed=4)
    assert_same_rows(queued, together)
    for row in range(0, len(together), 2):
        alone = engine.generate([together.prompt_ids[row]], config, row_ids=[row], seed=4)
        assert_same_rows(alone, together, [row])


@POLICY
def test_guidance_has_both_copies_cached(name: str):
    settings = settings_of(name, cfg_scale=1.5, temperature=1.0)
    together, first = (
        engine_of("full", 0).generate(prompts, DecodingConfig(**settings), seed=4) for prompts in (PROMPTS, PROMPTS[:1])
    )
    assert_same_rows(first, together, [0])


# --- what is fed ------------------------------------------------------------------------------------------------------


def fed_counts(name: str, shift: int, **changes: Any) -> tuple[list[int], Rollout, list[tuple[list[int], list[int]]]]:
    model = denoiser(shift=shift)
    with forwards_of(model) as seen:
        rollout = RolloutEngine(model).generate([PROMPTS[2]], DecodingConfig(**settings_of(name, **changes)), seed=4)
    assert all(positions == sorted(set(positions)) for positions, _ in seen)
    return [len(positions) for positions, _ in seen], rollout, seen


@SHIFTED
def test_positions_that_are_fed_follow_from_the_settings(shift: int):
    prompt, whole = len(PROMPTS[2]), len(PROMPTS[2]) + LENGTH
    starts = [prompt + BLOCK * block for block in range(LENGTH // BLOCK)]
    counts, _, _ = fed_counts("frozen_prompt", shift, steps=12)
    froze = [whole if block == 0 else whole - start + BLOCK + shift for block, start in enumerate(starts)]
    assert counts == [n for first, a in zip(froze, starts, strict=True) for n in (first, *[whole - a + shift] * 3)]
    counts, _, _ = fed_counts("delayed_prefix", shift, steps=12, cache_args={"delay": 2})
    left = [whole - a + shift for a in starts]
    expected = [[whole, whole, left[0], left[0]], *([whole, whole, n + BLOCK, n] for n in left[1:])]
    assert counts == [n for block in expected for n in block]
    counts, _, _ = fed_counts("delayed_prefix", shift, steps=12, cache_args={"delay": 0, "refresh_steps": 3})
    assert counts == [
        whole,
        left[0],
        whole,
        left[0],
        *[left[0], whole, left[1], left[1]],
        *[left[1], left[2], left[2], whole],
    ]
    counts, _, _ = fed_counts("dkv_prefill", shift, steps=12)
    assert counts == [whole, *[LENGTH + shift] * 11]
    arguments = {"before": 3, "after": 5, "warmup_steps": 2, "refresh_steps": 3}
    counts, _, _ = fed_counts("vicinity", shift, steps=12, cache_args=arguments)
    window = [min(whole, a + BLOCK + 5) - max(0, a - 3 - shift) for a in starts]
    expected = [[whole, near, near, whole] for near in window]
    expected[0][1] = whole  # the second step of the warm-up
    assert counts == [n for block in expected for n in block]


@pytest.mark.parametrize("full_steps", [1, 2])
@pytest.mark.parametrize("refresh_steps", [2, 3, None])
@pytest.mark.parametrize("keep_prompt", [False, True])
def test_decoding_feeds_what_was_not_known_a_step_before(full_steps: int, refresh_steps: int | None, keep_prompt: bool):
    prompt, whole = len(PROMPTS[2]), len(PROMPTS[2]) + LENGTH
    arguments = {"full_steps": full_steps, "refresh_steps": refresh_steps, "keep_prompt": keep_prompt}
    counts, rollout, seen = fed_counts("dkv_decode", 0, steps=12, cache_args=arguments)
    every = refresh_steps or LENGTH
    for step, count in enumerate(counts):
        in_block = step % BLOCK
        refreshes = in_block < full_steps or in_block % every == 0
        known = prompt + step - 1  # one token per step
        assert count == ((LENGTH if keep_prompt and step else whole) if refreshes else whole - known)
        if not refreshes:
            before = rollout.trace.commit_step[0] < step - 1
            expected = [prompt + slot for slot in range(LENGTH) if not before[slot]]
            assert seen[step][0] == expected


@SHIFTED
def test_a_written_token_is_fed_once_more_and_then_kept(shift: int):
    for name in ("dkv_decode", "dkv_greedy"):
        arguments = {"refresh_steps": LENGTH} | ({"window": 0} if name == "dkv_greedy" else {})
        _, rollout, seen = fed_counts(name, shift, steps=12, block_length=LENGTH, cache_args=arguments)
        checked = 0
        for slot, step in enumerate(rollout.trace.commit_step[0].tolist()):
            position = len(PROMPTS[2]) + slot
            if step + 1 < LENGTH:
                at = seen[step + 1][0].index(position)
                assert seen[step + 1][1][at] == int(rollout.canvas[0, slot])
            if step + 2 < LENGTH:
                nobody_needs_it = not shift or slot + 1 == LENGTH or rollout.trace.commit_step[0, slot + 1] < step + 2
                if name == "dkv_greedy" and shift:
                    nobody_needs_it = slot + 1 == LENGTH or rollout.trace.commit_step[0, slot + 1] != step + 2
                if nobody_needs_it:
                    assert position not in seen[step + 2][0]
                    checked += 1
        assert checked


@SHIFTED
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("steps", [12, 6])
def test_greedy_feeds_what_it_writes_what_it_wrote_and_their_neighbours(steps: int, window: int, shift: int):
    arguments = {"window": window, "refresh_steps": 4}
    _, rollout, seen = fed_counts("dkv_greedy", shift, steps=steps, block_length=LENGTH, cache_args=arguments)
    prompt, commit = len(PROMPTS[2]), rollout.trace.commit_step[0]
    for step, (positions, _) in enumerate(seen):
        if step % 4 == 0:
            assert len(positions) == prompt + LENGTH
            continue
        now, last = ((commit == s).nonzero()[:, 0].tolist() for s in (step, step - 1))
        masked = [slot for slot in range(LENGTH) if commit[slot] >= step]
        expected, free = set(now) | set(last), set(masked) - set(now)
        assert {slot + prompt for slot in expected} <= set(positions)
        more = {p - prompt for p in positions} - expected - ({slot - 1 for slot in now} if shift else set())
        assert more <= free and len(more) <= min(window * len(now), len(free))
        if window and not shift and len(now) == 1:
            nearest = sorted(free, key=lambda slot: (abs(slot - now[0]), slot > now[0]))[:window]
            assert more == set(nearest)


# --- relatives --------------------------------------------------------------------------------------------------------


@SHIFTED
@pytest.mark.parametrize("refresh_steps", [None, 2])
def test_no_vicinity_is_the_dual_cache_and_one_without_bounds_no_cache(refresh_steps: int | None, shift: int):
    none: dict[str, Any] = {"before": 0, "after": 0, "warmup_steps": 0, "refresh_steps": refresh_steps}
    dual = decoded("full", shift, settings_of("dual", temperature=1.0, cache_args={"refresh_steps": refresh_steps}))
    assert_same_rows(decoded("full", shift, settings_of("vicinity", temperature=1.0, cache_args=none)), dual)
    for bound in (None, 99):
        everything = settings_of("vicinity", temperature=1.0, cache_args={**none, "before": bound, "after": bound})
        assert_same_rows(decoded("full", shift, everything), decoded("full", shift, plain(everything)))


def test_one_block_with_a_frozen_prompt_is_prefill():
    settings = settings_of("frozen_prompt", block_length=LENGTH, temperature=1.0)
    prefill = {**settings, "cache": "dkv_prefill"}
    assert_same_rows(decoded("full", 0, settings), decoded("full", 0, prefill))


@SHIFTED
def test_frozen_keys_stay_and_are_never_a_mask_tokens(shift: int):
    model, kept, last = denoiser(shift=shift), [], {}

    def look(_: Any, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
        positions, tokens = kwargs["position_ids"][0].tolist(), kwargs["input_ids"][0].tolist()
        frozen = positions[0]
        assert all(last[position] != model.config.diffusion["mask_token_id"] for position in range(frozen))
        last.update(zip(positions, tokens, strict=True))
        layers = kwargs["past_key_values"].layers
        keys = torch.stack([torch.cat([layer.keys, layer.values], -1)[0] for layer in layers])  # [N, heads, T, 2 d]
        if kept:
            assert torch.equal(keys[:, :, :frozen], kept[-1][1][:, :, :frozen]) and frozen >= kept[-1][0]
        kept.append((frozen, keys.clone()))

    hook = model.register_forward_hook(look, with_kwargs=True)
    try:
        config = DecodingConfig(**settings_of("frozen_prompt", steps=12))
        RolloutEngine(model).generate([PROMPTS[2]], config)
    finally:
        hook.remove()
    starts = [max(0, len(PROMPTS[2]) + slot - shift) for slot in (0, 0, 4)]
    assert [frozen for frozen, _ in kept[::4]] == [0, *starts[1:]]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vicinity", {"before": -1}, "before=-1 is not allowed.*0 or larger"),
        ("vicinity", {"after": 1.5}, "after=1.5 is not allowed"),
        ("vicinity", {"warmup_steps": None}, "warmup_steps=None is not allowed.*0 or larger"),
        ("vicinity", {"refresh_steps": 0}, "refresh_steps=0 is not allowed.*1 or larger"),
        ("dkv_decode", {"refresh_steps": 0}, "refresh_steps=0 is not allowed.*1 or larger"),
        ("dkv_decode", {"full_steps": 0}, "full_steps=0 is not allowed.*1 or larger"),
        ("dkv_decode", {"keep_prompt": 1}, "keep_prompt=1 is not allowed.*True or False"),
        ("dkv_greedy", {"window": -1}, "window=-1 is not allowed.*0 or larger"),
        ("dkv_greedy", {"refresh_steps": None}, "refresh_steps=None is not allowed.*1 or larger"),
        ("delayed_prefix", {"delay": -1}, "delay=-1 is not allowed.*0 or larger"),
        ("delayed_prefix", {"refresh_steps": 0}, "refresh_steps=0 is not allowed.*1 or larger"),
        ("frozen_prompt", {"refresh_steps": 2}, "cache_args has unknown settings.*refresh_steps.*frozen_prompt"),
    ],
)
def test_bad_settings_are_refused(name: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**settings_of(name, cache_args=arguments))


def test_greedy_needs_an_order_that_is_known():
    with pytest.raises(ValueError, match="dkv_greedy.*low_confidence.*'random' and 'left_to_right'"):
        DecodingConfig(**settings_of("dkv_greedy", schedule="low_confidence"))
    with pytest.raises(ValueError, match="dkv_greedy.*entropy_bound_canvas"):
        DecodingConfig(schedule="entropy_bound_canvas", canvas_length=8, cache="dkv_greedy")
    with pytest.raises(ValueError, match=r"dkv_greedy.*defer_token_ids=\(5,\)"):
        DecodingConfig(**settings_of("dkv_greedy", defer_token_ids=(5,)))


@pytest.mark.parametrize("schedule", ["random", "left_to_right"])
def test_what_is_foreseen_is_what_is_written(schedule: str):
    """An order that is known does not depend on the cache: the same slots are written at the same steps."""
    for kind, shift in KINDS:
        greedy = settings_of("dkv_greedy", schedule=schedule, temperature=1.0)
        cached, full = decoded(kind, shift, greedy), decoded(kind, shift, plain(greedy))
        assert torch.equal(cached.trace.commit_step, full.trace.commit_step)


# --- settings that meet ----------------------------------------------------------------------------------------------


def fed(settings: dict[str, Any]) -> list[int]:
    engine = engine_of("full", 0)
    with forwards_of(engine.model.model) as seen:
        engine.generate([PROMPTS[0]], DecodingConfig(**settings), seed=4)
    return [len(positions) for positions, _ in seen]


@pytest.mark.parametrize("name", ["prefix", "dual", "dual_masked"])
def test_a_period_in_steps_leaves_the_period_in_blocks_as_it_is(name: str):
    seldom = settings_of(name, cache_args={"refresh_blocks": 3})
    both = settings_of(name, cache_args={"refresh_blocks": 3, "refresh_steps": 50})
    assert fed(seldom) == fed(both)
    assert sum(fed(seldom)) < sum(fed(settings_of(name)))


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize(("kind", "shift"), [(kind, shift) for kind in LEFT_TO_RIGHT for shift in (0, 1)])
def test_a_delay_is_exact_from_left_to_right_whatever_it_is(kind: str, shift: int, delay: int):
    settings = settings_of("delayed_prefix", steps=12, temperature=1.0, cache_args={"delay": delay})
    cached = decoded(kind, shift, settings)
    assert cached.exact
    assert_same_rows(cached, decoded(kind, shift, plain(settings)))


def test_a_cache_that_foresees_takes_no_constraint():
    class Anything:
        def admissible(self, canvas: Any, slot: int, token: int) -> bool:
            return True

    with pytest.raises(ValueError, match="constraint is not supported for cache='dkv_greedy'"):
        engine_of("full", 0).generate([[5]], DecodingConfig(**settings_of("dkv_greedy")), constraint=Anything())
