"""Makes the small models of the proving ground: three denoisers trained from nothing on two language tasks.

Each has about a million parameters, reads numbers up to 99 and single characters, and learns both tasks at once by
masked supervised training (`DiffusionSFTTrainer`), every completion padded with end tokens to the canvas. They differ
in attention:

    full      LLaDA-like: every token sees every other
    shifted   Dream-like: the same, and the logits of a token are read one position before it
    block     SDAR-like: blocks of 8 see themselves and what is before them

A model knows its tasks when it writes one token at a time, and less of them when it writes several at once.

    python benchmarks/make_models.py --kind full --steps 3000 --output outputs/full-3000
    python benchmarks/make_models.py --kind full --steps 5000 --start outputs/full-3000 --seed 1 --rows 200000 \
        --learning-rate 2e-3
    python benchmarks/make_models.py --kind shifted --steps 2000 --start full --learning-rate 1e-3
    python benchmarks/make_models.py --kind block --steps 2000 --start full --learning-rate 1e-3

leave checkpoints in `benchmarks/proving_ground/checkpoints/`, weights in bfloat16, and print what they solve on
validation rows. The first two take three quarters of an hour on one core; the others go on from these weights, with the
attention that they are to have.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.proving_ground.settings import SPEEDS, TASKS  # noqa: E402
from rl4dlm import (  # noqa: E402
    DecodingConfig,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    DiffusionSpec,
    load_denoiser,
    load_task,
    save_denoiser,
    tiny_llada,
)
from rl4dlm.evaluation import evaluate  # noqa: E402

TAUGHT = ("arithmetic_steps", "countdown_small")
CANVAS, BLOCK = TASKS[TAUGHT[0]].canvas, TASKS[TAUGHT[0]].block
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "initializer_range": 0.05,
    "rope_theta": 100.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "shifted": {"logit_shift": 1},
    "block": {"attention": "block_causal", "block_length": BLOCK},
}
"""By kind, how it differs from a LLaDA."""


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each number up to 99, for `\\boxed{`, and for each other character of the tasks.

    Special tokens have the ids that the tiny models take for granted.
    """
    special = ["<pad>", "<eos>", "<mask>", "<unk>"]
    vocabulary = [*special, *map(str, range(100)), *"+-*/()=,}\n", "\\boxed{"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[1-9]?\d|[\s\S]"), "isolated")
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


def decodings() -> dict[str, DecodingConfig]:
    """Greedy decoding in blocks, by tokens per step."""
    return {
        str(speed): DecodingConfig(canvas_length=CANVAS, steps=CANVAS // speed, block_length=BLOCK) for speed in SPEEDS
    }


def folder_of(kind: str) -> Path:
    """Of a checkpoint."""
    return ROOT / TASKS[TAUGHT[0]].checkpoints[kind]


def supervised(size: int) -> Any:
    """Prompts and worked answers of both tasks."""
    grounds = {name: TASKS[name].taught or TASKS[name].arguments for name in TAUGHT}
    tasks = [load_task(name, **given, seed=1, size=size // len(TAUGHT)) for name, given in grounds.items()]
    rows = [task.dataset("train") for task in tasks]
    columns = [task.select_columns(["prompt", "solution"]).rename_column("solution", "completion") for task in rows]
    return concatenate_datasets(columns)


def main() -> None:
    """Trains, saves, and prints the solve rates on validation rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="full")
    parser.add_argument("--start", help="go on from a model: a kind, or a folder")
    parser.add_argument("--output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rows", type=int, default=100_000, help="examples of both tasks")
    parser.add_argument("--measure-every", type=int, default=1000)
    options = parser.parse_args()
    output = options.output or folder_of(options.kind)

    tokenizer = small_tokenizer()
    if options.start is None:
        model = tiny_llada(vocab_size=len(tokenizer), **SIZES, seed=options.seed)
    else:
        model = load_denoiser(folder_of(options.start) if options.start in KINDS else options.start)
    model.config.diffusion = replace(DiffusionSpec.of(model), **KINDS[options.kind]).to_dict()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        save_denoiser(model, start, tokenizer)
        config = DiffusionSFTConfig(
            output_dir=str(Path(folder) / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            adam_beta2=0.99,
            weight_decay=0.01,
            max_length=None,
            max_completion_length=CANVAS,
            eos_padding="canvas",
            noise_floor=0.03,
            loss_weight="none",
            seed=options.seed,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            bf16=False,
            activation_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = DiffusionSFTTrainer(
            str(start),
            args=config,
            train_dataset=supervised(options.rows),
            processing_class=tokenizer,
            callbacks=[Progress(tokenizer, options.measure_every)],
        )
        trainer.train()
        save_denoiser(trainer.model.to(torch.bfloat16), output, tokenizer)
    print(json.dumps(measured(load_denoiser(output), tokenizer)), flush=True)


class Progress(TrainerCallback):
    """Prints solve rates on validation rows while training."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, every: int) -> None:
        self.tokenizer, self.every, self.started = tokenizer, every, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            model.eval()
            rates = measured(model, self.tokenizer, limit=128)
            model.train()
            print(state.global_step, f"{time.perf_counter() - self.started:.0f} s", json.dumps(rates), flush=True)


def measured(model: Any, tokenizer: PreTrainedTokenizerFast, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Solve rates on validation rows, by task and tokens per step."""
    found = {}
    for name in TAUGHT:
        result = evaluate(
            model,
            tokenizer,
            load_task(name, **TASKS[name].arguments),
            decodings=decodings(),
            split="validation",
            limit=limit,
        )
        found[name] = {speed: round(rate, 3) for speed, rate in result.solve_rates.items()}
    return found


if __name__ == "__main__":
    main()
