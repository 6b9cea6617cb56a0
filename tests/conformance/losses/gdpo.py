"""GDPO (diffusion): coefficients, bounds per position, losses and gradients in the recorded masks.

The records are of NeMo-RL's port, which does not see what is behind the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import as_views
from rl4dlm.likelihood.quadrature import Quadrature
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"times", "coefficients", "per_position_elbo", "elbo", "loss", "metrics", "grad"}
SIMPSON = "the three points that GDPO's port calls Simpson's, which are not, are left out"
DRAWN = "GDPO's port can draw its levels; here they are the nodes of a Gauss-Legendre rule"
PROMPT = "GDPO's port can hide prompt tokens; here prompts are never hidden"
BOUND_TOLERANCE = 1e-5  # sums of float32 terms


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: levels, coefficients, bounds, loss, gradients and metrics."""
    from rl4dlm.algorithms.diffusion_gdpo import DiffusionGDPOTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model = case.settings, case.outputs, tools.model_of(case)
    assert settings.get("sequence_level_importance_ratios", True), "only ratios of sequences are known here"
    rows, rules = tools.packed(case), set()
    mask = torch.tensor(case.noise["is_mask"]).bool()
    count, draws = mask.shape[1], settings["mc_samples"]
    quadrature, size = settings["quadrature"], rows.valid.sum(-1, keepdim=True)
    estimator: Estimator
    if quadrature.startswith("gauss-"):
        estimator = Quadrature(int(quadrature.removeprefix("gauss-")), draws, "count", "level")
        level, weight = (x.expand(len(mask), -1) for x in estimator._levels(mask))
        views = estimator.views(rows, mask)
        drawn = estimator.draw(rows, seed=0, iteration=0).scored.sum(-1)
        assert torch.equal(drawn, mask.sum(-1)), "a view hides another number of tokens"
    else:
        estimator = Quadrature(1, count, "count", "level")  # adds up; its weights are not used
        rules.add(SIMPSON if quadrature == "simpson" else DRAWN)
        level, weight = literal_levels(case, count)
        least = (size.float() * level.float()).floor().clamp(min=1).minimum(size.float()).long()
        assert torch.equal(least, mask.sum(-1)), "a view hides another number of tokens"
        views = as_views(rows, mask, torch.where(mask, (weight / level)[..., None], 0.0), "valid")
    if case.noise.get("prompt_hidden") is not None:
        rules.add(PROMPT)
        prompt = torch.tensor(case.noise["prompt_hidden"]).bool()
        views = as_views(rows, mask, views.weight, "valid", prompt)
    recorded = outputs.get("times")
    if recorded is not None:
        times = torch.tensor(recorded).double()
        tools.compare("times", times.T.expand_as(level) if times.dim() == 2 else times.expand_as(level), level)
    if "coefficients" in outputs:
        found = torch.tensor(outputs["coefficients"]).double().expand_as(level)
        tools.compare("coefficients", views.weight.amax(-1), found, BOUND_TOLERANCE)

    with torch.no_grad():
        scores = score_views(model, spec_of(case), rows.ids, rows.attention_mask, views)
        each = estimator.reduce(scores.log_probs, views)
    if "per_position_elbo" in outputs:
        tools.compare("per_position_elbo", each, outputs["per_position_elbo"], BOUND_TOLERANCE)
    if "elbo" in outputs:
        tools.compare("elbo", each.sum(-1), outputs["elbo"], BOUND_TOLERANCE)

    old = torch.tensor(case.inputs["old_per_position_elbo"], dtype=torch.float64)
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        DiffusionGDPOTrainer,
        views,
        epsilon=settings["ratio_clip_min"],
        epsilon_high=settings["ratio_clip_max"],
        delta=settings.get("ratio_clip_c"),
        beta=0.0,
    )
    batch = tools.of_rows(tools.batch_of(case, old=old[:, None]), rows)
    compare_metrics(case, ((each - old) * rows.valid).sum(-1, keepdim=True) / size, rows)
    tools.compare_loss(case, trainer._compute_loss(trainer.model, batch), model)
    return Verdict(equal=not rules, rules=frozenset(rules))


def literal_levels(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """Levels and weights `[B, V]` of the port's other rules: three fixed points, or recorded draws."""
    rows, draws = len(case.inputs["prompt_ids"]), case.settings["mc_samples"]
    if case.settings["quadrature"] == "simpson":
        level = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64).repeat_interleave(draws)
        weight = torch.tensor([1 / 6, 4 / 6, 1 / 6], dtype=torch.float64).repeat_interleave(draws) / draws
        return level.expand(rows, -1), weight.expand(rows, -1)
    level = torch.tensor(case.outputs["times"], dtype=torch.float64).T
    return level, torch.full_like(level, 1 / count)


def compare_metrics(case: Case, log_ratio: Tensor, rows: Rows) -> None:
    """Recorded metrics, of tokens that all have their sequence's ratio."""
    settings, recorded = case.settings, case.outputs.get("metrics") or {}
    ratio = log_ratio.exp().expand(rows.valid.shape)[rows.valid]
    clamped = ratio.clamp(1 - settings["ratio_clip_min"], 1 + settings["ratio_clip_max"])
    expected: dict[str, Any] = {
        "probs_ratio": ratio.mean().item(),
        "probs_ratio_clamped": clamped.mean().item(),
        "probs_ratio_min": ratio.min().item(),
        "probs_ratio_max": ratio.max().item(),
        "probs_ratio_clamped_min": clamped.min().item(),
        "probs_ratio_clamped_max": clamped.max().item(),
    }
    for name, value in recorded.items():
        assert expected[name] == pytest.approx(value, abs=tools.LOSS_TOLERANCE), name
