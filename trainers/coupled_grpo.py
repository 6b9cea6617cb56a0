"""Trains a denoiser with coupled-GRPO (DiffuCoder, arXiv 2506.20639).

    accelerate launch trainers/coupled_grpo.py --config configs/coupled_grpo/few_clue_sudoku_tiny.yaml --beta 0.01

Flags override the YAML file. The settings are those of `RewardArguments`, `CoupledGRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import CoupledGRPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> CoupledGRPOTrainer:
    return run(CoupledGRPOTrainer, argv)


if __name__ == "__main__":
    start(main)
