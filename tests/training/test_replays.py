"""A training run links its logged completions to replays of how they were written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig
from rl4dlm.models.tiny import SPECIAL_TOKENS

BASE = {"log_completions": True, "log_replays": 2}


def logged(folder: Path, step: int) -> pd.DataFrame:
    return pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")


def replay_of(folder: Path, link: str) -> dict[str, Any]:
    """The row that a link leads to."""
    path, row = link.split("#row-")
    text = (folder / path).read_text(encoding="utf-8")
    data = text.partition('id="replay">')[2].partition("</script>")[0]
    (found,) = [entry for entry in json.loads(data)["rows"] if entry["row"] == int(row)]
    return found


def test_logged_completions_lead_to_their_replays(make_trainer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_trainer(**BASE, max_steps=3, num_iterations=1).train()
    for step in (1, 2, 3):
        table = logged(folder, step)
        assert table["replay"].isna().tolist() == [False] * 2 + [True] * 6
        assert table["replay"][0] == f"replays/step_{step:05d}.html#row-0"
        for row in (0, 1):
            replay = replay_of(folder, table["replay"][row])
            written = re.sub("|".join(map(re.escape, SPECIAL_TOKENS)), "", replay["completion"])
            assert written == table["completion"][row]
            assert float(replay["notes"]["reward"]) == pytest.approx(table["reward"][row], rel=1e-3)
            assert (replay["nfe"], replay["stop_reason"]) == (table["nfe"][row], table["stop_reason"][row])
    assert sorted(path.name for path in (folder / "replays").iterdir()) == [
        f"step_{step:05d}.html" for step in (1, 2, 3)
    ]


def test_a_batch_that_is_used_for_several_steps_has_one_replay_and_one_table(make_trainer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_trainer(**BASE, max_steps=4, num_iterations=2).train()
    assert [logged(folder, step)["replay"][1] for step in (1, 3)] == [
        f"replays/step_{step:05d}.html#row-1" for step in (1, 3)
    ]
    assert len(list((folder / "completions").iterdir())) == 2
    assert sorted(path.name for path in (folder / "replays").iterdir()) == ["step_00001.html", "step_00003.html"]


def test_batches_that_are_not_logged_cost_nothing(make_trainer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from rl4dlm.tracking import training

    made: list[range] = []
    real = training.make_replay
    monkeypatch.setattr(training, "make_replay", lambda *a, **k: made.append(k["rows"]) or real(*a, **k))
    make_trainer(**BASE, max_steps=4, num_iterations=1, logging_steps=2).train()
    assert made == [range(2)] * 2
    names = sorted(path.name for path in (tmp_path / "run" / "replays").iterdir())
    assert names == ["step_00002.html", "step_00004.html"]


def test_evaluation_keeps_links_with_their_rows(make_trainer: Any, prompt_dataset: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = make_trainer(
        **BASE, max_steps=2, num_iterations=1, eval_dataset=prompt_dataset(2), per_device_eval_batch_size=4,
        eval_strategy="steps", eval_steps=1, num_generations_eval=2,
    )  # fmt: skip
    trainer.train()
    table = logged(folder, 2)  # written again after evaluation, whose four rows have pushed out the first ones
    assert len(table) == 8 and table["replay"].isna().all()
    assert (folder / "replays" / "step_00002.html").exists()


def test_more_rows_than_there_are_and_none(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(log_completions=True, log_replays=100, max_steps=1).train()
    assert logged(tmp_path / "run", 1)["replay"].tolist() == [f"replays/step_00001.html#row-{i}" for i in range(8)]
    make_trainer(log_completions=True, output_dir=str(tmp_path / "none"), max_steps=1).train()
    assert "replay" not in logged(tmp_path / "none", 1) and not (tmp_path / "none" / "replays").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_replays": 1}, "log_replays=1 needs log_completions=True"),
        ({"log_replays": -1, "log_completions": True}, "log_replays=-1 is not allowed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DiffuGRPOConfig(output_dir=str(tmp_path), bf16=False, **settings)
