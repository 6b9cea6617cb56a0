"""Trains a denoiser with wd1 (arXiv 2507.08838).

    accelerate launch trainers/wd1.py --config configs/wd1/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `WD1Config` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import WD1Trainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> WD1Trainer:
    return run(WD1Trainer, argv)


if __name__ == "__main__":
    start(main)
