"""From nothing to a model trained with RL, on a CPU in under a minute.

    python examples/quickstart.py

A tiny denoiser learns from examples to complete 4x4 Sudoku grids, of which 8 to 12 cells are given, then practises with
diffu-GRPO to complete them in a single step. This shows how the parts fit together; so short a run gains nothing that
could be told from noise. What RL gains is measured by `make demo`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from rl4dlm import (
    DecodingConfig,
    DiffuGRPOConfig,
    DiffuGRPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    evaluate,
    load_reward,
    load_task,
    tiny_llada,
    tiny_tokenizer,
)

COMMON = {"disable_tqdm": True, "save_strategy": "no", "activation_checkpointing": False, "bf16": False}


class Show(TrainerCallback):
    """Prints one of the logged numbers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in logs:
            print(f"  step {state.global_step:>3} of {state.max_steps}: {self.name} {float(logs[self.name]):.3f}")


def train(trainer, name: str) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Show(name))
    trainer.train()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--sft-steps", type=int, default=250)
    parser.add_argument("--rl-steps", type=int, default=30)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)  # more threads have nothing to share in matrices this small

    # A stock Llama with its causal mask off, a tokenizer with one token per character, and a task with its own checker.
    tokenizer = tiny_tokenizer()
    model = tiny_llada(hidden_size=64, num_hidden_layers=3, initializer_range=0.06, rope_theta=100.0)
    task = load_task("few_clue_sudoku", min_clues=8, max_clues=12, size=4000)
    puzzles = task.dataset("train")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; a puzzle: {puzzles[0]['puzzle']}")

    print("Masked SFT: hide a random share of each answer, predict it.")
    examples = puzzles.rename_column("solution", "completion").select_columns(["prompt", "completion"])
    args = DiffusionSFTConfig(
        output_dir=str(arguments.output / "sft"),
        max_steps=arguments.sft_steps,
        per_device_train_batch_size=64,
        learning_rate=5e-3,
        warmup_steps=30,
        lr_scheduler_type="cosine",
        noise_floor=0.03,
        logging_steps=50,
        **COMMON,
    )
    train(DiffusionSFTTrainer(model, args, examples, processing_class=tokenizer), "loss")

    held_out = load_task("few_clue_sudoku", min_clues=8, max_clues=12, size=300)
    decodings = {steps: DecodingConfig(canvas_length=16, steps=steps) for steps in (1, 4, 16)}
    before = evaluate(model, tokenizer, held_out, decodings=decodings)

    print("diffu-GRPO: complete each puzzle eight times in one step, reward valid grids.")
    args = DiffuGRPOConfig(
        output_dir=str(arguments.output / "rl"),
        max_steps=arguments.rl_steps,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=16,
        denoising_steps=1,
        temperature=1.0,
        num_iterations=1,
        beta=0.0,
        p_mask_prompt=0.0,
        learning_rate=1e-4,
        logging_steps=10,
        **COMMON,
    )
    reward = load_reward("few_clue_sudoku")
    train(DiffuGRPOTrainer(model, reward, args, puzzles, processing_class=tokenizer), "reward")
    after = evaluate(model, tokenizer, held_out, decodings=decodings)

    print("Solved, of 300 puzzles never trained on, most probable token first (in brackets: 95 % interval):")
    for steps in before.measurements:
        rates = [result.measurements[steps].solve_rate for result in (before, after)]
        low, high = after.measurements[steps].interval
        print(f"  {steps:>2} steps: {rates[0]:.2f} before RL, {rates[1]:.2f} [{low:.2f}, {high:.2f}] after")


if __name__ == "__main__":
    main()
