"""SPG's bounds, losses and gradients, for every kind of bound that a case records.

The reference hides padding from attention but may hide a pad behind a mask as if it were a prompt token, which nothing
can see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.views import Rows
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

COMPARED = {"per_seq_logps", "per_seq_logps_if_all_positive", "per_seq_logps_if_all_negative", "loss", "grad"}


def run(case: Case, folder: Path) -> Verdict:
    """Compares scores, with the recorded signs, all positive and all negative, the loss and its gradients."""
    assert case.outputs
    for kind, recorded in case.outputs.items():
        assert COMPARED & set(recorded)
        model = tools.model_of(case)
        trainer = trainer_for(case, folder, model, negatives=kind)
        batch = batch_of(case)
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        if "loss" in recorded:
            assert loss.item() == pytest.approx(recorded["loss"], abs=tools.LOSS_TOLERANCE), kind
        if "grad" in recorded:
            tools.compare_gradients(recorded["grad"], model, spec_of(case).mask_token_id)
        signs = {
            "per_seq_logps": torch.tensor(case.inputs["reward_mask"]).bool(),
            "per_seq_logps_if_all_positive": torch.ones(len(loss_rows(batch))).bool(),
            "per_seq_logps_if_all_negative": torch.zeros(len(loss_rows(batch))).bool(),
        }
        for name in signs.keys() & recorded.keys():
            with torch.no_grad():
                scores = trainer._score(trainer.model, loss_rows(batch), 0, batch["completion_ids"].shape[1])
                found = trainer.bounds(scores, signs[name]).sum(-1) / batch["completion_mask"].sum(-1)
            expected = torch.tensor(recorded[name]).view(-1)
            torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tools.SCORE_TOLERANCE, msg=name)
    return Verdict(equal=True)


def batch_of(case: Case) -> dict[str, Tensor]:
    """The recorded micro-batch, with the recorded attention."""
    batch = tools.batch_of(case)
    if "prompt_mask" in case.inputs:
        batch["prompt_mask"] = torch.tensor(case.inputs["prompt_mask"])
    return batch


def loss_rows(batch: dict[str, Tensor]) -> Rows:
    """The rows of a batch."""
    return Rows(*(batch[name] for name in ("prompt_ids", "prompt_mask", "canvas_ids", "canvas_valid", "row_ids")))


def trainer_for(case: Case, folder: Path, model: Any, negatives: str) -> Any:
    """An SPG trainer with the recorded settings and masks."""
    from rl4dlm.algorithms.spg import SPGTrainer

    settings = case.settings
    prompts, completions = tools.ids_of(case)
    ids = torch.cat([prompts, completions], dim=1)
    hidden = (torch.tensor(case.noise["noisy_batch"]) == spec_of(case).mask_token_id) & (
        ids != spec_of(case).mask_token_id
    )[:, None]
    config = {
        "negatives": negatives,
        "num_views": settings["num_t"],
        "masking": settings["forward_type"],
        "eubo_beta": settings["eubo_beta"],
        "mix_weight": settings["mix_weight"],
        "p_mask_prompt": settings["p_mask_prompt"] if settings["use_mask_prompt"] else 0.0,
        "cfg_scale": settings.get("cfg_scale") or 0.0,
    }
    estimator = SPGTrainer.config_class(output_dir=str(folder), bf16=False, use_cpu=True, **config).estimator(
        settings["block_length"]
    )
    mask, prompt = hidden[..., prompts.shape[1] :], hidden[..., : prompts.shape[1]]
    views = estimator.views(loss_rows(batch_of(case)), mask, prompt)
    return tools.trainer_for(case, folder, model, SPGTrainer, views, **config)
