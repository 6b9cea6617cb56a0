"""Writes s1K (arXiv 2501.19393) as examples for masked SFT, in the form that d1 (arXiv 2504.12216) trains on.

    python examples/prepare_s1k.py data/s1k
    accelerate launch trainers/sft.py --config configs/sft/s1k_llada-8b.yaml

The question gets d1's prompt; the first reasoning trace and the final answer become `<reasoning>` and `<answer>`. One
percent of the examples is the test split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset

from rl4dlm.tasks import prompts

HELD_OUT = 0.01


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write train.jsonl and test.jsonl")
    parser.add_argument("--source", default="simplescaling/s1K", help="hub id, or a .jsonl file with the same columns")
    parser.add_argument("--seed", type=int, default=42, help="of the split")
    arguments = parser.parse_args(argv)

    if arguments.source.endswith(".jsonl"):
        rows = load_dataset("json", data_files=arguments.source, split="train")
    else:
        rows = load_dataset(arguments.source, split="train")
    splits = Dataset.from_list([example(row) for row in rows]).train_test_split(HELD_OUT, seed=arguments.seed)
    for name, split in splits.items():
        split.to_json(arguments.folder / f"{name}.jsonl")
        print(f"{arguments.folder / name}.jsonl: {len(split)} examples")


def example(row: dict) -> dict:
    answer = f"<reasoning>{row['thinking_trajectories'][0]}</reasoning>\n<answer>{row['attempt']}</answer>"
    return {
        "prompt": prompts.gsm8k(row["question"], evaluation=False),
        "completion": [{"role": "assistant", "content": answer}],
    }


if __name__ == "__main__":
    main()
