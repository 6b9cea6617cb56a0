"""Trains a denoiser with diffu-GRPO (d1, arXiv 2504.12216).

    accelerate launch trainers/diffu_grpo.py --config configs/diffu_grpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `DiffuGRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import DiffuGRPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> DiffuGRPOTrainer:
    return run(DiffuGRPOTrainer, argv)


if __name__ == "__main__":
    start(main)
