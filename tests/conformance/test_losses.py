"""Recorded diffu-GRPO losses and gradients, through the trainer's own loss.

A `DiffuGRPOTrainer` is built around the recorded model; only its estimator is replaced, by one that replays the
recorded masks. d1 attends to padding, so the attention mask of the batch is all ones; that the trainer hides padding is
tested with the trainer. `loss_type="bnpo"` is d1's mean over the tokens of a micro-batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rl4dlm.likelihood.views import Views
from tests.conformance import report
from tests.conformance.cases import Case, load_cases
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import tools
from tests.conformance.losses.tools import LOSS_TOLERANCE, compare_gradients
from tests.conformance.test_log_probs import hidden_tokens, log_probs

CLIP_RATIO = "the metric clip_ratio of d1 compares the two terms the wrong way round; the loss is right"


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in load_cases() if c.kind == "loss"])
def test_loss(case: Case, tmp_path: Path):
    model = tools.model_of(case)
    trainer = trainer_for(case, model, tmp_path)
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


def hidden_in_iteration(case: Case) -> Tensor:
    """The tokens hidden in the recorded iteration, bool `[B, T]`; a case may have the masks of that one only."""
    hidden = hidden_tokens(case)
    return hidden[case.settings.get("this_itr_idx", 0) if len(hidden) > 1 else 0]


def trainer_for(case: Case, model: LlamaForCausalLM, folder: Path) -> Any:
    """A diffu-GRPO trainer with the recorded settings, at the recorded iteration."""
    from rl4dlm.algorithms.diffu_grpo import DiffuGRPOTrainer

    settings = case.settings
    return tools.trainer_for(
        case,
        folder,
        model,
        DiffuGRPOTrainer,
        Views(hidden_in_iteration(case)[:, None], tools.mask_of(case).double()[:, None]),
        epsilon=settings["epsilon"],
        beta=settings["beta"],
        cfg_scale=settings.get("cfg_scale") or 0.0,
        loss_type="bnpo",
    )


def batch_of(case: Case) -> dict[str, Tensor]:
    """The recorded micro-batch in the trainer's form; old and reference scores are `[B, n, C]` there."""
    scores = {}
    for name in ("old", "ref"):
        recorded = case.inputs.get(f"{name}_per_token_logps")
        if recorded is not None:
            each = torch.tensor(recorded, dtype=torch.float64)
            each = each if each.dim() == 3 else each.expand(case.settings.get("num_iterations", 1), -1, -1)
            scores[name] = each.transpose(0, 1)
    return tools.batch_of(case, **scores)
