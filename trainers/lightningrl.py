"""Trains a denoiser with LightningRL (arXiv 2603.13319).

    accelerate launch trainers/lightningrl.py --config configs/lightningrl/few_clue_sudoku_tiny.yaml --nll_weight 0

Flags override the YAML file. The settings are those of `RewardArguments`, `LightningRLConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import LightningRLTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> LightningRLTrainer:
    return run(LightningRLTrainer, argv)


if __name__ == "__main__":
    start(main)
