"""Masked SFT's options about lengths and weights: random truncation, context-adaptive weights, a canvas to fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import SFTConfig

from rl4dlm.cli.arguments import parse
from rl4dlm.likelihood.complementary import context_weights
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.sft.trainer import DiffusionSFTConfig, DiffusionSFTTrainer
from tests.rollout.denoisers import EOS, PROMPTS, denoiser
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXTS = {
    "prompt": ["say " + c * i + ":" for i, c in enumerate("abcdefgh")],
    "completion": [c * (i + 1) for i, c in enumerate("abcdefgh")],
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    def build(data: Any = TEXTS, eval_dataset: Any = None, peft_config: Any = None, **changes: Any) -> Any:
        settings = {
            "output_dir": str(tmp_path / "sft"),
            "per_device_train_batch_size": 8,
            "max_length": None,
            **SMALL_RUN,
            **changes,
        }
        return DiffusionSFTTrainer(
            tiny_llada(),
            DiffusionSFTConfig(**settings),
            Dataset.from_dict(data),
            None if eval_dataset is None else Dataset.from_dict(eval_dataset),
            tiny_tokenizer(),
            peft_config=peft_config,
        )

    return build


def batch_of(trainer: Any) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def test_random_truncation_makes_all_completions_as_long_as_one_of_them(make: Any) -> None:
    trainer = make(random_truncation=True)
    batch, eos = batch_of(trainer), tiny_tokenizer().eos_token_id
    own = (batch["labels"] != -100).sum(-1)
    found = set()
    for step in range(40):
        trainer.state.global_step = step
        (sample,), count = trainer.get_batch_samples(iter([dict(batch)]), 1, torch.device("cpu"))
        targets = sample["labels"] != -100
        (length,) = targets.sum(-1).unique().tolist()
        found.add(length)
        assert length in own and count == 8 * length
        assert sample["input_ids"].shape[1] == int((batch["attention_mask"].sum(-1) - own).max()) + length
        for row in range(8):
            prompt = int(batch["attention_mask"][row].sum() - own[row])
            kept = min(length, int(own[row]))
            assert torch.equal(sample["input_ids"][row, : prompt + kept], batch["input_ids"][row, : prompt + kept])
            added = sample["input_ids"][row, prompt + kept : prompt + length]
            assert (added == eos).all() and sample["attention_mask"][row].sum() == prompt + length
            assert torch.equal(sample["labels"][row][targets[row]], sample["input_ids"][row][targets[row]])
            assert not targets[row, :prompt].any()
    assert len(found) > 4
    again = trainer.get_batch_samples(iter([dict(batch)]), 1, torch.device("cpu"))[0][0]
    assert torch.equal(again["input_ids"], sample["input_ids"]), "a function of the step"


def test_context_adaptive_weights(make: Any) -> None:
    trainer = make(loss_weight="cart", cart_p=0.3)
    trainer.model.train()
    batch = batch_of(trainer)
    views = trainer.draw(batch)
    hidden = views.hidden[:, 0]
    expected = context_weights(batch["attention_mask"].bool() & ~hidden, 0.3) * hidden
    torch.testing.assert_close(views.weight[:, 0], expected.float())
    _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert count == hidden.sum() > 0
    noised = torch.where(hidden, trainer.spec.mask_token_id, batch["input_ids"])
    logits = trainer.model(input_ids=noised, attention_mask=batch["attention_mask"]).logits
    log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None]).squeeze(-1)
    loss = -(expected * log_probs).sum() / hidden.sum()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).double(), loss.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).double(), loss.double(), rtol=1e-5, atol=0
    )
    trainer.model.eval()
    weight = trainer.draw({**batch, "noise_level": torch.full((8,), 2**29)}).weight
    torch.testing.assert_close(1 / weight[weight > 0], torch.full_like(weight[weight > 0], 0.5005), msg="the bound")


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_dream_coders_recipe_trains(make: Any, adapter: Any) -> None:
    trainer = make(
        loss_weight="cart",
        random_truncation=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_dataset=TEXTS,
        eval_strategy="steps",
        eval_steps=1,
        peft_config=adapter,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_examples_fit_the_canvas_and_fill_it(make: Any) -> None:
    trainer = make(max_completion_length=5, eos_padding="canvas")
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    lengths = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert max(lengths) <= 5 and len(rows) < 8
    batch, eos = batch_of(trainer), tiny_tokenizer().eos_token_id
    targets = batch["labels"] != -100
    assert (targets.sum(-1) == 5).all()
    for row, length in enumerate(lengths):
        assert (batch["input_ids"][row][targets[row]][length:] == eos).all()
        assert batch["attention_mask"][row].sum() == len(rows[row]["input_ids"]) + 5 - length
    trainer.train()


def test_max_length_is_off_beside_max_completion_length_unless_it_is_given(tmp_path: Path) -> None:
    plain = {"output_dir": str(tmp_path), **SMALL_RUN}
    assert DiffusionSFTConfig(**plain).max_length == SFTConfig(**plain).max_length == 1024
    assert type(DiffusionSFTConfig(**plain).max_length) is int
    flags = ["--output_dir", str(tmp_path), "--bf16", "False", "--max_completion_length", "8"]
    for found in (DiffusionSFTConfig(**plain, max_completion_length=8), *parse(flags, DiffusionSFTConfig)):
        assert found.max_length is None
    with pytest.raises(ValueError, match="max_length=1024 with max_completion_length=8"):
        parse([*flags, "--max_length", "1024"], DiffusionSFTConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_padding": "canvas"}, "needs max_completion_length"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"max_completion_length": 8, "max_length": 24}, "max_length=24"),
        ({"random_truncation": True, "eos_padding": "longest"}, "random_truncation=True"),
        ({"cart_p": 0.0}, "cart_p=0.0"),
        ({"cart_p": 0.3}, "cart_p=0.3 has no effect with loss_weight='1/t'"),
        ({"max_completion_length": 1, "eos_padding": "none"}, "leaves no example"),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_an_eos_penalty_may_fade_as_the_canvas_fills() -> None:
    def rollout(**penalty: Any) -> Any:
        decoding = DecodingConfig(canvas_length=8, steps=8, stop_at_eos=False, **penalty)
        return RolloutEngine(denoiser()).generate(PROMPTS, decoding, seed=0)

    plain, constant = rollout(), rollout(eos_penalty=50.0)
    fading = rollout(eos_penalty=50.0, eos_penalty_decay=True)
    assert not (constant.canvas == EOS).any()
    # At the first step all of the canvas is open, so the penalty is whole; later it is less.
    first = constant.trace.commit_step == 0
    assert torch.equal(fading.trace.commit_step == 0, first) and torch.equal(
        fading.canvas[first], constant.canvas[first]
    )
    torch.testing.assert_close(fading.trace.raw_log_prob[first], constant.trace.raw_log_prob[first])
    assert torch.equal(rollout(eos_penalty_decay=True).canvas, plain.canvas)
    assert not torch.equal(fading.trace.confidence, constant.trace.confidence)
