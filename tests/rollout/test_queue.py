"""Rows wait for a place, and nothing about them depends on when they get one, nor on which process decodes them."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.rollout import rows as rows_module
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.launch import launch
from tests.models.block_denoisers import KINDS, block_denoiser
from tests.rollout.denoisers import assert_same_rows
from tests.rollout.queues import BLOCK, BLOCKS, LENGTH, RUNS, model, prompts, settings

WORKER = Path(__file__).parent / "in_step_worker.py"


@functools.cache
def denoiser() -> Any:
    return attach_scoring(model())


def decoded(places: int | None, found: Any = None, hints: Any = None, **changes: Any) -> Rollout:
    engine = RolloutEngine(found or denoiser(), max_batch_rows=places)
    return engine.generate(prompts(), DecodingConfig(**changes), seed=3, hints=hints)


@pytest.mark.parametrize(("run", "places"), [(0, 1), (8, 1), *((run, 3) for run in range(len(RUNS)))])
def test_a_row_is_the_same_whenever_its_turn_comes(run: int, places: int):
    assert_same_rows(decoded(places, **RUNS[run]), decoded(None, **RUNS[run]))


@pytest.mark.parametrize(("kind", "origin"), KINDS)
@pytest.mark.parametrize("cache", ["none", "auto"])
def test_rows_of_block_models_too(kind: str, origin: str, cache: str):
    found, changes = block_denoiser(kind, origin), {"canvas_length": LENGTH, "temperature": 1.0, "cache": cache}
    changes |= {"schedule": "threshold", "schedule_args": {"threshold": 0.4}}
    assert_same_rows(decoded(3, found, **changes), decoded(None, found, **changes))


@pytest.mark.parametrize("schedule", ["klass", "saber", "wino", "daedal", "rcr"])
def test_schedules_that_remember_or_change_the_length_too(schedule: str):
    changes = settings(schedule=schedule, temperature=0.0)
    if schedule == "daedal":
        changes["block_length"] = None
    assert_same_rows(decoded(3, **changes), decoded(None, **changes))


def test_hints_stay_with_their_rows():
    hints: list[dict[int, int]] = [{row % LENGTH: 5 + row, 11: 9} for row in range(7)] + [
        dict.fromkeys(range(LENGTH), 4)
    ]
    changes = settings(steps=12, cache="prefix")
    assert_same_rows(decoded(2, hints=hints, **changes), decoded(None, hints=hints, **changes))


def forwards_of(monkeypatch: pytest.MonkeyPatch, places: int, lengths: list[int], **changes: Any) -> list[int]:
    """Rows fed in each forward, for rows that end after so many slots: each is told what to write."""
    fed: list[int] = []
    found = attach_scoring(model())
    body = found.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        fed.append(len(input_ids))
        return body(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(found.model, "forward", forward)
    engine = RolloutEngine(found, max_batch_rows=places)
    hints = [{length: 1} for length in lengths]
    config = DecodingConfig(canvas_length=48, block_length=4, min_new_tokens=48, **changes)
    engine.generate([[5, 6, 7]] * len(lengths), config, hints=hints)
    return fed


def test_a_place_is_taken_as_soon_as_it_is_free(monkeypatch: pytest.MonkeyPatch):
    """Mixed lengths: forwards stay within 1.15 of the ideal count, which has no place empty."""
    lengths = [(7 * row) % 40 + 4 for row in range(128)]
    fed = forwards_of(monkeypatch, 16, lengths, steps=48)
    assert len(fed) <= 1.15 * -(-sum(fed) // 16)
    assert len(forwards_of(monkeypatch, 128, lengths, steps=48)) < len(fed)  # more places, fewer forwards


def test_places_are_closed_and_padding_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    cut = []
    original = rows_module.Rows._cut

    def watched(self: Any) -> None:
        original(self)
        cut.append(self.width)

    monkeypatch.setattr(rows_module.Rows, "_cut", watched)
    decoded(3, **RUNS[2])
    assert max(map(len, prompts())) > min(cut)
    assert cut == sorted(cut, reverse=True)


def needs(kind: str) -> Any:
    missing = kind == "zero3" and not importlib.util.find_spec("deepspeed")
    return pytest.param(
        kind, marks=[pytest.mark.slow, pytest.mark.skipif(missing, reason="deepspeed is not installed")]
    )


@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response"), ("written_first", "response")])
def test_a_process_that_is_done_waits_whatever_the_attention(kind: str, origin: str):
    answers = iter([True] * 40)
    engine = RolloutEngine(block_denoiser(kind, origin), in_step=lambda working: working or next(answers, False))
    settings = {"block_length": 4} if kind in ("causal", "written_first") else {}
    engine.generate([[5, 6, 7]], DecodingConfig(canvas_length=LENGTH, **settings))
    assert next(answers, None) is None, "every other process had its forwards"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp2", needs("zero3")])
def test_sharded_models_wait_for_each_other(kind: str, tmp_path: Path):
    """Uneven rows, early ends, a queue: twenty decodings in two processes end, and are those of one process."""
    launch(WORKER, tmp_path, kind, tmp_path)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    blocks = model()
    blocks.config.diffusion.update(attention="block_causal", block_length=BLOCK)
    cases = [*((changes, denoiser(), seed) for seed, changes in enumerate(RUNS)), (BLOCKS, attach_scoring(blocks), 0)]
    for (changes, one, seed), *found in zip(cases, *parts, strict=True):
        whole = RolloutEngine(one, max_batch_rows=2).generate(prompts(), DecodingConfig(**changes), seed=seed)
        expected = (whole.canvas, whole.trace.commit_step, whole.nfe)
        for name, both in zip(expected, zip(*found, strict=True), strict=True):
            assert torch.equal(torch.cat(both), name)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_what_a_group_has_in_common_is_fed_once(
    cache: str, shift: int, guidance: float, monkeypatch: pytest.MonkeyPatch
):
    """The completions of a prompt begin alike: one row is fed for all of them, and all have its keys and values."""
    fed: list[int] = []
    found = attach_scoring(model())
    found.config.diffusion["logit_shift"] = shift
    body = found.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        fed.append(len(input_ids) // (2 if guidance else 1))
        return body(input_ids=input_ids, **kwargs)

    config = DecodingConfig(**settings(steps=12, cache=cache, cfg_scale=guidance, stop_at_eos=False))
    prompt, other = prompts()[1], prompts()[4]
    hints: list[dict[int, int]] = [{}, {}, {0: 9}, {}, {}, {}]
    alone = RolloutEngine(found, max_batch_rows=1).generate([prompt, other], config, num_generations=3, hints=hints)
    monkeypatch.setattr(found.model, "forward", forward)
    together = RolloutEngine(found).generate([prompt, other], config, num_generations=3, hints=hints)
    assert_same_rows(together, alone)
    assert fed[:2] == [3, 6]  # two of the one prompt, one that begins with more, three of the other


def test_the_first_forward_of_a_group_is_shared_by_block_models_too(monkeypatch: pytest.MonkeyPatch):
    found, fed = block_denoiser("block_causal", "response"), []
    body = found.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        fed.append(len(input_ids))
        return body(input_ids=input_ids, **kwargs)

    config = DecodingConfig(canvas_length=LENGTH, temperature=1.0, steps=12, stop_at_eos=False)
    alone = RolloutEngine(found, max_batch_rows=1).generate([prompts()[1]], config, num_generations=4)
    monkeypatch.setattr(found.model, "forward", forward)
    assert_same_rows(RolloutEngine(found).generate([prompts()[1]], config, num_generations=4), alone)
    assert fed == [1, *[4] * 11]


@pytest.mark.parametrize("cache", ["prefix", "dual", "dual_masked"])
def test_columns_that_are_cut_off_are_not_counted_any_more(cache: str):
    """Rows go on from where they were between two refreshes, also when the padding before them has gone."""
    changes = settings(steps=12, cache=cache, cache_args={"refresh_blocks": 3})
    assert_same_rows(decoded(3, **changes), decoded(None, **changes))
