"""Trains a denoiser with EGSPO or EGSPO-SA (arXiv 2603.12554).

    accelerate launch trainers/egspo.py --config configs/egspo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `EGSPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import EGSPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> EGSPOTrainer:
    return run(EGSPOTrainer, argv)


if __name__ == "__main__":
    start(main)
