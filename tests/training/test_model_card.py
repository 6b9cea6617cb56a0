"""P8: a saved model says what it is and refuses to write left to right. P2: the lengths it was taught."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rl4dlm import DecodingConfig, RolloutEngine, load_denoiser, save_denoiser, tiny_diffusion_gemma, tiny_llada
from rl4dlm.models.taught import canvas_problem
from rl4dlm.models.tiny import tiny_tokenizer
from rl4dlm.sft.trainer import DiffusionSFTConfig, DiffusionSFTTrainer
from tests.training.steps import SMALL_RUN


def quick_start(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]  # type: ignore[index]


def test_p8_the_card_names_base_algorithm_rewards_and_decoding(
    build_trainer: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    save_denoiser(tiny_llada(), tmp_path / "base", tiny_tokenizer())
    trainer = build_trainer(tmp_path / "run", load_denoiser(tmp_path / "base"), num_iterations=1)
    trainer.save_model(str(tmp_path / "run"))
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "None" not in card and "pipeline(" not in card
    for said in (f"`{tmp_path / 'base'}`", "diffu-GRPO", "2504.12216", "`reward` (weight 1)", "steps=4"):
        assert said in card, said
    assert "`canvas_length=8`" in card
    capsys.readouterr()
    exec(compile(quick_start(card), "quick start", "exec"), {})  # noqa: S102  (it runs as it stands)
    printed = capsys.readouterr().out.rstrip("\n")
    prompt = tiny_tokenizer()("Your question")["input_ids"]
    rollout = RolloutEngine(load_denoiser(tmp_path / "run")).generate([prompt], trainer.decoding)
    assert printed == tiny_tokenizer().batch_decode(rollout.completion_ids, skip_special_tokens=True)[0]


def test_p8_a_hub_model_is_named_as_the_base(build_trainer: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llada()
    model.config._name_or_path = model.name_or_path = "GSAI-ML/LLaDA-8B-Instruct"
    trainer = build_trainer(tmp_path / "run", model, num_iterations=1, beta=0.0)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "\nbase_model: GSAI-ML/LLaDA-8B-Instruct\n" in card


def test_p8_generate_is_refused(tmp_path: Path) -> None:
    save_denoiser(tiny_llada(), tmp_path / "model", tiny_tokenizer())
    model = load_denoiser(tmp_path / "model")
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"left to right.*RolloutEngine"):
        model.generate(ids, max_new_tokens=2)
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="RolloutEngine"):
        adapter.generate(input_ids=ids, max_new_tokens=2)
    save_denoiser(tiny_diffusion_gemma(), tmp_path / "own loop")
    assert "generate" not in vars(load_denoiser(tmp_path / "own loop"))


def sft(folder: Path, **settings: Any) -> DiffusionSFTTrainer:
    args = DiffusionSFTConfig(output_dir=str(folder), **{**SMALL_RUN, "max_length": None, **settings})
    rows = Dataset.from_list([{"prompt": "1+1=", "completion": "2"}] * 8)
    return DiffusionSFTTrainer(tiny_llada(), args, rows, None, tiny_tokenizer())


def test_p2_the_canvas_that_was_taught_is_recorded_and_another_one_warned_of(
    build_trainer: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = sft(tmp_path / "sft", eos_padding="canvas", max_completion_length=4)
    trainer.save_model(str(tmp_path / "sft"))
    trainer.create_model_card()
    taught = json.loads((tmp_path / "sft" / "config.json").read_text())["diffusion_taught"]
    assert taught == {"eos_padding": "canvas", "max_completion_length": 4, "max_length": None}
    card = (tmp_path / "sft" / "README.md").read_text()
    assert "| eos_padding | canvas |" in card and "| max_completion_length | 4 |" in card and "masked SFT" in card
    model = load_denoiser(tmp_path / "sft")
    assert canvas_problem(model.config, 4) is None
    assert "taught with eos_padding='canvas' at max_completion_length=4" in str(canvas_problem(model.config, 64))
    with caplog.at_level(logging.WARNING, logger="rl4dlm.models.taught"):
        build_trainer(tmp_path / "rl", model, num_iterations=1)  # whose canvas is 8
    assert "canvas_length=8, but the model was taught" in caplog.text


def test_p2_other_paddings_name_no_single_length(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    assert canvas_problem(trainer.model.config, 64) is None
    assert DecodingConfig().canvas_length  # the length that a card without one names
