"""Programs on a small scale: a denoiser trained from nothing on `code_mini`, then by RL on what its programs do.

    python benchmarks/code_mini.py make      # the checkpoint: supervised, worked programs, several for each prompt
    python benchmarks/code_mini.py train     # RL from it on three seeds, and with rewards that know nothing
    python benchmarks/code_mini.py report    # the table of docs/evidence.md, from the results

leave `benchmarks/proving_ground/checkpoints/code`, weights in bfloat16, and `benchmarks/results/code_mini.json`. The
model writes a right program for most prompts one token at a time, and for fewer when it writes several at once: a
prompt has right programs of different lengths, and tokens that are written at the same time do not know of each other.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer, load_task, save_denoiser, tiny_llada  # noqa: E402

CHECKPOINT = ROOT / "benchmarks" / "proving_ground" / "checkpoints" / "code"
CANVAS, BLOCK = 40, 8
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.05,
    "rope_theta": 100.0,
}
TAUGHT: dict[str, Any] = {"seed": 1, "size": 20_000}
TOKEN = r"\n    |\d|'[abc]?'| ?[A-Za-z]+| ?[^\sA-Za-z0-9']|[\s\S]"
"""A token of descriptions and programs: a word or a sign with its space before it, a digit, a quoted letter, a new line."""


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


def make(output: Path, steps: int, learning_rate: float) -> None:
    """Masked supervised training from nothing, every program padded with end tokens to the canvas."""
    tokenizer = small_tokenizer()
    model = tiny_llada(vocab_size=len(tokenizer), **SIZES)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    rows = load_task("code_mini", **TAUGHT).rows("train")
    examples = Dataset.from_list([{"prompt": row["prompt"], "completion": row["solution"]} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        save_denoiser(model, Path(folder) / "start", tokenizer)
        config = DiffusionSFTConfig(
            output_dir=str(Path(folder) / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=64,
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
            seed=0,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make")
    command.add_argument("--output", type=Path, default=CHECKPOINT)
    command.add_argument("--steps", type=int, default=3000)
    command.add_argument("--learning-rate", type=float, default=3e-3)
    options = vars(parser.parse_args())
    {"make": make}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
