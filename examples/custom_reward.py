"""A reward of your own: a plain function of the completions, and of the dataset's columns if it wants them.

    python examples/custom_reward.py

The same function serves a script, by its place: `--reward_funcs examples/custom_reward.py:few_different_digits`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset

from rl4dlm import DiffuGRPOConfig, DiffuGRPOTrainer, tiny_llada, tiny_tokenizer


def few_different_digits(
    prompts: list[str], completions: list[str], target: list[int | None], **columns: Any
) -> list[float | None]:
    """1 for as many different digits as the row asks for, less 0.2 for each too many or too few.

    TRL's signature: one reward per completion, `None` where a row cannot be scored. Columns come by name.
    """
    return [
        None if wanted is None else 1 - 0.2 * abs(len({char for char in text if char.isdigit()}) - wanted)
        for text, wanted in zip(completions, target, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/custom_reward"))
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args(argv)

    trainer = DiffuGRPOTrainer(
        tiny_llada(),
        few_different_digits,
        DiffuGRPOConfig(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8,
            denoising_steps=4,
            temperature=1.0,
            num_iterations=2,
            beta=0.0,
            learning_rate=3e-3,
            logging_steps=10,
            activation_checkpointing=False,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["digits: "] * 64, "target": [3] * 64}),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"mean reward: {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last")


if __name__ == "__main__":
    main()
