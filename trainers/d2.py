"""Trains a denoiser with d2 (arXiv 2509.21474).

    accelerate launch trainers/d2.py --config configs/d2/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `D2Config` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import D2Trainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> D2Trainer:
    return run(D2Trainer, argv)


if __name__ == "__main__":
    start(main)
