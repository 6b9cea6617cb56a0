"""Makes the checkpoint that the demo starts from: a small denoiser trained from nothing on few-clue Sudoku.

Masked supervised training on puzzles with 2 to 6 clues, each drawn with one of its many answers; a puzzle that
returns has another answer. The model learns the rules, and solves nearly every puzzle when it writes one cell at a
time; writing four at once it mostly fails, because its guesses do not fit together. That gap is what reinforcement
learning narrows in `demo.py`.

The loss is that of `DiffusionSFTTrainer` (1/t-weighted masked cross-entropy). The loop is written out because noise
levels are stratified within a batch, which that trainer does not do.

    python examples/make_demo_checkpoint.py --output outputs/demo-checkpoint
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import torch

from rl4dlm import DecodingConfig, attach_scoring, load_task, save_denoiser, tiny_llada, tiny_tokenizer
from rl4dlm.evaluation import evaluate
from rl4dlm.tasks import Task, grids
from rl4dlm.tasks.base import split_of

CELLS = 16
BATCH = 128
LEARNING_RATE = 3e-3
LOWEST_LEVEL = 0.03


def demo_task(seed: int = 0) -> Task:
    """The puzzles of the demo: 2 or 3 clues, the fewest, and so the hardest to write several cells of at once."""
    return load_task("few_clue_sudoku", max_clues=3, seed=seed)


def supervised(puzzles: Any, tokenizer: Any) -> Any:
    """Puzzles and solutions as token ids; without an end-of-sequence token, since an answer always has 16 cells."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["solution"]).input_ids
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    return puzzles.map(encode, remove_columns=puzzles.column_names)


def examples(size: int = 130_000) -> list[tuple[str, str]]:
    """Training puzzles with 2 to 6 clues and the answers they were made from; a little more than training draws."""
    rng, found = random.Random(1), []
    while len(found) < size:
        answer, clues = rng.choice(grids.all_grids()), rng.randint(2, 6)
        shown = rng.sample(range(CELLS), clues)
        puzzle = "".join(answer[cell] if cell in shown else "0" for cell in range(CELLS))
        if split_of(puzzle) == "train":
            found.append((puzzle, answer))
    return found


def main() -> None:
    """Trains, saves, and prints the solve rate on validation puzzles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo_checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()

    tokenizer = tiny_tokenizer()
    model = attach_scoring(
        tiny_llada(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            initializer_range=0.06,
            rope_theta=100.0,
            seed=options.seed,
        )
    )
    ids = [tokenizer(f"[{puzzle}]{answer}").input_ids for puzzle, answer in examples()]
    train(model, torch.tensor(ids), tokenizer.mask_token_id, options.steps, options.seed)
    save_denoiser(model, options.output, tokenizer)
    decodings = {steps: DecodingConfig(canvas_length=CELLS, steps=steps) for steps in (1, 2, 4, 8, 16)}
    for task in (load_task("few_clue_sudoku"), demo_task()):
        result = evaluate(model, tokenizer, task, decodings=decodings, split="validation")
        print(task, {steps: round(rate, 3) for steps, rate in result.solve_rates.items()}, flush=True)


def train(model: Any, ids: torch.Tensor, mask_token_id: int, steps: int, seed: int) -> None:
    """Masked cross-entropy of the last 16 tokens of `ids` [N, T], weighted by 1/t at level t."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]  # [B, T]
        strata = (torch.arange(BATCH) + torch.rand(1, generator=generator)) / BATCH
        level = (LOWEST_LEVEL + (1 - LOWEST_LEVEL) * strata)[:, None]  # [B, 1]
        hidden = torch.zeros_like(batch, dtype=torch.bool)
        hidden[:, -CELLS:] = torch.rand(BATCH, CELLS, generator=generator) < level
        scores = model(batch.masked_fill(hidden, mask_token_id), score_positions=hidden, score_targets=batch)
        loss = -(scores.log_probs / level.expand_as(hidden)[hidden]).sum() / (BATCH * CELLS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:5d}   loss {loss.item():.3f}   {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()


if __name__ == "__main__":
    main()
