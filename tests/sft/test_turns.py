"""Conversations in supervised training of block models: which tokens are scored, in how many views, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer, tiny_llada
from rl4dlm.models.tiny import tiny_tokenizer
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<eos>{% endgeneration %}{% else %}{{ message['content'] }}<eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = [
    {"messages": chat("aa", "bcd", "efg", "h", "i", "jklm")},
    {"messages": chat("abcdefg", "hi")},
    {"messages": chat("abc", "d", "e", "fgh", "thanks")},
]


def make_sft(folder: Path, rows: Any = CHATS, *, attention: str = "block_causal", **changes: Any) -> Any:
    model = tiny_llada(initializer_range=0.3)
    model.config.diffusion.update(attention=attention, grid_origin="position_zero")
    if attention != "full":
        model.config.diffusion.update(block_length=8)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "max_length": None,
        "assistant_only_loss": True,
        **SMALL_RUN,
        **changes,
    }
    data = Dataset.from_list(list(rows))
    return DiffusionSFTTrainer(model, DiffusionSFTConfig(**settings), data, data, tokenizer)


def batch_of(trainer: Any) -> Any:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


@pytest.mark.parametrize("rule", ["as_decoded", "apart"])
def test_answers_are_scored_and_later_turns_of_their_block_are_not_seen(tmp_path: Path, rule: str) -> None:
    trainer = make_sft(tmp_path, turns=rule, complementary_masks=True, loss_weight="none")
    batch, texts = batch_of(trainer), trainer.processing_class
    targets = batch["labels"] != -100
    said = [texts.decode(row[mask]) for row, mask in zip(batch["input_ids"], targets, strict=True)]
    assert said == ["bcd<eos>h<eos>jklm<eos>", "hi<eos>", "d<eos>fgh<eos>"]
    trainer.model.train()
    views = trainer.draw(batch)
    assert views.hidden.shape[1] == 4, "two answers in a block, each in two complementary views"
    assert torch.equal(views.scored.sum(1), targets.long()), "each target exactly once"
    # the last question of the third row is in the block of the answer before it, which does not see it
    behind = (targets[2].nonzero().max() + 1).item()
    assert batch["attention_mask"][2, behind:].sum() == 0, "nothing is kept behind the last answer"
    together = make_sft(tmp_path, complementary_masks=True, loss_weight="none")
    plain = together.compute_loss(together.model.train(), batch).item()
    assert abs(trainer.compute_loss(trainer.model, batch).item() - plain) > 1e-4
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_single_turn_trains_as_without_a_rule_to_the_bit(tmp_path: Path) -> None:
    rows = [{"prompt": chat(f"say {c}"), "completion": [{"role": "assistant", "content": c * 9}]} for c in "abc"]
    weights = []
    for rule in ("together", "as_decoded", "apart"):
        trainer = make_sft(tmp_path, rows, turns=rule, assistant_only_loss=False)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(other[name], value) for name, value in weights[0].items())


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"turns='as_decoded' needs a model that denoises block by block"):
        make_sft(tmp_path, attention="full", turns="as_decoded")
    with pytest.raises(ValueError, match=r"turns='first' is not allowed"):
        make_sft(tmp_path, turns="first")
    with pytest.raises(ValueError, match=r"cart"):
        make_sft(tmp_path, turns="apart", loss_weight="cart")
    several = [{"prompt": chat("a"), "completion": chat("x", "b", "c", "d")[1:]}] * 3
    for rows, column in ((CHATS, "messages"), (several, "completion")):
        with pytest.raises(ValueError, match=rf"`{column}`.*set assistant_only_loss to True"):
            make_sft(tmp_path, rows, turns="apart", assistant_only_loss=False)
