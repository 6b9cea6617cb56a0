"""Trains a denoiser with StableDRL (arXiv 2603.06743).

    accelerate launch trainers/stabledrl.py --config configs/stabledrl/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `StableDRLConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import StableDRLTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> StableDRLTrainer:
    return run(StableDRLTrainer, argv)


if __name__ == "__main__":
    start(main)
