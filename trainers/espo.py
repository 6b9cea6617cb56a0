"""Trains a denoiser with ESPO (arXiv 2512.03759).

    accelerate launch trainers/espo.py --config configs/espo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `ESPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import ESPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> ESPOTrainer:
    return run(ESPOTrainer, argv)


if __name__ == "__main__":
    start(main)
