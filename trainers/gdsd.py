"""Trains a denoiser with GDSD (arXiv 2605.29398).

    accelerate launch trainers/gdsd.py --config configs/gdsd/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `GDSDConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import GDSDTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> GDSDTrainer:
    return run(GDSDTrainer, argv)


if __name__ == "__main__":
    start(main)
