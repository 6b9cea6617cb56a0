"""An algorithm of your own in 40 lines: an estimator, a loss, and a trainer that joins them.

A model that decodes in n steps writes L / n tokens at once, without knowing of each other. So this estimator scores a
completion as if written so: it draws an order, splits it into n steps, and scores the tokens of each step given those
of the steps before. n = 1 is the mean field of diffu-GRPO, n = L the evidence lower bound. The loss is REINFORCE.

    python examples/new_algorithm.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make_demo_checkpoint import CELLS, demo_task
from torch import Tensor
from transformers import AutoTokenizer

from rl4dlm import DecodingConfig, DiffusionPolicyTrainer, evaluate, load_denoiser, load_rewards
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, as_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.training.losses import weighted_likelihood
from rl4dlm.training.ratio_free import RatioFreeConfig

# --- the algorithm: how completions are scored, what they are worth, what is minimised --------------------------------


@dataclass(frozen=True)
class Stepwise(Estimator):
    """Every token is scored once, given the tokens of earlier steps in a random order of `steps` steps."""

    steps: int = 4

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        uniform = RowNoise(rows, seed, iteration).per_token("order", 1)[:, 0]  # [B, L], the same whatever the batch
        place = uniform.masked_fill(~rows.valid, torch.inf).argsort(-1).argsort(-1)
        step = place * self.steps // rows.valid.sum(-1, keepdim=True).clamp(min=1)  # [B, L]
        view = torch.arange(self.steps, device=step.device)[:, None]
        scored = (step[:, None] == view) & rows.valid[:, None]  # [B, K, L]
        return as_views(rows, step[:, None] >= view, scored.double(), self.scope)


@dataclass
class StepwiseConfig(RatioFreeConfig):
    """Settings of the algorithm; those of decoding and of `trl.GRPOConfig` come with it, but not of ratios and KL."""

    score_steps: int = field(default=4, metadata={"help": "Steps that a completion is scored in."})


class StepwiseTrainer(DiffusionPolicyTrainer):
    """REINFORCE with stepwise scores."""

    config_class = StepwiseConfig
    uses_old_policy = False  # there is no ratio, so the policy before the step is not scored

    def build_estimator(self) -> Estimator:
        return Stepwise(self.args.score_steps)

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:  # [N, G] of all processes
        return rewards - (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)

    def loss(self, scores: Any, batch: dict[str, Any]) -> Tensor:
        sequence = (scores.log_probs * batch["completion_mask"]).sum(-1)  # [B]
        return self.mean_over_rows(weighted_likelihood(sequence, batch["advantages"]))


# --- what it is worth -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Trains the demo's model for a moment; so short a run need not show a gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--puzzles", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("outputs/new_algorithm"))
    options = parser.parse_args(argv)
    checkpoint = Path(__file__).parent / "demo_checkpoint"
    model, tokenizer = load_denoiser(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    args = StepwiseConfig(
        **{"output_dir": str(options.output), "max_steps": options.steps, "report_to": "none", "save_strategy": "no"},
        **{"max_completion_length": CELLS, "denoising_steps": 4, "num_generations": 8, "temperature": 1.0},
        **{"per_device_train_batch_size": 64, "learning_rate": 2e-4, "bf16": False, "activation_checkpointing": False},
    )
    rewards, puzzles = load_rewards(["few_clue_sudoku:units"]), demo_task().dataset("train").remove_columns("solution")
    trainer = StepwiseTrainer(model, rewards, args, puzzles, processing_class=tokenizer)
    decodings = {"4 steps": DecodingConfig(canvas_length=CELLS, steps=4)}
    for when in ("before", "after"):
        if when == "after":
            trainer.train()
        found = evaluate(model, tokenizer, demo_task(), decodings=decodings, split="validation", limit=options.puzzles)
        print(f"{when}: solved in 4 steps {found.measurements['4 steps'].solve_rate:.3f} of {options.puzzles} puzzles")


if __name__ == "__main__":
    main()
