"""Programs on a small scale: a denoiser trained from nothing on `code_mini`, then by RL on what its programs do.

    python benchmarks/code_mini.py make      # the checkpoint: supervised, worked programs, several for each prompt
    python benchmarks/code_mini.py train     # RL from it on three seeds, and with rewards that know nothing
    python benchmarks/code_mini.py report    # the table of docs/evidence.md, from the results

leave `benchmarks/proving_ground/checkpoints/code` (carried; made in two parts, 1,000 steps on a canvas of 40, then
`make --start` for 2,000 with seed 1 on one of 32: eight minutes of one core), weights in bfloat16, and
`benchmarks/results/code_mini.json`; runs that are there are not made again. A prompt has right programs of different
lengths, and tokens written at the same time do not know of each other, so a model writes fewer right ones the more
tokens it writes at once.

Models are measured on test rows: `solved`, greedily, at 1, 2, 4 and 8 tokens per step (pass@1 of the most probable
program), and `pass@k` from 8 programs drawn at the speed and temperature of training, for k of 1 and 8.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rl4dlm  # noqa: E402
from benchmarks.proving_ground.training import RandomReward  # noqa: E402
from rl4dlm import (  # noqa: E402
    DecodingConfig,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    load_denoiser,
    load_reward,
    load_task,
    load_tokenizer,
    save_denoiser,
    tiny_llada,
)
from rl4dlm.evaluation import evaluate, machine, versions  # noqa: E402
from rl4dlm.files import write_text  # noqa: E402

CHECKPOINT = ROOT / "benchmarks" / "proving_ground" / "checkpoints" / "code"
RESULTS = ROOT / "benchmarks" / "results" / "code_mini.json"
CANVAS, BLOCK = 32, 8
SPEEDS = (1, 2, 4, 8)
"""Tokens per step that all are measured with."""
TRAINED = 4
"""Tokens per step that all train with."""
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.05,
    "rope_theta": 100.0,
}
TAUGHT: dict[str, Any] = {"seed": 1, "size": 20_000}
TRAINED_ON: dict[str, Any] = {"kinds": ["text"]}
"""What RL is about: the functions of texts. The digits of the others a model of this size has not learnt to copy."""
TOKEN = r"\n    |\d|'[abc]?'| ?[A-Za-z]+| ?[^\sA-Za-z0-9']|[\s\S]"
"""A token of prompts and programs: a word or a sign with its space before it, a digit, a quoted letter, an indent."""
SAMPLES = 8
COMMON: dict[str, Any] = {
    "num_generations": 8,
    "num_iterations": 1,
    "temperature": 1.0,
    "max_completion_length": CANVAS,
    "block_length": BLOCK,
    "denoising_steps": CANVAS // TRAINED,
    "beta": 0.0,
    "scale_rewards": "group",
    "learning_rate": 4e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
}
"""What all trainings share: each batch of completions is used once, rates rise and then fall to zero."""
LINES: dict[str, tuple[str, dict[str, Any], str]] = {
    "diffu_grpo": ("DiffuGRPOTrainer", {"p_mask_prompt": 0.0}, "code"),
    "random_reward": ("DiffuGRPOTrainer", {"p_mask_prompt": 0.0}, "random"),
}
"""What is trained: trainer, its settings, and the reward."""
TITLES = {"diffu_grpo": "diffu-GRPO, reward `code`", "random_reward": "diffu-GRPO, random rewards"}
BATCH = 64


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word and sign of the task. Special tokens have the ids that the tiny models take for granted."""
    rows = load_task("code_mini", **TAUGHT).rows("train")
    words = sorted({word for row in rows for word in re.findall(TOKEN, row["prompt"] + row["solution"])})
    vocabulary = ["<pad>", "<eos>", "<mask>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make(output: Path, start: Path | None, steps: int, learning_rate: float, seed: int) -> None:
    """Masked supervised training, of nothing or of a model, every program padded with end tokens to the canvas."""
    tokenizer = small_tokenizer()
    model = tiny_llada(vocab_size=len(tokenizer), **SIZES) if start is None else load_denoiser(start)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    rows = load_task("code_mini", **TAUGHT).rows("train")
    # Every function has a program that fits; the longest ones are not taught.
    short = [row for row in rows if len(tokenizer(row["solution"]).input_ids) < CANVAS]
    examples = Dataset.from_list([{"prompt": row["prompt"], "completion": row["solution"]} for row in short])
    with tempfile.TemporaryDirectory() as folder:
        save_denoiser(model, Path(folder) / "start", tokenizer)
        config = DiffusionSFTConfig(
            output_dir=str(Path(folder) / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            adam_beta2=0.99,
            weight_decay=0.01,
            max_length=None,
            max_completion_length=CANVAS,
            eos_padding="canvas",
            noise_floor=0.03,
            loss_weight="none",
            seed=seed,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            bf16=False,
            activation_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = DiffusionSFTTrainer(
            str(Path(folder) / "start"), args=config, train_dataset=examples, processing_class=tokenizer
        )
        trainer.train()
        save_denoiser(trainer.model.to(torch.bfloat16), output, tokenizer)
    print(json.dumps(measured(load_denoiser(output), load_tokenizer(output), "validation", 48)), flush=True)


def train(checkpoint: Path, results: Path, seeds: Sequence[int], batches: int, rows: int) -> None:
    """Measures the checkpoint, and trains it on each seed with each line of `LINES`."""
    found: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {"runs": {}}
    tokenizer = load_tokenizer(checkpoint)
    if "before" not in found:
        model = load_denoiser(checkpoint)
        found["parameters"] = sum(p.numel() for p in model.parameters())
        found |= {"task": TRAINED_ON, "settings": COMMON, "lines": {name: line[1:] for name, line in LINES.items()}}
        found |= {"batches": batches, "completions": BATCH, "machine": machine(), "versions": versions()}
        found["before"] = measured(model, tokenizer, "test", rows)
        write(results, found)
    for seed in seeds:
        for name, (trainer, settings, reward) in LINES.items():
            key = f"{name}-{seed}"
            if key in found["runs"]:
                continue
            function = RandomReward(seed) if reward == "random" else load_reward(reward)
            model, seconds, rewards = trained(checkpoint, tokenizer, trainer, settings, function, seed, batches)
            found["runs"][key] = {
                "line": name,
                "seed": seed,
                "seconds": seconds,
                "reward": rewards,
                "after": measured(model, load_tokenizer(checkpoint), "test", rows),
            }
            write(results, found)
            print(key, json.dumps(found["runs"][key]), flush=True)


def trained(
    checkpoint: Path,
    tokenizer: Any,
    trainer: str,
    settings: Mapping[str, Any],
    reward: Any,
    seed: int,
    batches: int,
) -> tuple[Any, float, list[float]]:
    """The checkpoint after so many batches; the seconds that took, and mean rewards on the way."""
    trainer_class = getattr(rl4dlm, trainer)
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_class.config_class(
            output_dir=folder,
            seed=seed,
            max_steps=batches,
            per_device_train_batch_size=BATCH,
            logging_steps=max(batches // 6, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            activation_checkpointing=False,
            **COMMON,
            **settings,
        )
        # Rows that the model was not taught with.
        data = load_task("code_mini", **TRAINED_ON, seed=2 + seed, size=BATCH // 8 * batches).dataset("train")
        run = trainer_class(
            load_denoiser(checkpoint),
            reward_funcs=reward,
            args=args,
            train_dataset=data.select_columns(["prompt", "problem"]),
            processing_class=tokenizer,
        )
        start = time.perf_counter()
        run.train()
        seconds = round(time.perf_counter() - start, 1)
        rewards = [round(float(entry["reward"]), 4) for entry in run.state.log_history if "reward" in entry]
        return run.model, seconds, rewards


def measured(model: Any, tokenizer: Any, split: str, rows: int) -> dict[str, Any]:
    """`solved` by tokens per step, and pass@1 and pass@8 at the speed of training."""
    task = load_task("code_mini", **TRAINED_ON, size=rows)
    shared: dict[str, Any] = {"canvas_length": CANVAS, "block_length": BLOCK}
    greedy = {speed: DecodingConfig(steps=CANVAS // speed, **shared) for speed in SPEEDS}
    drawn = {"drawn": DecodingConfig(steps=CANVAS // TRAINED, temperature=1.0, **shared)}
    model.eval()
    with torch.no_grad():
        solved = evaluate(model, tokenizer, task, decodings=greedy, split=split).solve_rates
        some = evaluate(model, tokenizer, task, decodings=drawn, split=split, num_samples=SAMPLES, pass_at=(1, SAMPLES))
    estimates = some.measurements["drawn"].pass_at
    return {
        "rows": rows,
        "solved": {speed: round(rate, 4) for speed, rate in solved.items()},
        "pass_at": {k: round(found.rate, 4) for k, found in estimates.items() if found is not None},
    }


def write(path: Path, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")


def table(found: Mapping[str, Any]) -> str:
    """Solve rates by tokens per step and pass@k: before, and after as the mean over seeds and their range."""
    columns = [("solved", str(speed)) for speed in SPEEDS] + [("pass_at", "1"), ("pass_at", str(SAMPLES))]
    lines = [
        "| | " + " | ".join([*(f"{speed} per step" for speed in SPEEDS), "pass@1", f"pass@{SAMPLES}"]) + " | seeds |",
        "|---|" + "---:|" * (len(columns) + 1),
        "| before | " + " | ".join(f"{found['before'][group][key]:.3f}" for group, key in columns) + " | |",
    ]
    for name, title in TITLES.items():
        runs = [run for run in found["runs"].values() if run["line"] == name]
        cells = []
        for group, key in columns:
            rates = [run["after"][group][key] for run in runs]
            cells.append(f"{fmean(rates):.3f} [{min(rates):.3f}, {max(rates):.3f}]")
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {len(runs)} |")
    return "\n".join(lines) + "\n"


def report(results: Path) -> None:
    """Prints the table."""
    print(table(json.loads(results.read_text())), end="")


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make")
    command.add_argument("--output", type=Path, default=CHECKPOINT)
    command.add_argument("--start", type=Path, help="go on from a model")
    command.add_argument("--steps", type=int, default=1000)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--learning-rate", type=float, default=3e-3)
    command = commands.add_parser("train")
    command.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    command.add_argument("--results", type=Path, default=RESULTS)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--batches", type=int, default=60, help="of 64 completions, an optimizer step each")
    command.add_argument("--rows", type=int, default=56, help="of the test split")
    command = commands.add_parser("report")
    command.add_argument("--results", type=Path, default=RESULTS)
    options = vars(parser.parse_args())
    disable_progress_bar()
    torch.set_num_threads(1)
    {"make": make, "train": train, "report": report}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
