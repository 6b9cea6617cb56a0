"""What cannot be run is refused before compute: each setting by name, with its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.decoding import DecodingConfig, schedule_arguments
from rl4dlm.rollout.engine import RolloutEngine
from tests.rollout.denoisers import MASK, VOCAB, denoiser

BAD_SETTINGS = [
    ({"canvas_length": 0}, "canvas_length=0.*1 or larger"),
    ({"canvas_length": -3}, "canvas_length=-3"),
    ({"canvas_length": 12.5}, "canvas_length=12.5"),
    ({"schedule": "fastest"}, "schedule='fastest'.*choose one of .*low_confidence, .*threshold"),
    ({"steps": 0}, "steps=0"),
    ({"steps": -4}, "steps=-4"),
    ({"steps": 2.0}, "steps=2.0"),
    ({"canvas_length": 12, "block_length": 5}, "block_length=5.*canvas_length=12"),
    ({"canvas_length": 12, "block_length": 0}, "block_length=0"),
    ({"canvas_length": 12, "block_length": 24}, "block_length=24"),
    ({"canvas_length": 12, "block_length": -4}, "block_length=-4"),
    ({"canvas_length": 12, "block_length": 4.0}, "block_length=4.0"),
    ({"canvas_length": 12, "block_length": 4, "steps": 2}, "steps=2.*3 blocks.*multiple of 3"),
    ({"canvas_length": 12, "block_length": 4, "steps": 7}, "steps=7.*3 blocks.*multiple of 3"),
    ({"temperature": -0.1}, "temperature=-0.1.*0 or larger"),
    ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": math.inf}, "temperature=inf"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"top_p": math.nan}, "top_p=nan"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_k": 2.5}, "top_k=2.5"),
    ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
    ({"cfg_scale": math.nan}, "cfg_scale=nan"),
    ({"cfg_scale": math.inf}, "cfg_scale=inf"),
    ({"cache": "dual-ish"}, "cache='dual-ish'.*none, prefix"),
    ({"schedule": "threshold", "steps": 8}, "steps=8.*threshold.*None"),
    ({"schedule": "threshold", "schedule_args": {"treshold": 0.5}}, "treshold.*allowed.*threshold"),
    ({"schedule": "threshold", "schedule_args": {"threshold": -0.5}}, "threshold=-0.5"),
    ({"schedule": "threshold", "schedule_args": {"threshold": math.nan}}, "threshold=nan"),
    ({"schedule": "threshold", "schedule_args": {"threshold": "high"}}, "threshold='high'"),
    ({"schedule": "low_confidence", "schedule_args": {"threshold": 0.5}}, "threshold.*low_confidence"),
    ({"schedule_args": [1, 2]}, "schedule_args"),
    ({"suppress_token_ids": (-1,)}, "suppress_token_ids"),
    ({"defer_token_ids": (1.5,)}, "defer_token_ids"),
    ({"record": "predictions"}, "record='predictions'.*entropy, predictions"),
    ({"record": ("prediction",)}, "record=.*'prediction'.*entropy, predictions"),
    ({"record": ("filling_log_probs",)}, "filling_log_probs.*without 'fillings'"),
    ({"record": ("predictions",), "cache": "dual"}, "record=.*'predictions'.*cache='dual'.*'none'"),
    ({"record": ("flagged",), "draft_steps": 2}, "record=.*'flagged'.*draft_steps=2"),
    ({"record_steps": (0,)}, "record_steps=.*no meaning.*predictions"),
    ({"record_steps": (-1,), "record": ("predictions",)}, "record_steps=.*-1.*0 on"),
    ({"record_steps": (), "record": ("predictions",)}, "record_steps=.*integers from 0 on"),
    ({"num_fillings": 2}, "num_fillings=2.*no meaning.*fillings"),
    ({"num_fillings": 0, "record": ("fillings",)}, "num_fillings=0.*1 or larger"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[str(settings) for settings, _ in BAD_SETTINGS])
def test_a_bad_setting_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        DecodingConfig(**settings)


def test_an_unknown_schedule_has_no_arguments():
    with pytest.raises(ValueError, match="'fastest' is unknown.*low_confidence"):
        schedule_arguments("fastest")


LIMIT = 32  # positions of the model below
CONFIG = DecodingConfig(canvas_length=12, steps=3)
BAD_CALLS = [
    ({"prompts": [[4], []]}, r"prompts\[1\] is empty"),
    ({"prompts": [[4, MASK, 5]]}, rf"prompts\[0\].*mask token \(id {MASK}\)"),
    ({"prompts": [[4], [5] * 21]}, r"prompts\[1\] has 21 tokens.*canvas_length=12.*32.*at most 20"),
    ({"prompts": [[VOCAB]]}, rf"prompts\[0\].*0..{VOCAB - 1}"),
    ({"prompts": [[-1]]}, rf"prompts\[0\].*0..{VOCAB - 1}"),
    ({"prompts": [[4], [5]], "row_ids": [1]}, "row_ids must be 2"),
    ({"prompts": [[4], [5]], "row_ids": [1, 1]}, "row_ids.*different"),
    ({"prompts": [[4]], "num_generations": 2, "row_ids": [1]}, "row_ids must be 2"),
    ({"num_generations": 0}, "num_generations=0"),
    ({"hints": [{}, {}]}, "hints has 2 entries.*1"),
    ({"hints": [{12: 4}]}, r"hints\[0\].*offset 12.*0..11"),
    ({"hints": [{-1: 4}]}, r"hints\[0\].*offset -1"),
    ({"hints": [{0: VOCAB}]}, r"hints\[0\].*token 24"),
    ({"hints": [{0: -1}]}, r"hints\[0\].*token -1"),
    ({"hints": [{0: MASK}]}, rf"hints\[0\].*except the mask token {MASK}"),
    ({"config": DecodingConfig(canvas_length=4, suppress_token_ids=(VOCAB,))}, "suppress_token_ids.*24.*0..23"),
    ({"config": DecodingConfig(canvas_length=4, defer_token_ids=(VOCAB,))}, "defer_token_ids.*24.*0..23"),
    (
        {"config": DecodingConfig(canvas_length=4, suppress_token_ids=tuple(i for i in range(VOCAB) if i != MASK))},
        "suppress_token_ids leaves nothing",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_a_bad_call_is_refused_before_any_forward(call: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    engine = RolloutEngine(tiny_llada(vocab_size=VOCAB, max_position_embeddings=LIMIT))

    def no_forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a forward was made")

    monkeypatch.setattr(engine.model.model, "forward", no_forward)
    with pytest.raises(ValueError, match=message):
        engine.generate(**{"prompts": [[4]], "config": CONFIG, **call})


def test_the_longest_prompt_that_fits_is_decoded():
    engine = RolloutEngine(tiny_llada(vocab_size=VOCAB, max_position_embeddings=LIMIT))
    assert len(engine.generate([[5] * 20], CONFIG)) == 1


def test_a_model_without_a_spec_is_refused():
    model = tiny_llada(vocab_size=VOCAB)
    del model.config.diffusion
    with pytest.raises(ValueError, match=r"no `config.diffusion`"):
        RolloutEngine(model)
    with pytest.raises(ValueError, match=r"no `config.diffusion`"):
        RolloutEngine(model, DiffusionSpec(MASK, (1,)))


def test_a_spec_that_contradicts_the_models_is_refused():
    with pytest.raises(ValueError, match="logit_shift=1.*logit_shift=0"):
        RolloutEngine(denoiser(), DiffusionSpec(MASK, (1,), logit_shift=1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"attention": "block_causal"}, "attention='block_causal' needs the length of its blocks.*block_length=None"),
        ({"noise": "uniform"}, "noise='uniform'"),
    ],
)
def test_a_spec_that_cannot_be_decoded_is_refused(spec: dict[str, Any], message: str):
    model = tiny_llada(vocab_size=VOCAB)
    model.config.diffusion.update(spec)
    with pytest.raises(ValueError, match=message):
        RolloutEngine(model)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_bad_batch_size_is_refused(rows: int):
    with pytest.raises(ValueError, match=f"max_batch_rows={rows}"):
        RolloutEngine(denoiser(), max_batch_rows=rows)


def test_a_head_that_scoring_cannot_reproduce_is_refused():
    model = tiny_llada(vocab_size=VOCAB)
    plain = model.forward
    model.forward = lambda *args, **kwargs: _scaled(plain(*args, **kwargs))
    with pytest.raises(ValueError, match="not its output embeddings applied to its last hidden state"):
        RolloutEngine(model)


def _scaled(output: Any) -> Any:
    output.logits = 2 * output.logits
    return output


@pytest.mark.parametrize(
    ("prompts", "name"), [(["What is 1+2?"], r"prompts\[0\]"), ("12", "prompts="), ([[1], ["2", "3"]], r"prompts\[1\]")]
)
def test_p6_text_prompts_are_named_as_text(prompts: Any, name: str):
    with pytest.raises(ValueError, match=f"{name}.*is text; the engine takes lists of token ids"):
        RolloutEngine(denoiser()).generate(prompts, DecodingConfig(canvas_length=4))


@pytest.mark.parametrize("name", ["steps", "top_k", "draft_steps", "top_p", "temperature"])
def test_a_flag_is_no_number(name: str):
    with pytest.raises(ValueError, match=f"{name}=True is not allowed"):
        DecodingConfig(canvas_length=8, **{name: True})
