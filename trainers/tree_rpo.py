"""Trains a denoiser with d-TreeRPO (arXiv 2512.09675).

    accelerate launch trainers/tree_rpo.py --config configs/tree_rpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `TreeRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import TreeRPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> TreeRPOTrainer:
    return run(TreeRPOTrainer, argv)


if __name__ == "__main__":
    start(main)
