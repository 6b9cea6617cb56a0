"""Trains a denoiser with DiPO (arXiv 2512.22234).

    accelerate launch trainers/dipo.py --config configs/dipo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `DiPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import DiPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> DiPOTrainer:
    return run(DiPOTrainer, argv)


if __name__ == "__main__":
    start(main)
