"""Trains a denoiser with CJ-GRPO (arXiv 2509.23924).

    accelerate launch trainers/cj_grpo.py --config configs/cj_grpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `CJGRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import CJGRPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> CJGRPOTrainer:
    return run(CJGRPOTrainer, argv)


if __name__ == "__main__":
    start(main)
