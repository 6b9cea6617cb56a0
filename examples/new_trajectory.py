"""A trajectory algorithm of your own in 30 lines: recorded steps, and what each of them is worth.

The engine records when each token was written and how unsure the model was of it. Here every step is scored in the
state that it was taken in, with one ratio per step, and the advantage of a completion counts at a step as much as the
model was unsure there, in nats: where there was nothing to decide there is nothing to learn. That is known before the
step is taken, so that any baseline is still free.

    python examples/new_trajectory.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from make_demo_checkpoint import CELLS, demo_task
from torch import Tensor
from transformers import AutoTokenizer

from rl4dlm import DecodingConfig, Rollout, TrajectoryConfig, TrajectoryTrainer, evaluate, load_denoiser, load_rewards
from rl4dlm.likelihood.steps import Steps

# --- the algorithm: which steps are scored, what has a ratio, what a step is worth ------------------------------------


@dataclass
class DecisionConfig(TrajectoryConfig):
    """All steps, one ratio each. `steps`, `clip`, `old_policy` and the rest of the core come with it."""

    ratio_unit: str = field(default="step", metadata={"help": "What has a policy ratio of its own."})
    aggregation: str = field(default="row_sums", metadata={"help": "How losses of tokens become one number."})


class DecisionTrainer(TrajectoryTrainer):
    """GRPO per step, in proportion to how unsure the model was."""

    config_class = DecisionConfig

    def step_rewards(self, rollout: Rollout, steps: Steps) -> Tensor:  # [B, K], of the state before each step
        step, entropy = rollout.trace.commit_step[:, None], rollout.trace.entropy[:, None]  # [B, 1, L]
        written = (step >= steps.first[..., None]) & (step <= steps.last[..., None])  # [B, K, L]
        return (written * entropy).sum(-1) / written.sum(-1).clamp(min=1)

    def step_advantages(self, rewards: Tensor, step_rewards: Tensor, batch: dict[str, Any]) -> Tensor:  # [N, G, K]
        return (rewards - rewards.nanmean(-1, keepdim=True))[..., None] * step_rewards


# --- what it is worth -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Trains the demo's model for a moment; so short a run need not show a gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--puzzles", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("outputs/new_trajectory"))
    options = parser.parse_args(argv)
    checkpoint = Path(__file__).parent / "demo_checkpoint"
    model, tokenizer = load_denoiser(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    args = DecisionConfig(
        **{"output_dir": str(options.output), "max_steps": options.steps, "report_to": "none", "save_strategy": "no"},
        **{"max_completion_length": CELLS, "denoising_steps": 4, "num_generations": 8, "temperature": 1.0, "beta": 0.0},
        **{"per_device_train_batch_size": 64, "learning_rate": 2e-4, "bf16": False, "activation_checkpointing": False},
    )
    rewards, puzzles = load_rewards(["few_clue_sudoku:units"]), demo_task().dataset("train").remove_columns("solution")
    trainer = DecisionTrainer(model, rewards, args, puzzles, processing_class=tokenizer)
    decodings = {"4 steps": DecodingConfig(canvas_length=CELLS, steps=4)}
    for when in ("before", "after"):
        if when == "after":
            trainer.train()
        found = evaluate(model, tokenizer, demo_task(), decodings=decodings, split="validation", limit=options.puzzles)
        print(f"{when}: solved in 4 steps {found.measurements['4 steps'].solve_rate:.3f} of {options.puzzles} puzzles")


if __name__ == "__main__":
    main()
