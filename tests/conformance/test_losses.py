"""Recorded diffu-GRPO losses and gradients, through the trainer's own loss.

A `DiffuGRPOTrainer` is built around the recorded model; only its estimator is replaced, by one that replays the
recorded masks. d1 attends to padding, so the attention mask of the batch is all ones; that the trainer hides padding is
tested with the trainer. `loss_type="bnpo"` is d1's mean over the tokens of a micro-batch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.views import Rows, Views
from tests.conformance import report
from tests.conformance.cases import Case, load_cases
from tests.conformance.denoisers import build, spec_of
from tests.conformance.test_log_probs import hidden_tokens, log_probs

LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # relative to the norm
CLIP_RATIO = "the metric clip_ratio of d1 compares the two terms the wrong way round; the loss is right"


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in load_cases() if c.kind == "loss"])
def test_loss(case: Case, tmp_path: Path):
    model = build("model", spec_of(case), case.compute_dtype)
    trainer = trainer_for(case, model, tmp_path)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch_of(case))
    loss.backward()

    outputs = case.outputs
    assert loss.item() == pytest.approx(outputs["loss"], abs=LOSS_TOLERANCE)
    if "grad" in outputs:
        compare_gradients(outputs["grad"], model, spec_of(case).mask_token_id)
    metrics, logged = outputs.get("metrics") or {}, trainer._metrics["train"]
    if "kl" in metrics:
        assert logged["kl"][-1] == pytest.approx(metrics["kl"], abs=LOSS_TOLERANCE)
    report.equal[case.family].append(case.name)
    if "clip_ratio" in metrics:
        clipped, literal = clip_ratios(case, model)
        assert literal == pytest.approx(metrics["clip_ratio"], abs=LOSS_TOLERANCE)
        assert logged["clip_ratio/region_mean"][-1] == pytest.approx(clipped, abs=LOSS_TOLERANCE)
        if clipped != pytest.approx(literal, abs=LOSS_TOLERANCE):
            report.explained[CLIP_RATIO].append(case.name)


def clip_ratios(case: Case, model: LlamaForCausalLM) -> tuple[float, float]:
    """The share of tokens whose clipped term is the smaller one, and the share that d1 logs instead."""
    batch = batch_of(case)
    scores = log_probs(case, hidden_in_iteration(case)[None], model)[0]
    old = batch.get("old_per_token_logps")
    ratio = (scores - (scores if old is None else old[:, case.settings.get("this_itr_idx", 0)])).exp()
    epsilon, advantages, mask = case.settings["epsilon"], batch["advantages"][:, None], batch["completion_mask"]
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    return tuple(((which * mask).sum() / mask.sum()).item() for which in (clipped < unclipped, unclipped < clipped))


def compare_gradients(recorded: dict[str, Any], model: LlamaForCausalLM, mask_token_id: int) -> None:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert total == pytest.approx(recorded["total_norm"], rel=GRADIENT_TOLERANCE)
    near = GRADIENT_TOLERANCE * recorded["total_norm"]
    for name, value in (recorded.get("per_parameter_norm") or {}).items():
        assert gradients[name].norm().item() == pytest.approx(value, abs=near), name
    tables = {"lm_head": gradients["lm_head.weight"], "embed": gradients["model.embed_tokens.weight"]}
    for name, value in recorded.items():
        entry = re.fullmatch(r"(lm_head|embed)_(?:(mask)_row|row(\d+))_first(\d+)", name)
        if entry:
            table, is_mask, row, count = entry.groups()
            found = tables[table][mask_token_id if is_mask else int(row)][: int(count)]
            torch.testing.assert_close(found.double(), torch.tensor(value).double(), rtol=0, atol=near)


def hidden_in_iteration(case: Case) -> Tensor:
    """The tokens hidden in the recorded iteration, bool `[B, T]`; a case may have the masks of that one only."""
    hidden = hidden_tokens(case)
    return hidden[case.settings.get("this_itr_idx", 0) if len(hidden) > 1 else 0]


@dataclass(frozen=True)
class RecordedView(Estimator):
    """The recorded masks of one iteration, whatever is asked for; scores every valid token once."""

    hidden: Tensor  # bool [B, 1, T]

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        return Views(self.hidden, rows.valid.to(torch.float64)[:, None])


def trainer_for(case: Case, model: LlamaForCausalLM, folder: Path) -> Any:
    """A diffu-GRPO trainer with the recorded settings, at the recorded iteration."""
    from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig, DiffuGRPOTrainer

    settings = case.settings
    config = DiffuGRPOConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=len(case.inputs["completion_ids"][0]),
        num_iterations=settings.get("num_iterations", 1),
        epsilon=settings["epsilon"],
        beta=settings["beta"],
        cfg_scale=settings.get("cfg_scale") or 0.0,
        loss_type="bnpo",
    )
    trainer = DiffuGRPOTrainer(
        model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["t5 t6"]}),
        processing_class=tokenizer(case, model.config.vocab_size),
    )
    trainer.estimator = RecordedView(hidden_in_iteration(case)[:, None])
    assert trainer.args.steps_per_generation == 1
    trainer._step = settings.get("this_itr_idx", 0)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def batch_of(case: Case) -> dict[str, Tensor]:
    """The recorded micro-batch in the trainer's form; old and reference scores are `[B, n, C]` there."""
    inputs = case.inputs
    prompts, completions = torch.tensor(inputs["prompt_ids"]), torch.tensor(inputs["completion_ids"])
    mask = torch.tensor(inputs["completion_mask"])
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.tensor(inputs["advantages"], dtype=torch.float64),
        "num_items_in_batch": mask.sum(),
        "canvas_ids": completions,
        "canvas_valid": mask.bool(),
        "row_ids": torch.arange(len(prompts)),
        "drawn": torch.zeros_like(mask).bool(),
        "drawn_log_probs": torch.zeros(mask.shape),
    }
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        if inputs.get(name) is not None:
            scores = torch.tensor(inputs[name], dtype=torch.float64)
            scores = scores if scores.dim() == 3 else scores.expand(case.settings.get("num_iterations", 1), -1, -1)
            batch[name] = scores.transpose(0, 1)
    return batch


def tokenizer(case: Case, vocab_size: int) -> PreTrainedTokenizerFast:
    """Words `t0`, `t1`, … for the ids of the recorded model."""
    spec = spec_of(case)
    pad = next(i for i in range(vocab_size) if i != spec.mask_token_id and i not in spec.eos_token_ids)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token=f"t{pad}"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=f"t{pad}",
        eos_token=f"t{spec.eos_token_ids[0]}",
        mask_token=f"t{spec.mask_token_id}",
    )
