"""A decoding schedule of your own, measured beside LLaDA's on the puzzles of the demo.

Tokens that are written in the same step do not know of each other, and near ones depend on each other most. So this
schedule writes the most confident candidate, then the most confident one of those far enough away from it, and so on.

    python examples/custom_schedule.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_demo_checkpoint import CELLS, demo_task
from torch import Tensor
from transformers import AutoTokenizer

from rl4dlm import DecodingConfig, load_denoiser
from rl4dlm.evaluation import evaluate
from rl4dlm.rollout.schedules import register
from rl4dlm.rollout.schedules.checks import check_count
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability, top

# --- the schedule: its settings, its rule, its parts ------------------------------------------------------------------


@dataclass(frozen=True)
class SpacedArguments:
    """Settings of `spaced`: slots between two tokens that are written in the same step."""

    distance: int = 6

    def __post_init__(self) -> None:
        check_count(self, "distance", 1)


@register("spaced", SpacedArguments, takes_steps=False)
def spaced(arguments: SpacedArguments, config: Any) -> Schedule:
    """Writes the most confident candidates that are far enough apart."""

    def commit(step: Step, scores: Tensor) -> Tensor:  # from scores [R, W] to the slots that are written now
        chosen, free = torch.zeros_like(step.eligible), step.eligible.clone()
        while bool(free.any()):
            best = top(scores, free, torch.ones_like(step.block))
            place = torch.where(best, step.offsets, 0).sum(-1, keepdim=True)  # [R, 1]
            free &= (step.offsets - place).abs() >= arguments.distance
            chosen |= best
        return chosen

    return Schedule(fixed_blocks(config), probability, commit)


# --- what it is worth -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Prints how many puzzles are solved, and in how many forwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=300)
    parser.add_argument("--distances", type=int, nargs="+", default=[3, 4, 5, 6])
    options = parser.parse_args(argv)
    checkpoint = Path(__file__).parent / "demo_checkpoint"
    model, tokenizer = load_denoiser(checkpoint), AutoTokenizer.from_pretrained(checkpoint)

    common = {"canvas_length": CELLS}
    decodings = {f"low_confidence, {steps} steps": DecodingConfig(**common, steps=steps) for steps in (4, 8)}
    for distance in options.distances:
        arguments = {"distance": distance}
        decodings[f"spaced, {distance} apart"] = DecodingConfig(**common, schedule="spaced", schedule_args=arguments)
    result = evaluate(model, tokenizer, demo_task(), decodings=decodings, split="validation", limit=options.puzzles)

    print(f"{'':26}forwards  solved, of {options.puzzles} puzzles (95 % interval)")
    for name, measured in result.measurements.items():
        low, high = measured.interval
        print(f"{name:26}{measured.nfe:8.1f}  {measured.solve_rate:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
