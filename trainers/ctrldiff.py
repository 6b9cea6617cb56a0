"""Trains CtrlDiff's policy of block sizes (arXiv 2505.14455) beside a denoiser that stays as it is.

    accelerate launch trainers/ctrldiff.py --config configs/ctrldiff/few_clue_sudoku_tiny.yaml --speed_alpha 2

Flags override the YAML file. The settings are those of `RewardArguments`, `CtrlDiffConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import CtrlDiffTrainer
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> CtrlDiffTrainer:
    return run(CtrlDiffTrainer, argv)


if __name__ == "__main__":
    start(main)
