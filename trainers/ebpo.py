"""Trains a denoiser with EBPO (LLaDA2.1, arXiv 2602.08676).

    accelerate launch trainers/ebpo.py --config configs/ebpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `EBPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import EBPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> EBPOTrainer:
    return run(EBPOTrainer, argv)


if __name__ == "__main__":
    start(main)
