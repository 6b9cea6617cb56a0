"""Trains a denoiser with JustGRPO (arXiv 2601.15165).

    accelerate launch trainers/justgrpo.py --config configs/justgrpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `JustGRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import JustGRPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> JustGRPOTrainer:
    return run(JustGRPOTrainer, argv)


if __name__ == "__main__":
    start(main)
