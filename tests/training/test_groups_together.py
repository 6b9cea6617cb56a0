"""Completions of a prompt that are in one optimizer step are in one micro-batch, and steps stay what they were."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rl4dlm import DiffuGRPOTrainer
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.training.interventions.trainer import SECOND_ATTEMPT, groups
from tests.models.float64 import exactly_float64
from tests.training.steps import recording

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SPLITS = [(2, 2, 1), (4, 4, 2), (4, 2, 2), (2, 4, 4), (4, 1, 2), (3, 2, 2)]
"""Micro-batches of a generation batch, of an optimizer step, and passes."""


@pytest.mark.parametrize(("length", "accumulated", "passes"), SPLITS)
def test_steps_have_the_same_rows_and_micro_batches_fewer_groups(
    make_trainer: Any, length: int, accumulated: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[list[list[int]]], dict[str, torch.Tensor]]:
        """Row ids by step and micro-batch, and the weights in the end."""
        made = make_trainer(
            model=exactly_float64(tiny_llada(initializer_range=0.2, dtype=torch.float64)),
            trainer=recording(DiffuGRPOTrainer),
            per_device_train_batch_size=24 // length,
            steps_per_generation=length,
            gradient_accumulation_steps=accumulated,
            num_iterations=passes,
            max_steps=4,
            beta=0.0,
            max_grad_norm=0.0,
        )
        made.train()
        rows = [record["row_ids"].tolist() for record in made.seen]
        assert len(rows) == 4 * accumulated
        steps = [rows[i : i + accumulated] for i in range(0, len(rows), accumulated)]
        return steps, {name: p.detach() for name, p in made.model.named_parameters()}

    steps, weights = run()
    monkeypatch.setattr(DiffuGRPOTrainer, "_groups_together", lambda self, batch: batch)
    shuffled, expected = run()
    met = [sum(len({row // 4 for row in batch}) for step in found for batch in step) for found in (steps, shuffled)]
    if accumulated == 1 or (length % accumulated and accumulated % length):
        assert met[0] == met[1]
    else:
        assert met[0] < met[1]
    for a, b in zip(steps, shuffled, strict=True):
        assert sorted(itertools.chain(*a)) == sorted(itertools.chain(*b))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12)


def test_means_of_micro_batches_keep_the_micro_batches_of_the_shuffle(make_trainer: Any) -> None:
    made = make_trainer(loss_type="bnpo", steps_per_generation=2, gradient_accumulation_steps=2)
    batch = {"row_ids": torch.tensor([0, 4, 1, 5])}
    assert made._groups_together(batch) is batch


def test_lists_go_with_their_rows(make_trainer: Any) -> None:
    made = make_trainer(loss_type="dapo", steps_per_generation=2, gradient_accumulation_steps=2)
    batch = made._groups_together({"row_ids": torch.tensor([0, 4, 1, 5]), "names": ["a", "b", "c", "d"], "one": 3})
    assert batch["row_ids"].tolist() == [0, 1, 4, 5]
    assert batch["names"] == ["a", "c", "b", "d"]


def test_rows_that_were_replaced_stay_with_their_group() -> None:
    ids = torch.tensor([0, 1, SECOND_ATTEMPT + 2, 3, 4, SECOND_ATTEMPT + 5, 2 * SECOND_ATTEMPT + 1])
    assert groups(ids, 4).tolist() == [0, 0, 0, 0, 4, 4, 2 * SECOND_ATTEMPT]
