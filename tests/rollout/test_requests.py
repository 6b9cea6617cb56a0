"""What is recorded on request: by definition, without a change to anything else, and nothing that was not asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.rollout.rollout import Rollout
from tests.models.block_denoisers import KINDS, PROMPTS as BLOCK_PROMPTS, block_denoiser
from tests.rollout import queues
from tests.rollout.denoisers import MASK, PROMPTS, assert_same_rows, denoiser, row_logits, sampling_distribution
from tests.rollout.schedules import examples
from tests.rollout.schedules.examples import EXAMPLES

ALL = ("predictions", "fillings", "filling_log_probs", "flagged")


def decoded(model: Any = None, prompts: Any = None, places: int | None = None, **settings: Any) -> Rollout:
    settings = {"canvas_length": 12, "temperature": 0.8, "record": ALL, "num_fillings": 3} | settings
    return RolloutEngine(model or denoiser(), max_batch_rows=places).generate(
        prompts or PROMPTS, DecodingConfig(**settings), seed=3
    )


@pytest.mark.parametrize(("name", "i"), EXAMPLES, ids=[f"{name}-{i}" for name, i in EXAMPLES])
def test_a_record_changes_nothing_else(name: str, i: int):
    """With every schedule; what is recorded are whole canvases, and what the row became is among the fillings."""
    plain = RolloutEngine(examples.denoiser()).generate(examples.PROMPTS, examples.decoding(name, i), seed=5)
    config = examples.decoding(name, i, record=("entropy", *ALL))
    found = RolloutEngine(examples.denoiser()).generate(examples.PROMPTS, config, seed=5)
    assert_same_rows(found, plain)
    trace = found.trace
    assert trace.predictions is not None and trace.fillings is not None
    for step, state in enumerate(found.states()):
        rows = (trace.steps > step).nonzero().squeeze(-1)
        state = state[rows]
        for completion in (trace.predictions[rows, step], trace.fillings[rows, step, 0]):
            kept = state != examples.MASK
            assert torch.equal(completion[kept].long(), state[kept])
            assert not bool((completion == examples.MASK).any())
        ended = (trace.steps <= step).nonzero().squeeze(-1)
        assert bool((trace.predictions[ended, step] == -1).all()) and bool((trace.fillings[ended, step] == -1).all())


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 6, "block_length": 4},
        {"steps": 6, "cfg_scale": 0.5, "top_p": 0.9},
        {"schedule": "rcr", "steps": 6, "block_length": 6},
        {"schedule": "threshold", "schedule_args": {"threshold": 0.6}, "block_length": 6},
    ],
    ids=["blocks", "guided", "remasked", "threshold"],
)
def test_completions_are_the_models(settings: dict[str, Any]):
    """Against the model's own forward on each state of each row alone."""
    found = decoded(**settings)
    trace, config = found.trace, found.decoding
    assert config is not None and trace.predictions is not None and trace.fillings is not None
    assert trace.filling_log_probs is not None
    for step, state in enumerate(found.states()):
        assert torch.equal(
            found.completion_at(step),
            torch.where((trace.steps > step)[:, None], trace.predictions[:, step], found.canvas),
        )
        for row in (trace.steps > step).nonzero().squeeze(-1).tolist():
            logits = row_logits(denoiser(), found.prompt_ids[row], state[row], config.cfg_scale)
            for slot in (state[row] == MASK).nonzero().squeeze(-1).tolist():
                allowed = logits[slot].clone()
                allowed[MASK] = -torch.inf
                assert int(trace.predictions[row, step, slot]) == int(allowed.argmax())
                chances = sampling_distribution(logits[slot], MASK, config.temperature, config.top_p, config.top_k)
                for z, purpose in enumerate(("token", "filling 1", "filling 2")):
                    at = (torch.tensor([found.row_ids[row]]), torch.tensor([step]), torch.tensor([slot]))
                    uniform = keyed_uniform(3, purpose, *at)
                    token = int((chances.cumsum(-1) <= uniform).sum())
                    assert int(trace.fillings[row, step, z, slot]) == token
                    value = float(trace.filling_log_probs[row, step, z, slot])
                    assert value == pytest.approx(float(chances[token].log()), abs=1e-9)
            written = state[row] != MASK
            assert bool((trace.filling_log_probs[row, step, :, written] == 0).all())


def test_what_was_committed_was_among_the_candidates():
    found = decoded(steps=4)
    commit_step = found.trace.commit_step
    rows, slots = (commit_step >= 0).nonzero(as_tuple=True)
    steps = commit_step[rows, slots]
    assert torch.equal(found.trace.fillings[rows, steps, 0, slots].long(), found.canvas[rows, slots])
    assert torch.equal(found.trace.filling_log_probs[rows, steps, 0, slots], found.trace.log_prob[rows, slots])
    assert int((found.trace.fillings[:, :, 0] != found.trace.fillings[:, :, 1]).sum()) > 0
    greedy = decoded(steps=4, temperature=0.0)
    assert bool((greedy.trace.fillings == greedy.trace.predictions[:, :, None]).all())
    assert bool((greedy.trace.filling_log_probs == 0).all())


@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response"), ("written_first", "response")])
def test_block_models_are_fed_whole(kind: str, origin: str):
    """Later blocks are predicted, too, and what is decoded is what the exact cache decodes."""
    model, more = block_denoiser(kind, origin), {"schedule": "threshold", "schedule_args": {"threshold": 0.4}}
    more |= {"block_length": 4} if kind in ("causal", "written_first") else {}
    found = decoded(model, BLOCK_PROMPTS, **more)
    assert found.cache == "none"
    assert_same_rows(found, decoded(model, BLOCK_PROMPTS, record=("entropy",), num_fillings=1, **more))
    trace = found.trace
    for step, state in enumerate(found.states()):
        alive = trace.steps > step
        assert bool((trace.predictions[alive, step] >= 0).all())
        assert not bool((trace.predictions[alive, step] == model.config.diffusion["mask_token_id"]).any())
        kept = (state != model.config.diffusion["mask_token_id"]) & alive[:, None]
        assert torch.equal(trace.predictions[:, step][kept].long(), state[kept])


@pytest.mark.parametrize("more", [{}, {"record_steps": (0, 3, 40), "num_fillings": 1}])
def test_a_queue_changes_nothing(more: dict[str, Any]):
    settings = {"schedule": "threshold", "schedule_args": {"threshold": 0.5}, "block_length": 4, **more}
    model = queues.model()
    one, several = (decoded(model, queues.prompts(), places, **settings) for places in (None, 3))
    assert len(set(one.trace.steps.tolist())) > 1
    for name in ("predictions", "fillings", "flagged"):
        assert torch.equal(getattr(one.trace, name), getattr(several.trace, name)), name


def test_steps_that_are_named():
    every = decoded(steps=6)
    some = decoded(steps=6, record_steps=[4, 0, 9])
    assert some.decoding is not None and some.decoding.record_steps == (0, 4, 9)
    assert some.trace.predictions.shape == (5, 3, 12) and some.trace.fillings.shape == (5, 3, 3, 12)
    for place, step in enumerate((0, 4)):
        assert torch.equal(some.trace.predictions[:, place], every.trace.predictions[:, step])
        assert torch.equal(some.completion_at(step), every.completion_at(step))
    assert bool((some.trace.predictions[:, 2] == -1).all()) and torch.equal(some.completion_at(9), some.canvas)
    with pytest.raises(ValueError, match="step=1 was not recorded.*0, 4, 9"):
        some.completion_at(1)
    with pytest.raises(ValueError, match="step=-1"):
        every.completion_at(-1)
    assert torch.equal(every.completion_at(10), every.canvas)


def test_steps_that_fell_back():
    """Those at which no candidate of the block reached the threshold; one token is written then."""
    found = decoded(schedule="threshold", schedule_args={"threshold": 0.7}, record=("flagged",), num_fillings=1)
    trace = found.trace
    assert trace.flagged is not None and trace.predictions is None and trace.fillings is None
    for row, steps in enumerate(trace.steps.tolist()):
        assert trace.flagged.shape[1] == int(trace.steps.max()) and not bool(trace.flagged[row, steps:].any())
        for step in range(steps):
            sure = trace.confidence[row][trace.commit_step[row] == step]
            assert bool(trace.flagged[row, step]) == bool((sure < 0.7).all())
            assert len(sure) == 1 or not bool(trace.flagged[row, step])
    assert bool(trace.flagged.any()) and not bool(trace.flagged.all())


def test_nothing_that_was_not_asked_for():
    trace = decoded(record=("entropy",), num_fillings=1).trace
    assert all(getattr(trace, name) is None for name in ALL) and trace.entropy is not None
    with pytest.raises(ValueError, match="predictions were not recorded"):
        decoded(record=(), num_fillings=1).completion_at(0)
    assert DecodingConfig(record=["flagged", "entropy", "flagged"]).record == ("entropy", "flagged")


def test_rows_that_were_taken_up_and_rows_that_were_replaced():
    whole = decoded(schedule="threshold", schedule_args={"threshold": 0.5})
    assert whole.decoding is not None
    settings = replace(whole.decoding, record=ALL)
    start = whole.state_at(1)
    found = RolloutEngine(denoiser()).generate(PROMPTS, settings, seed=3, start=start)
    assert torch.equal(found.trace.predictions[:, 1:], whole.trace.predictions[:, 1:])
    assert bool((found.trace.predictions[:, 0] == -1).all())
    with pytest.raises(ValueError, match="step=0 of some rows"):
        found.completion_at(0)
    short = RolloutEngine(denoiser()).generate(PROMPTS[:2], settings, seed=3, hints=[dict.fromkeys(range(11), 5)] * 2)
    joined = whole.replaced({1: 0}, short)
    assert torch.equal(joined.trace.predictions[0], whole.trace.predictions[0])
    assert torch.equal(joined.trace.fillings[1, :1], short.trace.fillings[0, :1])
    assert bool((joined.trace.fillings[1, 1:] == -1).all()) and not bool(joined.trace.flagged[1, 1:].any())
