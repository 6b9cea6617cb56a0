"""Rows that go on from a state: the same row with the parent's key, others apart from it, and what cannot go on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rl4dlm.rollout.audit import audit
from rl4dlm.rollout.constraints.automata import one_of, repeat
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.state import State, branch_row_ids
from tests.models.block_denoisers import KINDS, block_denoiser
from tests.rollout import denoisers, queues
from tests.rollout.denoisers import assert_same_rows
from tests.rollout.schedules.examples import EXAMPLES, HINTS, PROMPTS, ROW_IDS, decoding, denoiser, parts

NUMBERS = ("raw_log_prob", "log_prob", "confidence", "entropy")


def cuts(rollout: Rollout, shift: int) -> list[int]:
    """Steps at which each row is taken up, from none to all, another one in each row."""
    return [(3 * row + shift) % (int(steps) + 1) for row, steps in enumerate(rollout.trace.steps)]


def again(model: Any, rollout: Rollout, start: State, *, places: int | None = None, **more: Any) -> Rollout:
    assert rollout.decoding is not None
    engine = RolloutEngine(model, max_batch_rows=places)
    more = {"row_ids": rollout.row_ids, "seed": rollout.seed} | more
    return engine.generate(rollout.prompt_ids, rollout.decoding, start=start, **more)


def assert_same(a: Rollout, b: Rollout) -> None:
    assert_same_rows(a, b)
    assert torch.equal(a.trace.block_stop, b.trace.block_stop) and a.exact == b.exact
    for name in NUMBERS:
        mine, theirs = getattr(a.trace, name), getattr(b.trace, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "i"), EXAMPLES, ids=[f"{name}-{i}" for name, i in EXAMPLES])
def test_a_row_goes_on_as_it_did(name: str, i: int):
    """Every schedule whose steps follow from what is written, with hints, rows at different steps, and a queue."""
    config = decoding(name, i)
    schedule = parts(config)
    hints = None if schedule.moves else HINTS
    whole = RolloutEngine(denoiser()).generate(PROMPTS, config, row_ids=ROW_IDS, seed=5, hints=hints)
    if not (schedule.monotone and schedule.memoryless):
        with pytest.raises(ValueError, match=f"start.*schedule='{name}'|schedule='{name}'.*each slot once"):
            again(denoiser(), whole, whole.state_at(1))
        return
    for shift, places in ((1, 2), (2, None)):
        assert_same(again(denoiser(), whole, whole.state_at(cuts(whole, shift)), places=places), whole)


@pytest.mark.parametrize("run", range(len(queues.RUNS)))
def test_with_guidance_and_caches(run: int):
    """What is written stays, also where a cache approximates; exact ones go on as they did."""
    model = queues.model()
    config = DecodingConfig(**queues.RUNS[run])
    whole = RolloutEngine(model).generate(queues.prompts(), config, seed=3)
    start = whole.state_at(cuts(whole, run))
    found = again(model, whole, start, places=3)
    if whole.exact:
        assert_same(found, whole)
    drawn = start.commit_step >= 0
    assert torch.equal(found.canvas[drawn], whole.canvas[drawn])
    assert torch.equal(found.trace.commit_step[drawn], whole.trace.commit_step[drawn])
    assert torch.equal(found.trace.raw_log_prob[drawn], whole.trace.raw_log_prob[drawn])
    assert bool((found.trace.commit_step[~drawn & (found.trace.commit_step >= 0)] >= 0).all())


@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response"), ("written_first", "response")])
@pytest.mark.parametrize("cache", ["none", "auto"])
def test_block_models_go_on_inside_a_block(kind: str, origin: str, cache: str):
    model = block_denoiser(kind, origin)
    settings = {"block_length": 4} if kind in ("causal", "written_first") else {}
    config = DecodingConfig(
        canvas_length=12,
        temperature=1.0,
        cache=cache,
        schedule="threshold",
        schedule_args={"threshold": 0.4},
        **settings,
    )
    whole = RolloutEngine(model).generate(queues.prompts()[:5], config, seed=3)
    for shift in (1, 2):
        assert_same(again(model, whole, whole.state_at(cuts(whole, shift)), places=shift + 1), whole)


def test_steps_that_were_guessed_and_penalties():
    model = denoisers.denoiser()
    config = DecodingConfig(
        canvas_length=12, block_length=4, steps=12, temperature=0.9, draft_steps=2, eos_penalty=1.0,
        eos_penalty_decay=True, min_new_tokens=3,
    )  # fmt: skip
    whole = RolloutEngine(model).generate(denoisers.PROMPTS, config, seed=2)
    found = again(model, whole, whole.state_at(cuts(whole, 2)), places=3)
    for name in ("canvas", "valid"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    for name in ("commit_step", "steps", "block_stop"):
        assert torch.equal(getattr(found.trace, name), getattr(whole.trace, name))


def test_constraints_and_choices_bind_what_is_left():
    model = denoisers.denoiser()
    config = DecodingConfig(canvas_length=8, steps=8, temperature=1.0)
    letters = repeat(one_of([5, 6, 7, 8]), 0, None)
    more: dict[str, Any] = {"constraint": letters, "seed": 1}
    whole = RolloutEngine(model).generate(denoisers.PROMPTS, config, **more)
    assert_same(again(model, whole, whole.state_at(cuts(whole, 1)), **more), whole)
    some = {"choices": [{3: [9]}] * len(whole), "seed": 1}
    free = RolloutEngine(model).generate(denoisers.PROMPTS, dataclasses.replace(config, stop_at_eos=False), seed=1)
    start = free.state_at(0)
    assert again(model, free, start, **some).canvas[:, 3].unique().tolist() == [9]


def test_an_open_canvas_is_a_fresh_rollout():
    model, config = denoisers.denoiser(), DecodingConfig(canvas_length=12, steps=6, temperature=1.0)
    whole = RolloutEngine(model).generate(denoisers.PROMPTS, config, seed=4)
    ids = [50, 51, 52, 53, 54]
    fresh = RolloutEngine(model).generate(denoisers.PROMPTS, config, seed=4, row_ids=ids)
    assert_same(again(model, whole, whole.state_at(0), row_ids=ids), fresh)


def test_branches_draw_apart_and_keep_what_their_parent_wrote():
    model, config = denoisers.denoiser(), DecodingConfig(canvas_length=16, steps=8, temperature=1.5, stop_at_eos=False)
    parents = RolloutEngine(model).generate(denoisers.PROMPTS, config, seed=4)
    at = [2, 3, 4, 5, 6]
    rows = [row for row in range(5) for _ in range(4)]
    ids = branch_row_ids(parents.row_ids, at, 4)
    start = parents.state_at(at).take(rows)
    prompts = [parents.prompt_ids[row] for row in rows]
    children = RolloutEngine(model).generate(prompts, config, row_ids=ids, seed=4, start=start)
    one_call = RolloutEngine(model).generate(
        parents.prompt_ids, config, num_generations=4, row_ids=ids, seed=4, start=start
    )
    assert_same_rows(children, one_call)
    drawn = start.commit_step >= 0
    assert torch.equal(children.canvas[drawn], parents.canvas[rows][drawn])
    assert torch.equal(children.trace.log_prob[drawn], parents.trace.log_prob[rows][drawn])
    assert bool((children.trace.commit_step[~drawn] >= torch.tensor(at)[rows][:, None].expand(-1, 16)[~drawn]).all())
    assert children.trace.steps.tolist() == [8] * 20 and children.nfe.tolist() == [8] * 20
    for siblings in children.canvas.view(5, 4, 16)[:4]:
        assert len({tuple(row.tolist()) for row in siblings}) == 4
    assert audit(model, children, rows=[0, 7, 13]).summary()["max_delta"] < 1e-9  # the parents' tokens, too


def test_row_ids_of_branches():
    ids = branch_row_ids([0, 1, 2**40, -3], [0, 5, 5, 5], 8)
    assert len(set(ids)) == 32 and all(0 <= i < 2**63 for i in ids)
    assert branch_row_ids([2**40], [5], 8) == ids[16:24]  # whatever is with it
    assert branch_row_ids([2**40], [5], 3) == ids[16:19]
    assert not set(branch_row_ids([0, 1, 2**40, -3], [1, 6, 6, 6], 8)) & set(ids)
    bits = torch.tensor(branch_row_ids(list(range(64)), [1] * 64, 64)).view(-1, 1) >> torch.arange(63) & 1
    assert float((bits.double().mean(0) - 0.5).abs().max()) < 4 * 0.5 / 64  # four standard deviations
    with pytest.raises(ValueError, match="branches=0"):
        branch_row_ids([1], [1], 0)
    with pytest.raises(ValueError, match="steps has 1 entries.*2"):
        branch_row_ids([1, 2], [1], 2)


def test_what_cannot_go_on_says_why():
    model, config = denoisers.denoiser(), DecodingConfig(canvas_length=8, steps=4, temperature=1.0)
    whole = RolloutEngine(model).generate(denoisers.PROMPTS, config)
    start = whole.state_at(2)
    replace = dataclasses.replace
    greedy = RolloutEngine(model).generate(denoisers.PROMPTS, replace(config, temperature=0.0)).state_at(2)
    bare = RolloutEngine(model).generate(denoisers.PROMPTS, replace(config, record=())).state_at(2)
    written = start.commit_step >= 0
    cases = [
        (start.take([0]), {}, r"start.canvas has shape \(1, 8\); \(5, 8\)"),
        (start, {"hints": [{}] * 5}, "hints cannot be given beside start"),
        (greedy, {}, "start.log_prob is None.*temperature=1.0"),
        (bare, {}, "start.entropy is None.*record="),
        (replace(start, steps=start.steps - 1), {}, "commit_step must be below start.steps"),
        (replace(start, hinted=written), {}, "start.hinted"),
        (replace(start, steps=start.steps[:3]), {}, r"start.steps has shape \(3,\)"),
        (replace(start, canvas=torch.where(written, 24, start.canvas)), {}, "start.canvas holds.*0..23"),
        (replace(start, canvas=torch.where(written, denoisers.MASK, start.canvas)), {}, "mask token 2"),
    ]
    for state, more, message in cases:
        with pytest.raises(ValueError, match=message):
            again(model, whole, state, **more)
    with pytest.raises(ValueError, match="steps=-1"):
        whole.state_at(-1)
    remasked = RolloutEngine(model).generate(
        denoisers.PROMPTS, DecodingConfig(canvas_length=8, steps=4, schedule="rcr")
    )
    with pytest.raises(ValueError, match="schedule='rcr'.*each slot once"):
        remasked.state_at(1)


def test_a_finished_row_needs_no_forward():
    model, config = denoisers.denoiser(), DecodingConfig(canvas_length=8, steps=4, temperature=1.0)
    whole = RolloutEngine(model).generate(denoisers.PROMPTS, config)
    assert_same(again(model, whole, whole.state_at(99), on_step=lambda _: pytest.fail("a step")), whole)
