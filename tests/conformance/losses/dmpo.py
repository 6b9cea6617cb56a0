"""DMPO's evidence lower bounds, losses and gradients.

A recorded batch is one group. Recorded views are in the order of replicates (row r * B + b), where ours have pairs side
by side: replicate r and its complement, or its opposite number in the other half, r + R / 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.algorithms.dmpo import DMPOTrainer, target_weights
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.views import Rows, Views
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

MASKS_OF_LAST_ROWS = (
    "DMPO's loss_mask_non_eos means to keep tokens behind the end, and takes all masks from the last two rows of the "
    "replicated batch (a bitwise not of integers); scope='valid' is what it means"
)
SUMMED_VIEWS = "DMPO's ddo loss without split views adds views up where it averages them otherwise; here it averages"


def run(case: Case, folder: Path) -> Verdict:
    """Compares scores by both models, or loss and gradients; and weights and masks with what they come from."""
    masks = recorded_masks(case)  # [B, R, L]
    rules = {MASKS_OF_LAST_ROWS} if check_masks(case) else set()
    if "loss" not in case.outputs:
        assert any(name.startswith(("seq_sum_", "log_prob_")) for name in case.outputs)
        compare_scores(case, folder, masks)
        return Verdict(not rules, frozenset(rules))
    check_weights(case)
    settings, model = case.settings, tools.model_of(case)
    views, repeats = views_of(case, masks), masks.shape[1]
    if settings["loss"] == "ddo" and not settings.get("ddo_indep_set") and repeats > 1:
        # The literal rule: sums over views, which are averages of R times as much.
        rules.add(SUMMED_VIEWS)
        views = Views(views.hidden, views.weight * repeats)
    trainer = trainer_for(case, folder, model, views)
    loss = trainer._compute_loss(trainer.model, batch_of(case))
    loss.backward()
    assert loss.item() == pytest.approx(case.outputs["loss"], abs=tools.LOSS_TOLERANCE)
    if "grad" in case.outputs:
        tools.compare_gradients(case.outputs["grad"], model, spec_of(case).mask_token_id)
    return Verdict(not rules, frozenset(rules))


def recorded_masks(case: Case) -> Tensor:
    """bool `[B, R, L]`, in our order."""
    batch = len(tools.ids_of(case)[0])
    masks = torch.tensor(case.noise["completion_is_mask"]).bool().view(-1, batch, tools.ids_of(case)[1].shape[1])
    repeats = len(masks)
    order = [r for pair in zip(range(repeats // 2), range(repeats // 2, repeats), strict=True) for r in pair]
    return masks[order if repeats % 2 == 0 else list(range(repeats))].transpose(0, 1)


def check_masks(case: Case) -> bool:
    """Whether masks lack what `loss_mask_non_eos` took; they must be those of the recorded numbers otherwise."""
    uniform, level = (torch.tensor(case.noise[name]).double() for name in ("mask_uniform", "lambda_uniform"))
    level = 0.1 + 0.9 * level if case.settings["loss_mask_prob_clamp"] else level
    masks = uniform < level.view(-1, 1)
    if case.settings["loss_antithetic"]:
        masks = torch.cat([masks, ~masks])
    plain = masks.clone()
    if case.settings.get("loss_mask_non_eos"):
        ends = torch.tensor(case.inputs["completion_mask"])
        masks[(~ends).unique()] = False
    assert torch.equal(masks, torch.tensor(case.noise["completion_is_mask"]).bool())
    return not torch.equal(masks, plain)


def check_weights(case: Case) -> None:
    """The recorded weights are `target_weights` of the recorded rewards and scores."""
    settings, inputs = case.settings, case.inputs
    if "rewards" not in inputs or settings["alpha"] < 0:
        return
    rewards, old, ref = (torch.tensor(inputs[n]).double()[None] for n in ("rewards", "log_prob_cur", "log_prob_pre"))
    with_ratio = settings["alpha"] > 0
    target = {"alpha": settings["alpha"] if with_ratio else 1.0, "kappa": settings["coeff"], "beta": float(with_ratio)}
    weights = target_weights(rewards, ref - old, **target, baseline="none")
    recorded = torch.tensor(inputs["advantages"]).double()[None]
    torch.testing.assert_close(weights, recorded, rtol=0, atol=tools.SCORE_TOLERANCE)
    if "negative_advantages" in inputs:
        difference = target_weights(rewards, ref - old, **target, baseline="negative")
        negative = torch.tensor(inputs["negative_advantages"]).double()[None]
        torch.testing.assert_close(recorded - difference, negative, rtol=0, atol=tools.SCORE_TOLERANCE)


def views_of(case: Case, masks: Tensor) -> Views:
    """The recorded masks as views of DMPO's estimator, which adds the complements where it can."""
    batch, repeats = batch_of(case), masks.shape[1]
    rows = rows_of(batch)
    paired = repeats % 2 == 0 and bool((masks[:, 0::2] ^ masks[:, 1::2]).all())
    estimator = ELBO(repeats, "bernoulli_count", complement=paired, stratify="none", scope="canvas")
    given = masks[:, 0::2] if paired else masks
    views = estimator.views(rows, given, torch.full(given.shape[:2], 0.5))
    assert torch.equal(views.hidden[..., rows.prompt_ids.shape[1] :], masks)
    return views


def compare_scores(case: Case, folder: Path, masks: Tensor) -> None:
    """Scores per token and per sequence, by the model and the reference."""
    prompts = tools.ids_of(case)[0]
    for name, of in (("cur", "model"), ("ref", "ref_model")):
        model = tools.model_of(case, of)
        trainer = trainer_for(case, folder, model, views_of(case, masks))
        batch = batch_of(case)
        with torch.no_grad():
            scores = trainer._score(model, rows_of(batch), 0, batch["completion_ids"].shape[1]).log_probs.double()
        per_token = torch.cat([torch.zeros(prompts.shape).double(), scores], dim=1)
        # A log-probability counts up to L times in a score, and so does the rounding of the reference's.
        near = tools.SCORE_TOLERANCE * scores.shape[1]
        for key, found in ((f"log_prob_{name}_per_token", per_token), (f"seq_sum_{name}", scores.sum(-1))):
            if key in case.outputs:
                torch.testing.assert_close(found, torch.tensor(case.outputs[key]).double(), rtol=0, atol=near, msg=key)


def rows_of(batch: dict[str, Tensor]) -> Rows:
    """The rows of a batch."""
    return Rows(*(batch[name] for name in ("prompt_ids", "prompt_mask", "canvas_ids", "canvas_valid", "row_ids")))


def batch_of(case: Case) -> dict[str, Tensor]:
    """The recorded micro-batch: weights less their baseline, as the trainer has them, on the whole canvas."""
    inputs = {"advantages": [0.0] * len(case.inputs["prompt_ids"]), **case.inputs}
    filled = Case(case.path, case.name, case.source, case.settings, inputs, case.noise, case.outputs)
    batch = tools.batch_of(filled)
    weights, strength = batch["advantages"], case.settings.get("centering_strength", 1.0)
    if baseline_of(case) == "negative":
        batch["advantages"] = weights - strength * torch.tensor(inputs["negative_advantages"]).double()
    if baseline_of(case) == "mean":
        batch["advantages"] = weights - strength * weights.mean()
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    if "log_prob_cur" in inputs:
        batch["old_scores"] = torch.tensor(inputs["log_prob_cur"]).double()
    return batch


def baseline_of(case: Case) -> str:
    """Our name of the recorded baseline."""
    settings = case.settings
    if settings["loss"] == "ddo" or not settings.get("advantage_centering"):
        return "none"
    if settings.get("advantage_centering_unbias"):
        return "unbiased"
    return "negative" if settings.get("advantage_centering_neg") else "mean"


def trainer_for(case: Case, folder: Path, model: Any, views: Views) -> Any:
    """A DMPO trainer with the recorded settings and views."""
    settings, rows = case.settings, len(case.inputs["prompt_ids"])
    return tools.trainer_for(
        case,
        folder,
        model,
        DMPOTrainer,
        views,
        num_generations=rows,
        per_device_train_batch_size=rows,
        beta=0.0,  # the recorded weights are given
        weight_baseline=baseline_of(case),
        weight_baseline_strength=settings.get("centering_strength", 1.0),
        objective="ddo" if settings["loss"] == "ddo" else "cross_entropy",
        ddo_scale=settings.get("ddo_beta", 0.05),
        ddo_negative_weight=settings.get("ddo_alpha", 1.0),
        ddo_split=bool(settings.get("ddo_indep_set", False)),
    )
