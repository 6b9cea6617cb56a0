"""Replays of a training run: the first rows of each batch whose completions are logged.

Owns where the pages are, when they are written, and how many pages and tables are kept. The table of completions is
TRL's; it gets a column of links. What cannot be written is said once and does not end training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl4dlm.rollout.rollout import Rollout
from rl4dlm.tracking.page import write_page
from rl4dlm.tracking.replay import Replay, make_replay

logger = logging.getLogger(__name__)


class TrainingReplays:
    """Pages `<output_dir>/replays/step_<n>.html`, n the step that a batch was generated for.

    A batch is held until its completions are logged, so that other batches cost nothing.

    Args:
        output_dir: of the run. rows: that a batch shows at most; 0 for none.
        keep: pages, and tables of completions, that are kept; None: all.
    """

    def __init__(self, output_dir: str | os.PathLike[str], rows: int, keep: int | None = None) -> None:
        self.output_dir, self.rows, self.keep = Path(output_dir), rows, keep
        self.shown: Callable[[Path, Replay, int], None] | None = None
        """Is given each page that was written, its replay, and the step."""
        self._warned = False
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
        self._held = None
        rows = range(min(self.rows, len(rollout)))
        with self.going_on():
            replay = make_replay(rollout, tokenizer, rows=rows, notes=notes)
            write_page(self.output_dir / _page(step), replay)
            if self.shown is not None:
                self.shown(self.output_dir / _page(step), replay, step)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Training goes on where a file of the log cannot be written, as on a full disk; the first error is said."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "a part of the log in %s was not written, and training goes on: %s", self.output_dir, error
                )
            self._warned = True

    def prune(self) -> None:
        """Removes all but the newest pages and tables of completions."""
        if self.keep is None:
            return
        with self.going_on():
            for folder, pattern in (("replays", "step_*.html"), ("completions", "completions_*.parquet")):
                files = sorted((self.output_dir / folder).glob(pattern), key=lambda path: (len(path.name), path.name))
                for path in files[: -self.keep]:
                    path.unlink(missing_ok=True)


def _page(step: int) -> str:
    return f"replays/step_{step:05d}.html"
