"""Decoding models whose noise is random tokens: against transformers' own loop, and what the trace promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_llada
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.noise import KeyedNoise
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.entropy_bound_canvas import within_entropy_bound
from tests.rollout.torch_noise import TorchNoise

PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]]
ARGUMENTS = {"max_steps": 6, "entropy_bound": 4.0, "confidence": 2.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_diffusion_gemma(initializer_range=0.3)


def settings(**changes: Any) -> DecodingConfig:
    defaults = {"canvas_length": 8, "schedule": "entropy_bound_canvas", "temperature": 0.8, "schedule_args": ARGUMENTS}
    return DecodingConfig(**{**defaults, **changes})


@pytest.fixture(scope="module")
def rollout(model: Any) -> Rollout:
    return RolloutEngine(model).generate(PROMPTS, settings(), num_generations=3)


@pytest.mark.parametrize("confidence", [1e-9, 2.0, 1e9], ids=["never stops", "may stop", "stops when stable"])
@pytest.mark.parametrize("stability", [0, 1, 2])
def test_it_decodes_as_transformers_does(model: Any, confidence: float, stability: int) -> None:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    arguments = {"max_steps": 8, "entropy_bound": 6.0, "confidence": confidence, "stability": stability}
    prompt, vocabulary = PROMPTS[1], model.config.text_config.vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(stability)
        expected = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=12,
            max_denoising_steps=8,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=6.0),
            t_min=0.4,
            t_max=0.8,
            stability_threshold=stability,
            confidence_threshold=confidence,
            eos_token_id=None,
            disable_compile=True,
        )
        torch.manual_seed(stability)
        found = RolloutEngine(model).generate(
            [prompt],
            settings(canvas_length=12, stop_at_eos=False, schedule_args=arguments),
            noise=TorchNoise(vocabulary),
        )
    assert found.canvas[0].tolist() == expected.sequences[0, len(prompt) :].tolist()
    assert int(found.trace.steps[0]) == round(12 / float(expected.tokens_per_forward))
    assert found.nfe.tolist() == [int(found.trace.steps[0]) + 3], "one encoding of the prefix per canvas"
    assert (found.stop_reason == ["max_steps"]) is (confidence < 1 or int(found.trace.steps[0]) == 24)


def test_a_row_does_not_depend_on_its_batch(model: Any, rollout: Rollout) -> None:
    for row, prompt in enumerate(rollout.prompt_ids):
        alone = RolloutEngine(model).generate([prompt], settings(), row_ids=[row])
        assert torch.equal(alone.canvas[0], rollout.canvas[row])
        assert alone.nfe[0] == rollout.nfe[row] and alone.stop_reason[0] == rollout.stop_reason[row]
        for name in ("tokens", "accepted"):
            mine, theirs = (getattr(r.trace.refinement, name) for r in (alone, rollout))
            assert torch.equal(mine[0], theirs[row, : mine.shape[1]])
    again = RolloutEngine(model, max_batch_rows=4).generate(PROMPTS, settings(), num_generations=3)
    assert torch.equal(again.canvas, rollout.canvas)
    assert len({tuple(row) for row in rollout.canvas.tolist()}) > 4, "generations differ"


def test_the_trace_replays(model: Any, rollout: Rollout) -> None:
    """From prompt and recorded states alone: the same results, and each accepted token was in reach."""
    changed = 0
    for row, prompt in enumerate(rollout.prompt_ids):
        prefix, step = torch.tensor([prompt]), 0
        for first in range(0, 8, 4):
            last = int(rollout.trace.commit_step[row, first])
            if last < 0:
                continue
            condition = None
            for n in range(ARGUMENTS["max_steps"], ARGUMENTS["max_steps"] - (last - step) - 1, -1):
                state = rollout.trace.refinement.tokens[row, step].long()
                with torch.no_grad():
                    logits = model(
                        input_ids=prefix, decoder_input_ids=state[None], self_conditioning_logits=condition
                    ).logits
                condition = logits / (0.4 + 0.4 * n / ARGUMENTS["max_steps"])
                entropies = torch.distributions.Categorical(logits=condition).entropy()
                accepted = rollout.trace.refinement.accepted[row, step]
                assert torch.equal(within_entropy_bound(entropies, ARGUMENTS["entropy_bound"])[0], accepted)
                if step < last:
                    following = rollout.trace.refinement.tokens[row, step + 1].long()
                    uniform = KeyedNoise(rollout.seed).uniform(
                        "renewal", torch.tensor(row), torch.tensor(step), first + torch.arange(4)
                    )
                    renewed = (uniform * logits.shape[-1]).long()
                    assert torch.equal(following[~accepted], renewed[~accepted])
                    changed += int((following[accepted] != state[accepted]).sum())
                step += 1
            result = rollout.canvas[row, first : first + 4]
            assert torch.equal(logits[0].argmax(-1), result)
            log_probs = logits[0].log_softmax(-1).gather(-1, result[:, None])[:, 0]
            torch.testing.assert_close(rollout.trace.raw_log_prob[row, first : first + 4], log_probs, atol=1e-5, rtol=0)
            prefix = torch.cat([prefix, result[None]], dim=1)
        assert step == int(rollout.trace.steps[row])
    assert changed > 0


def test_states_are_what_the_model_saw(rollout: Rollout) -> None:
    states = torch.stack(list(rollout.states()), dim=1)  # [N, S, L]
    assert states.shape[1] == int(rollout.trace.steps.max())
    for row, steps in enumerate(rollout.trace.steps.tolist()):
        for step in range(steps):
            last = rollout.trace.commit_step[row, ::4]
            block = int(((last >= 0) & (last < step)).sum())
            seen = states[row, step]
            assert torch.equal(seen[: 4 * block], rollout.canvas[row, : 4 * block])
            tokens = rollout.trace.refinement.tokens[row, step].long()
            assert torch.equal(seen[4 * block : 4 * block + 4], tokens) and bool((seen[4 * block + 4 :] == -1).all())
        assert bool((rollout.trace.refinement.tokens[row, steps:] == -1).all())


def test_an_end_of_sequence_stops_later_canvases(model: Any) -> None:
    both = {
        stop: RolloutEngine(model).generate(PROMPTS[:1], settings(stop_at_eos=stop), num_generations=64)
        for stop in (True, False)
    }
    eos = model.config.diffusion["eos_token_ids"][0]
    ended = (both[False].canvas[:, :4] == eos).any(-1)
    assert 0 < int(ended.sum()) < 64
    assert [reason == "eos" for reason in both[True].stop_reason] == ended.tolist()
    assert both[True].completion_ids == both[False].completion_ids
    assert bool((both[True].canvas[ended, 4:] == eos).all())
    assert bool((both[True].trace.commit_step[ended, 4:] < 0).all())
    assert bool((both[True].nfe[ended] < both[False].nfe[ended]).all()) and "eos" not in both[False].stop_reason


def test_the_entropy_bound_is_on_what_was_accepted_before() -> None:
    entropies = torch.rand(200, 7, generator=torch.Generator().manual_seed(0)).double()
    for bound in (0.0, 0.3, 1.0, 100.0):
        for row, accepted in zip(entropies.tolist(), within_entropy_bound(entropies, bound).tolist(), strict=True):
            expected, total = set(), 0.0
            for position in sorted(range(7), key=row.__getitem__):
                if total <= bound:
                    expected.add(position)
                total += row[position]
            assert {i for i, kept in enumerate(accepted) if kept} == expected
    assert within_entropy_bound(torch.ones(1, 3), 0.5).tolist() == [[True, False, False]]


def test_bad_settings_are_refused(model: Any) -> None:
    engine = RolloutEngine(model)
    with pytest.raises(ValueError, match="schedule='low_confidence'.*choose one of entropy_bound_canvas"):
        engine.generate(PROMPTS, DecodingConfig(canvas_length=8))
    with pytest.raises(ValueError, match="noise='mask'"):
        RolloutEngine(tiny_llada()).generate(PROMPTS, settings())
    with pytest.raises(ValueError, match="canvas_length=6 is not a multiple of the 4 tokens"):
        engine.generate(PROMPTS, settings(canvas_length=6))
    with pytest.raises(ValueError, match="hints are not supported"):
        engine.generate(PROMPTS[:1], settings(), hints=[{0: 5}])
    for bad, message in (
        ({"temperature": 0.0}, "temperature=0.0 .* t_min=0.4"),
        ({"top_p": 0.9}, "top_p=0.9 has no meaning"),
        ({"cache": "prefix"}, "cache='prefix' has no meaning"),
        ({"steps": 8}, "steps=8 has no meaning"),
        ({"schedule_args": {"max_steps": 0}}, "max_steps=0"),
        ({"schedule_args": {"entropy_bound": -1.0}}, "entropy_bound=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**bad)
