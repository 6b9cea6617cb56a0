"""The rows of supervised fine-tuning: numbered, those that fit, and padded into batches.

Owns what becomes of a dataset that TRL has tokenized. What is hidden of it, and the loss, are `trainer.py`'s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

logger = logging.getLogger(__name__)

NOT_A_TARGET = -100
LEVEL_UNIT = 2**30  # levels travel as integers, since DeepSpeed casts a batch's floats to the model's dtype


@dataclass
class DenoisingCollator:
    """Pads examples on the right; see `DiffusionSFTConfig.eos_padding`.

    Takes dictionaries with `input_ids`, `labels` (-100: no target), `example_id` and perhaps `noise_level`. Returns
    `input_ids`, `labels` and `attention_mask`, long `[B, T]`, `example_id` and `noise_level`, long `[B]`.

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
