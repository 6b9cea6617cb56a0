"""Trains a denoiser with AGRPO (arXiv 2510.04019).

    accelerate launch trainers/agrpo.py --config configs/agrpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `AGRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import AGRPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> AGRPOTrainer:
    return run(AGRPOTrainer, argv)


if __name__ == "__main__":
    start(main)
