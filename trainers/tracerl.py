"""Trains a denoiser with TraceRL (arXiv 2509.06949).

    accelerate launch trainers/tracerl.py --config configs/tracerl/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `TraceRLConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import TraceRLTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> TraceRLTrainer:
    return run(TraceRLTrainer, argv)


if __name__ == "__main__":
    start(main)
