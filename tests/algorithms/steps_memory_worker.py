"""What a process of `test_steps_memory.py` runs: MiB of an update that scores few or many recorded steps, as JSON.

Freed memory must be given back for resident memory to be what is in use: `MALLOC_MMAP_THRESHOLD_=65536`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.one_view_memory import resident
from rl4dlm import CJGRPOConfig, CJGRPOTrainer
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.training.steps import SMALL_RUN


class Peak(TrainerCallback):
    """Of the second update, rollout included: the first one makes what stays, such as gradients."""

    mib = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        self.loaded = resident("VmRSS")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mib = resident("VmHWM") - self.loaded


def update(steps: int, one_view: bool) -> float:
    """An update of 4 completions of 96 tokens that were written in so many steps."""
    peak = Peak()
    with tempfile.TemporaryDirectory() as folder:
        args = CJGRPOConfig(
            **SMALL_RUN, output_dir=folder, max_completion_length=96, denoising_steps=steps, block_length=96,
            num_generations=4, per_device_train_batch_size=4, num_iterations=1, beta=0.0, one_view=one_view,
            scope="canvas", stop_at_eos=False,
        )  # fmt: skip
        trainer = CJGRPOTrainer(
            tiny_llada(vocab_size=4000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4),
            lambda completions, **columns: [float(len(text) % 7) for text in completions],
            args,
            Dataset.from_dict({"prompt": [f"p{i}" for i in range(4)]}),
            None,
            tiny_tokenizer(),
            callbacks=[peak],
        )
        trainer.train()
    scored = [entry["diffusion/scored_steps"] for entry in trainer.state.log_history if "loss" in entry]
    assert scored == [steps, steps], scored
    return peak.mib


if __name__ == "__main__":
    update(2, True)  # what is loaded on first use is no memory of an update
    print(json.dumps([update(*case) for case in json.loads(sys.argv[1])]))
