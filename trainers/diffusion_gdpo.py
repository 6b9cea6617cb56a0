"""Trains a denoiser with diffusion GDPO (arXiv 2510.08554).

    accelerate launch trainers/diffusion_gdpo.py --config configs/diffusion_gdpo/few_clue_sudoku_tiny.yaml --beta 0.01

Flags override the YAML file. The settings are those of `RewardArguments`, `DiffusionGDPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import DiffusionGDPOTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> DiffusionGDPOTrainer:
    return run(DiffusionGDPOTrainer, argv)


if __name__ == "__main__":
    start(main)
