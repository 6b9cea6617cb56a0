"""Trains a denoiser with SPG (arXiv 2510.09541).

    accelerate launch trainers/spg.py --config configs/spg/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `SPGConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import SPGTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> SPGTrainer:
    return run(SPGTrainer, argv)


if __name__ == "__main__":
    start(main)
