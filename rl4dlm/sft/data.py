"""The rows of supervised fine-tuning: numbered, those that fit, and padded into batches.

Owns how its prompts are rendered, and what becomes of it when TRL has tokenized it. What is hidden of it, and the loss,
are `trainer.py`'s.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rl4dlm.tasks.prompts import encode_prompt, prompt_problem

logger = logging.getLogger(__name__)

NOT_A_TARGET = -100
LEVEL_UNIT = 2**30  # levels travel as integers, since DeepSpeed casts a batch's floats to the model's dtype


@dataclass
class DenoisingCollator:
    """Pads examples on the right; see `DiffusionSFTConfig.eos_padding`.

    Takes dictionaries with `input_ids`, `labels` (-100: no target), `example_id` and perhaps `noise_level` and
    `causal_tokens`. Returns `input_ids`, `labels` and `attention_mask`, long `[B, T]`, `example_id` and `noise_level`,
    long `[B]`, and `causal_tokens`, long `[B, E, 4]`, -1 where a row has fewer edges.

    Raises ValueError for a text that contains the mask token.
    """

    pad_token_id: int
    eos_token_id: int
    mask_token_id: int
    eos_padding: str = "none"
    max_length: int | None = None
    max_completion_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        for example in examples:
            if self.mask_token_id in example["input_ids"]:
                raise ValueError(f"example {example['example_id']} contains the mask token (id {self.mask_token_id})")
        if self.eos_padding == "canvas":
            examples = [self._to_canvas(example) for example in examples]
        width = max(len(example["input_ids"]) for example in examples)
        if self.eos_padding == "max_length":
            width = max(width, self.max_length or 0)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        visible = self.eos_padding in ("longest", "max_length")
        fill = self.eos_token_id if visible else self.pad_token_id

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

        ids = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": padded(ids, fill),
            "labels": padded([example["labels"] for example in examples], fill if visible else NOT_A_TARGET),
            "attention_mask": padded([[1] * len(row) for row in ids], int(visible)),
            "example_id": torch.tensor([example["example_id"] for example in examples]),
        }
        if "noise_level" in examples[0]:
            batch["noise_level"] = torch.tensor([example["noise_level"] for example in examples])
        if "causal_tokens" in examples[0]:
            edges = [example["causal_tokens"] for example in examples]
            most = max(1, *map(len, edges))
            batch["causal_tokens"] = torch.tensor([[*row, *[[-1] * 4] * (most - len(row))] for row in edges])
        return batch

    def _to_canvas(self, example: dict[str, Any]) -> dict[str, Any]:
        """An example whose completion is as long as the canvas."""
        assert self.max_completion_length is not None
        fill = [self.eos_token_id] * (self.max_completion_length - count_targets(example["labels"]))
        return {**example, "input_ids": [*example["input_ids"], *fill], "labels": [*example["labels"], *fill]}


def count_targets(labels: list[int]) -> int:
    """Length of a completion: from its first target to its last."""
    places = [i for i, label in enumerate(labels) if label != NOT_A_TARGET]
    return places[-1] - places[0] + 1 if places else 0


def numbered(dataset: Any) -> Any:
    """Adds `example_id`, which keys an example's noise, and, where the length is known, its level in evaluation."""
    if isinstance(dataset, Dataset):
        for column, values in (
            ("example_id", list(range(len(dataset)))),
            ("noise_level", [(2 * i + 1) * LEVEL_UNIT // (2 * len(dataset)) for i in range(len(dataset))]),
        ):
            if column not in dataset.column_names:
                dataset = dataset.add_column(column, values)
        return dataset
    return dataset.map(lambda row, i: {**row, "example_id": i}, with_indices=True)


def fitting(dataset: Any, most: int | None) -> Any:
    """A prepared dataset without the examples whose completions are longer."""
    if most is None:
        return dataset
    found = dataset.filter(lambda row: count_targets(row["labels"]) <= most)
    if isinstance(found, Dataset):
        if not len(found):
            raise ValueError(f"max_completion_length={most} leaves no example: all completions are longer")
        if len(found) < len(dataset):
            left_out = len(dataset) - len(found)
            logger.warning("left out %d of %d examples: completions over %d tokens", left_out, len(dataset), most)
    return found


def check_answers(row: dict[str, Any]) -> dict[str, Any]:
    """The row. Raises ValueError if all of its turns are targets, so that where answers end is not known."""
    column = "messages" if row.get("messages") else "completion"
    messages = row.get(column)
    if isinstance(messages, list) and len(messages) > 1:
        raise ValueError(
            f"example {row['example_id']} has {len(messages)} messages in `{column}`, all of them targets; `turns` "
            "needs to know the assistant's: set assistant_only_loss to True"
        )
    return row


def prompt_length(prompt_ids: list[int], ids: list[int]) -> int:
    """Length of the prompt in tokens. Raises ValueError unless it is a prefix of prompt and completion."""
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            f"the tokens of a prompt, rendered with the generation prompt ({prompt_ids[-8:]} at its end), are not a "
            f"prefix of those of prompt and completion ({ids[: len(prompt_ids)][-8:]} there), so where the completion "
            "starts is not known. End the prompt on a token boundary, or use a chat template that renders it the same "
            "way in both"
        )
    return len(prompt_ids)


class Rendering:
    """Tokenizes an example's prompt, and then prompt and completion together, where TRL calls its `_tokenize`.

    Prompts are rendered by `encode_prompt`, as in RL and evaluation. A prompt that ends with an assistant message is
    one that the completion goes on with, so the two are one message. Called in pairs, it remembers the prompt.
    """

    def __init__(self) -> None:
        self.prompt: list[Any] | None = None

    def __call__(self, tokenizer: Any, text: Any, **options: Any) -> dict[str, Any]:
        """`input_ids`, and `assistant_masks` where TRL asks for them, of text or messages.

        Raises ValueError for what is neither, and for masks of a completion that goes on with a message.
        """
        if isinstance(text, str):
            return dict(tokenizer(text))
        if options.pop("add_generation_prompt", False):
            self.prompt = list(text)
            return {"input_ids": encode_prompt(tokenizer, text, **_of_template(options))}
        started, self.prompt = self.prompt, None
        problem = prompt_problem(text)
        if problem is not None:
            raise ValueError(f"an example is {problem}")
        messages = list(text)
        if started and started[-1]["role"] == "assistant" and messages[: len(started)] == started:
            messages = _continued(messages, len(started))
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return {name: encoded[name] for name in ("input_ids", "assistant_masks") if name in encoded}


def text_of(row: Mapping[str, Any], tokenizer: Any, text_column: str, chat_template: str | None) -> str:
    """The text that an example was tokenized from: its own, or what the chat template makes of its messages."""
    messages = row.get("messages")
    if row.get("prompt") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return prompt + str(completion)
        messages = [*prompt, *completion]
        if prompt and prompt[-1]["role"] == "assistant":
            messages = _continued(messages, len(prompt))
    if not messages:
        return str(row[text_column])
    tools = row.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, "chat_template": chat_template}
    own = row.get("chat_template_kwargs") or {}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options, **own))


def _of_template(options: Mapping[str, Any]) -> dict[str, Any]:
    known = ("chat_template", "tools")
    own = {name: value for name, value in options.items() if name not in known}
    return {**{name: options[name] for name in known if name in options}, "chat_template_kwargs": own}


def _continued(messages: list[Any], start: int) -> list[Any]:
    """Messages of which the one at `start` goes on with the assistant's before it."""
    begun, rest = messages[start - 1], messages[start:]
    if not rest or rest[0]["role"] != "assistant" or not all(isinstance(m["content"], str) for m in (begun, rest[0])):
        raise ValueError(
            "a prompt ends with an assistant message, which its completion goes on with, so the completion starts with "
            "one as well, and both are text; end the prompt with the user's message, or begin the completion so"
        )
    joined = {**rest[0], "content": begun["content"] + rest[0]["content"]}
    return [*messages[: start - 1], joined, *rest[1:]]


def until_end(row: Mapping[str, Any], ends: Collection[int], max_length: int | None = None) -> dict[str, Any]:
    """An example without what its chat template writes behind an end, such as the line break after `<|im_end|>`.

    A single completion ends with the first end token among its targets. Of several turns each run of targets keeps its
    first end and what is before it, where others lie between the runs; nothing follows the last end.

    Args:
        row: with `input_ids` and `labels`, and perhaps the `completion` that they come from.
        ends: token ids that end a completion.
        max_length: a row of that length was cut, so that its tail belongs to a turn that has lost its end.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    completion = row.get("completion")
    single = isinstance(completion, str) or (isinstance(completion, Sequence) and len(completion) == 1)
    places = [i for i, label in enumerate(labels) if label in ends]
    if not places:
        return {"input_ids": ids, "labels": labels}
    if single:
        return {"input_ids": ids[: places[0] + 1], "labels": labels[: places[0] + 1]}
    if completion is None and NOT_A_TARGET in labels:
        ended = False
        for i, label in enumerate(labels):
            ended = ended and label != NOT_A_TARGET
            labels[i] = NOT_A_TARGET if ended else label
            ended = ended or label in ends
        places = [i for i in places if labels[i] != NOT_A_TARGET]
    if len(ids) != max_length:
        return {"input_ids": ids[: places[-1] + 1], "labels": labels[: places[-1] + 1]}
    return {"input_ids": ids, "labels": labels}
