"""Trains a denoiser with UniGRPO (MMaDA, arXiv 2505.15809).

    accelerate launch trainers/unigrpo.py --config configs/unigrpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `UniGRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import UniGRPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> UniGRPOTrainer:
    return run(UniGRPOTrainer, argv)


if __name__ == "__main__":
    start(main)
