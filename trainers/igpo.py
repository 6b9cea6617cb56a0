"""Trains a denoiser with IGPO (arXiv 2509.10396).

    accelerate launch trainers/igpo.py --config configs/igpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `IGPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import IGPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> IGPOTrainer:
    return run(IGPOTrainer, argv)


if __name__ == "__main__":
    start(main)
