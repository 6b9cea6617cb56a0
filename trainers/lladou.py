"""Trains a denoiser and the order it unmasks in with LLaDOU (arXiv 2505.10446).

    accelerate launch trainers/lladou.py --config configs/lladou/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `LLaDOUConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import LLaDOUTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> LLaDOUTrainer:
    return run(LLaDOUTrainer, argv)


if __name__ == "__main__":
    start(main)
