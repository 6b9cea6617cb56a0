"""Long runs keep their memory and their files: 300 training steps, 1,000 calls of the engine (slow)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from rl4dlm import DecodingConfig, RolloutEngine, attach_scoring, tiny_llada

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
    pytest.mark.timeout(1200),
]


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Measured(TrainerCallback):
    """Resident memory and open files after some steps."""

    def __init__(self, every: int) -> None:
        self.every, self.seen = every, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.seen.append((resident(), open_files()))


def flat(seen: list[tuple[int, int]]) -> None:
    """The second half is as the first, but for 3 % of memory."""
    middle = seen[len(seen) // 2]
    assert seen[-1][0] <= 1.03 * middle[0], [memory for memory, _ in seen]
    assert seen[-1][1] <= middle[1], [files for _, files in seen]


def test_300_steps_of_training(make_trainer: Callable[..., Any]) -> None:
    measured = Measured(every=25)
    make_trainer(max_steps=300, log_completions=True, log_replays=1, log_total_limit=3, callbacks=[measured]).train()
    flat(measured.seen)


def test_1000_calls_of_the_engine() -> None:
    engine = RolloutEngine(attach_scoring(tiny_llada()))
    config = DecodingConfig(canvas_length=8, steps=4, cache="prefix", temperature=1.0)
    seen = []
    for call in range(1000):
        engine.generate([[5, 6, 7], [8]], config, num_generations=2, seed=call)
        if call % 100 == 99:
            seen.append((resident(), open_files()))
    flat(seen)
