"""Trains a denoiser with BGPO (arXiv 2510.11683).

    accelerate launch trainers/bgpo.py --config configs/bgpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `BGPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import BGPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> BGPOTrainer:
    return run(BGPOTrainer, argv)


if __name__ == "__main__":
    start(main)
