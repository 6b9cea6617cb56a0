"""Trains an unmasking policy (arXiv 2512.09106) beside a denoiser that stays as it is.

    accelerate launch trainers/bernoulli_unmasking.py \
        --config configs/bernoulli_unmasking/few_clue_sudoku_tiny.yaml --speed_alpha 2

Flags override the YAML file. The settings are those of `RewardArguments`, `BernoulliUnmaskingConfig` and
`trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import BernoulliUnmaskingTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> BernoulliUnmaskingTrainer:
    return run(BernoulliUnmaskingTrainer, argv)


if __name__ == "__main__":
    start(main)
