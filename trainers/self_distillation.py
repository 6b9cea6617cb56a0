"""Makes a denoiser its own teacher (SDTT, arXiv 2410.21035, and others).

    accelerate launch trainers/self_distillation.py --config configs/self_distillation/few_clue_sudoku_tiny.yaml

Flags override the YAML file. The settings are those of `TeachingArguments`, `SelfDistillationConfig` and
`trl.ModelConfig`. Rewards are needed for `rewarded_from` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl4dlm import SelfDistillationTrainer
from rl4dlm.cli.arguments import TeachingArguments
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import run


def main(argv: Sequence[str] | None = None) -> SelfDistillationTrainer:
    return run(SelfDistillationTrainer, argv, TeachingArguments)


if __name__ == "__main__":
    start(main)
