"""TensorBoard and trackio hold what was run and how completions were written."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest


def test_tensorboard_has_facts_and_replays_as_text(make_trainer: Any, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = {"report_to": "tensorboard", "log_completions": True, "log_replays": 2}
    trainer = make_trainer(max_steps=2, **given)
    trainer.train()
    files = list(Path(trainer.args.output_dir).rglob("events.out.tfevents.*"))
    assert files
    events = accumulator.EventAccumulator(str(files[0].parent)).Reload()

    def text(name: str) -> str:
        (event,) = events.Tensors(f"{name}/text_summary")
        value: bytes = event.tensor_proto.string_val[0]
        return value.decode()

    facts = json.loads(text("rl4dlm").removeprefix("```json").removesuffix("```"))
    assert facts["rl4dlm/trainer"] == "RecordingTrainer" and facts["rl4dlm/rewards"] == {"reward": 1.0}
    replay = text("replay")
    lines = [line for line in replay.splitlines() if line.startswith("    ")]
    assert replay.startswith("row 0: reward ") and "row 1: reward " in replay
    assert lines[0].count("░") == 8 and "░" not in lines[-1]


@pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None or "TRACKIO_DIR" not in os.environ,
    reason="trackio is not installed, or TRACKIO_DIR, read when it is imported, names no folder for its files",
)
@pytest.mark.filterwarnings("ignore")
def test_trackio_has_facts_and_replays(make_trainer: Any) -> None:
    import trackio

    given = {"report_to": "trackio", "log_completions": True, "log_replays": 1, "project": "tried", "run_name": "one"}
    make_trainer(max_steps=2, **given).train()
    run = trackio.Api().runs("tried")[0]
    assert run.name == "one" and run.config["rl4dlm/trainer"] == "RecordingTrainer"
    assert list(Path(os.environ["TRACKIO_DIR"]).rglob("*.html"))
