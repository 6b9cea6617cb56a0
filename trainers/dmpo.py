"""Trains a denoiser with DMPO (arXiv 2510.08233).

    accelerate launch trainers/dmpo.py --config configs/dmpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `DMPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import DMPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> DMPOTrainer:
    return run(DMPOTrainer, argv)


if __name__ == "__main__":
    start(main)
