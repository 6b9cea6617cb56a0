"""P2: no target lies behind an end, whatever the chat template writes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer, tiny_llada
from rl4dlm.models.tiny import tiny_tokenizer
from tests.training.steps import SMALL_RUN

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def taught(folder: Path, row: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """An example's whole text, and its targets."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    args = DiffusionSFTConfig(output_dir=str(folder), **{**SMALL_RUN, "max_length": None, **settings})
    trainer = DiffusionSFTTrainer(tiny_llada(), args, Dataset.from_list([row] * 8), None, tokenizer)
    found = trainer.train_dataset[0]
    targets = [label for label in found["labels"] if label != -100]
    return tokenizer.decode(found["input_ids"]), tokenizer.decode(targets)


@pytest.mark.parametrize(
    ("row", "whole", "targets"),
    [
        (
            {"prompt": [user("1-2")], "completion": [assistant("-1")]},
            "<|user|>1-2<eos>\n<|assistant|>-1<eos>",
            "-1<eos>",
        ),
        (
            {"prompt": [user("1-2"), assistant("it ")], "completion": [assistant("is -1")]},
            "<|user|>1-2<eos>\n<|assistant|>it is -1<eos>",
            "is -1<eos>",
        ),
        ({"prompt": "1-2=", "completion": "-1"}, "1-2=-1<eos>", "-1<eos>"),
        ({"prompt": "1-2=", "completion": "-1<eos> or so"}, "1-2=-1<eos>", "-1<eos>"),
        (
            {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
            "<|user|>a<eos>\n<|assistant|>b<eos>\n<|user|>c<eos>\n<|assistant|>d<eos>",
            "<|user|>a<eos>\n<|assistant|>b<eos>\n<|user|>c<eos>\n<|assistant|>d<eos>",
        ),
    ],
)
def test_p2_targets_end_with_the_end(tmp_path: Path, row: dict[str, Any], whole: str, targets: str) -> None:
    assert taught(tmp_path, row) == (whole, targets)


def test_p2_a_canvas_holds_ends_alone_behind_the_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    args = DiffusionSFTConfig(
        output_dir=str(tmp_path),
        **{**SMALL_RUN, "max_length": None, "max_completion_length": 5, "eos_padding": "canvas"},
    )
    rows = Dataset.from_list([{"prompt": [user("1-2")], "completion": [assistant("-1")]}] * 8)
    trainer = DiffusionSFTTrainer(tiny_llada(), args, rows, None, tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    targets = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(targets) == "-1<eos><eos><eos>"


def test_p2_assistant_turns_end_one_by_one(tmp_path: Path) -> None:
    from rl4dlm.sft.data import until_end

    end, newline = 2, 9
    ids = [5, 6, end, newline, 5, 7, end, newline]
    labels = [-100, 6, end, newline, -100, 7, end, newline]
    found = until_end({"input_ids": ids, "labels": labels}, [end])
    assert found == {"input_ids": ids[:-1], "labels": [-100, 6, end, -100, -100, 7, end]}
    cut = {"input_ids": [5, end, 6], "labels": [5, end, 6]}  # by max_length, within a turn
    assert until_end(cut, [end], max_length=3) == cut


def test_p2_prompts_that_are_none_are_refused(tmp_path: Path) -> None:
    for prompt, said in ((None, "None"), ([3, 4], "token ids")):
        with pytest.raises(ValueError, match=said):
            taught(tmp_path, {"prompt": prompt, "completion": "x"})
