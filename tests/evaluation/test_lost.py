"""Prompts sorted by what becomes of their answers while they are decoded, and the command that keeps some of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rl4dlm.cli import main
from rl4dlm.evaluation.lost import outcomes
from rl4dlm.evaluation.measure import completion_texts
from rl4dlm.models.loading import save_denoiser
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.tasks.base import Task


class Known(Task):
    """Right are the texts that a row names; no answer is right in a row that names none."""

    def __init__(self, right: list[list[str] | None]) -> None:
        self.right = right

    def _rows(self, split: str) -> list[dict[str, Any]]:
        return [{"prompt": f"p{i}", "right": right} for i, right in enumerate(self.right)]

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        return None if row["right"] is None else completion in row["right"]


@pytest.mark.parametrize("schedule", ["low_confidence", "rcr"])
@pytest.mark.parametrize("size", [None, 2])
def test_outcomes(schedule: str, size: int | None):
    """Against the recorded predictions: right at last, right on the way only, never right, and not to be judged."""
    model, tokenizer = tiny_llada(initializer_range=0.2), tiny_tokenizer()
    config = DecodingConfig(canvas_length=8, steps=8, schedule=schedule)
    prompts = [tokenizer.encode(f"p{i}") for i in range(4)]
    asked = DecodingConfig(canvas_length=8, steps=8, schedule=schedule, record=("predictions",))
    rollout = RolloutEngine(model).generate(prompts, asked)
    final = completion_texts(tokenizer, rollout, RolloutEngine(model).spec)
    first = torch.where(rollout.completion_at(0) == 1, 1, rollout.completion_at(0))
    on_the_way = [
        tokenizer.decode(row[: row.tolist().index(1)] if 1 in row else row, skip_special_tokens=True) for row in first
    ]
    assert all(a != b for a, b in zip(final, on_the_way, strict=True))
    task = Known([[final[0]], [on_the_way[1]], ["nothing like it"], None])
    rows = task.rows("train")
    assert outcomes(model, tokenizer, task, rows, config, batch_rows=size) == ["right", "lost", "wrong", None]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_denoiser(tiny_llada(), tmp_path / "model", tiny_tokenizer())
    output = tmp_path / "kept" / "prompts.jsonl"
    flags = [
        "filter",
        "--model",
        str(tmp_path / "model"),
        "--task",
        "countdown_small",
        "--limit",
        "4",
        "--device",
        "cpu",
    ]
    flags += ["--canvas-length", "8", "--kind", "wrong"]
    assert main([*flags, "--output", str(output)]) == 0
    assert "4 prompts, right: 0, lost: 0, wrong: 4" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 and all("prompt" in row for row in rows)
    for more, message in (
        (["--output", "prompts.csv"], "output='prompts.csv' is not allowed"),
        (["--output", str(output), "--num-samples", "2"], "num-samples=2"),
        (["--output", str(output), "--cache", "dual"], "cache='dual'"),
    ):
        assert main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
