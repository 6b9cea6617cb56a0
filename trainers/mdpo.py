"""Trains a denoiser with MDPO (arXiv 2508.13148).

    accelerate launch trainers/mdpo.py --config configs/mdpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `MDPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import MDPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> MDPOTrainer:
    return run(MDPOTrainer, argv)


if __name__ == "__main__":
    start(main)
