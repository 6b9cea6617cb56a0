"""Every family through the trainer: a rollout, a diffu-GRPO step in full and with an adapter, then save and reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from rl4dlm import DecodingConfig, DiffuGRPOConfig, DiffuGRPOTrainer, DiffusionSpec, RolloutEngine
from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.tiny import tiny_tokenizer
from tests.models.families import MASKED, aligned, hub_folder, logits, tensors

each_family = pytest.mark.parametrize("name", MASKED)


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Some number that depends on every character."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A published folder with a tokenizer, as a user has it."""
    tiny_tokenizer().save_pretrained(hub_folder(name, tmp_path / "hub"))
    return tmp_path / "hub"


@each_family
def test_a_rollout(name: str, folder: Path):
    model = attach_scoring(load_denoiser(folder))
    spec = DiffusionSpec.of(model)
    rollout = RolloutEngine(model, spec).generate(
        [[7, 8, 9], [10, 11, 12, 13, 14]], DecodingConfig(canvas_length=8, steps=4), num_generations=2
    )
    assert rollout.canvas.shape == (4, 8) and not bool((rollout.canvas == spec.mask_token_id).any())
    assert bool((rollout.nfe > 0).all())


@each_family
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_step_of_diffu_grpo(name: str, peft: bool, folder: Path, tmp_path: Path):
    args = DiffuGRPOConfig(
        output_dir=str(tmp_path / "out"),
        max_completion_length=8,
        denoising_steps=4,
        num_generations=4,
        per_device_train_batch_size=8,
        num_iterations=1,
        beta=0.04,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_steps=1,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    assert args.activation_checkpointing
    prompts = Dataset.from_dict({"prompt": ["abc1", "de2", "fghi34", "j"]})
    settings = LoraConfig(r=2, target_modules=r".*self_attn\.(q|v)_proj") if peft else None
    trainer = DiffuGRPOTrainer(str(folder), reward, args, prompts, peft_config=settings)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert all(isinstance(entry[key], float) and entry[key] == entry[key] for key in ("loss", "reward", "grad_norm"))
    assert entry["grad_norm"] > 0
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all("lora" in key for key in changed) is peft

    trainer.save_model(str(tmp_path / "trained"))
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    expected = logits(aligned(trained))
    if peft:
        loaded = load_denoiser(tmp_path / "trained").eval()
        assert isinstance(loaded, PeftModel) and torch.equal(logits(aligned(loaded)), expected)
        return
    for loaded in (load_denoiser(tmp_path / "trained"), AutoModelForCausalLM.from_pretrained(tmp_path / "trained")):
        assert type(loaded) is type(trained) and torch.equal(logits(aligned(loaded)), expected)
    save_denoiser(trained, tmp_path / "published", form="hub")
    written, original = tensors(tmp_path / "published"), tensors(folder)
    assert {key: value.dtype for key, value in written.items()} == {k: v.dtype for k, v in original.items()}
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "published", folder)]
    assert configs[0] == configs[1]
    assert torch.equal(logits(aligned(load_denoiser(tmp_path / "published"))), expected)
