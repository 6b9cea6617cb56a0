"""Trains a denoiser with Dream-Coder's RL (arXiv 2509.01142).

    accelerate launch trainers/dream_coder_rl.py --config configs/dream_coder_rl/few_clue_sudoku_tiny.yaml

Flags override the YAML file. The settings are those of `RewardArguments`, `DreamCoderRLConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import DreamCoderRLTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> DreamCoderRLTrainer:
    return run(DreamCoderRLTrainer, argv)


if __name__ == "__main__":
    start(main)
