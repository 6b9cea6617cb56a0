"""What experiment trackers hold of a run beside its metrics: what was run, on what, and how completions were written.

Owns the entries `rl4dlm/...` of a run's configuration, the media of a replay, and that a resumed run goes on in the
tracker as the one it was. Metrics and settings are written by transformers' callbacks, tables by TRL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from rl4dlm.tracking.printable import printable
from rl4dlm.tracking.replay import OPEN, Replay, RowReplay

SERVES = ("wandb", "trackio", "tensorboard")
_RUN = "rl4dlm_wandb_run"  # under which a checkpoint keeps the id


@dataclass
class TrackerSettings:
    """Settings of a training that trackers alone read.

    Args:
        run_group, run_tags: of the run in Weights & Biases, which `WANDB_RUN_GROUP` and `WANDB_TAGS` overrule.
    """

    run_group: str | None = field(default=None, metadata={"help": "Group of the run in Weights & Biases."})
    run_tags: list[str] | None = field(default=None, metadata={"help": "Tags of the run in Weights & Biases."})


class Trackers(TrainerCallback):
    """Of a training; comes before the callbacks of transformers, so that it can begin a W&B run.

    Args:
        trainer: whose `callback_handler` says which trackers there are.
        facts: makes the entries of the configuration, once training has begun; values are JSON.
    """

    def __init__(self, trainer: Any, facts: Callable[[], Mapping[str, Any]]) -> None:
        self._handler, self._facts = trainer.callback_handler, facts
        self._wanted = [name for name in SERVES if name in (trainer.args.report_to or ())]
        self._told = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins the W&B run, or goes on with that of the checkpoint, unless there is one already."""
        self._told = not (self._wanted and state.is_world_process_zero)
        if self._told or "wandb" not in self._wanted:
            return
        import wandb

        run = wandb.run
        if run is None:
            kept = state.stateful_callbacks.get(_RUN, {}).get("attributes", {}).get("id")
            chosen: dict[str, Any] = {"id": kept, "resume": "allow"} if kept and not os.getenv("WANDB_RUN_ID") else {}
            if not os.getenv("WANDB_RUN_GROUP"):
                chosen["group"] = args.run_group
            if not os.getenv("WANDB_TAGS"):
                chosen["tags"] = args.run_tags
            run = wandb.init(project=os.getenv("WANDB_PROJECT", "huggingface"), name=args.run_name, **chosen)
        # Where transformers keeps what callbacks have to say, so that it is in checkpoints.
        state.stateful_callbacks[_RUN] = {"args": {}, "attributes": {"id": run.id}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the facts, when every tracker has begun its run."""
        if self._told:
            return
        self._told = True
        facts = {f"rl4dlm/{name}": value for name, value in self._facts().items()}
        if "wandb" in self._wanted:
            import wandb

            wandb.config.update(facts, allow_val_change=True)
        if "trackio" in self._wanted:
            import trackio

            trackio.config.update(facts, allow_val_change=True)
        if (writer := self._tensorboard()) is not None:
            writer.add_text("rl4dlm", f"```json\n{json.dumps(facts, indent=2)}\n```", state.global_step)

    def show(self, page: Path, replay: Replay, step: int) -> None:
        """A replay as media: the page for W&B and trackio, how the canvas was filled as text for TensorBoard.

        Args:
            page: its file.
            step: that the batch was generated for.
        """
        if "wandb" in self._wanted:
            import wandb

            if wandb.run is not None:
                # With the metrics that are logged next, so that it does not count as a step of its own.
                wandb.log({"replay": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}, commit=False)
        if "trackio" in self._wanted:
            import trackio

            trackio.log({"replay": trackio.Html(str(page))})
        if (writer := self._tensorboard()) is not None:
            writer.add_text("replay", "\n\n".join(_as_text(row, replay.texts) for row in replay.rows), step)

    def _tensorboard(self) -> Any:
        if "tensorboard" not in self._wanted:
            return None
        found = (c.tb_writer for c in self._handler.callbacks if isinstance(c, TensorBoardCallback))
        return next(found, None)


def _as_text(row: RowReplay, texts: Mapping[int, str]) -> str:
    """The canvas after each step, a line each, indented so that Markdown takes it as it is."""
    lines = [f"row {row.row}: {', '.join(f'{name} {note}' for name, note in row.notes.items())}", ""]
    for step, slots in enumerate(row.states()):
        canvas = "".join("░" if slot.token == OPEN else texts[slot.token].replace("\n", "↵") for slot in slots)
        lines.append(f"    {step:4d}  {printable(canvas)}")
    return "\n".join(lines)
