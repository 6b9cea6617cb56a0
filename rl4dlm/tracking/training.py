"""Replays of a training run: the first rows of each batch whose completions are logged.

Owns where the pages are and when they are written. The table of completions is TRL's; it gets a column of links.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl4dlm.rollout.rollout import Rollout
from rl4dlm.tracking.page import write_page
from rl4dlm.tracking.replay import make_replay


class TrainingReplays:
    """Pages `<output_dir>/replays/step_<n>.html`, n the step that a batch was generated for.

    A batch is held until its completions are logged, so that other batches cost nothing.

    Args:
        output_dir: of the run. rows: that a batch shows at most; 0 for none.
    """

    def __init__(self, output_dir: str | os.PathLike[str], rows: int) -> None:
        self.output_dir, self.rows = Path(output_dir), rows
        self._held: tuple[Rollout, Any, Mapping[int, Mapping[str, str]], int] | None = None

    def links(self, count: int, step: int) -> list[str | None]:
        """For each row of a batch where its replay will be, relative to `output_dir`; None where it has none."""
        return [f"{_page(step)}#row-{row}" if row < self.rows else None for row in range(count)]

    def hold(self, rollout: Rollout, tokenizer: Any, step: int, rewards: list[float]) -> None:
        """Remembers a batch, in place of the one before."""
        notes = {row: {"reward": f"{reward:.4g}"} for row, reward in enumerate(rewards)}
        self._held = (rollout, tokenizer, notes, step)

    def write(self) -> None:
        """Writes the page of the batch that is held, if there is one."""
        if self._held is None:
            return
        rollout, tokenizer, notes, step = self._held
        rows = range(min(self.rows, len(rollout)))
        write_page(self.output_dir / _page(step), make_replay(rollout, tokenizer, rows=rows, notes=notes))
        self._held = None


def _page(step: int) -> str:
    return f"replays/step_{step:05d}.html"
