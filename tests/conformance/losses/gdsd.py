"""GDSD: scores of pairs in the recorded views, losses and gradients.

The reference noises and scores the whole canvas. Its TLC centres logits before a softmax, which changes nothing, and
weighs tokens as ESPO does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.flat_pairs import FlatPairs
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

SUM = "the code of GDSD adds up the losses of a completion's pairs of views, of which this library takes the mean"
SCORE_TOLERANCE = 5e-5  # of sums of token terms that the reference rounds to float32, with weights up to n + 1


def run(case: Case, folder: Path) -> Verdict:
    """Compares the scores of pairs, the loss and the gradients; logged metrics by their parts of these."""
    tools.check_outputs(case, {"scores", "loss", "grad", "metrics"})
    model = tools.model_of(case)
    if "scores" in case.outputs:
        tools.compare("scores", scores(case, model), case.outputs["scores"], SCORE_TOLERANCE)
    if not {"loss", "grad", "metrics"} & set(case.outputs):
        return Verdict(equal=True)
    pairs = case.settings["num_mc"]
    literal = loss(case, folder, model, beta=case.settings["beta"] / pairs) * pairs
    logged = case.outputs.get("metrics") or {}
    if "kl" in logged:
        assert logged["kl"] == pytest.approx(kl_of(case, model), abs=tools.LOSS_TOLERANCE)
    if "entropy" in logged:  # what the reference calls so; the loss does not use it
        told = -scores(case, model).mean().item() / tools.ids_of(case)[1].shape[1]
        assert logged["entropy"] == pytest.approx(told, abs=tools.LOSS_TOLERANCE)
    assert not set(logged) - {"kl", "entropy"}
    return tools.verdict(
        case,
        lambda: loss(case, folder, model, beta=case.settings["beta"]),
        lambda: literal,
        model,
        *([SUM] if pairs > 1 else []),
    )


def estimator(case: Case) -> ELBO:
    """As GDSD pairs views, or its TLC."""
    count = 2 * case.settings["num_mc"]
    if case.settings["variant"] == "tlc":
        return ELBO(count, "count_with_zero", complement=True, scope="canvas")
    return FlatPairs(count, scope="canvas")


def views(case: Case) -> Views:
    """The recorded pairs."""
    prompts, completions = tools.ids_of(case)
    mask = torch.tensor(case.noise["is_mask"]).bool()  # [B, J, L]
    ones = torch.ones_like(completions)
    rows = Rows(prompts, torch.ones_like(prompts), completions, ones, torch.arange(len(prompts)))
    return estimator(case).views(rows, mask, torch.zeros(mask.shape[:2]))  # counts give the weights


@torch.no_grad()
def scores(case: Case, model: Any) -> Tensor:
    """Sums `[B, J]` of pairs, each the mean of its two views."""
    ids, shown = torch.cat(tools.ids_of(case), dim=1), views(case)
    found = score_views(model, spec_of(case), ids, torch.ones_like(ids), shown)
    return estimator(case).per_draw(found.log_probs, shown)


def kl_of(case: Case, model: Any) -> float:
    """What the reference logs: k2 of pairs, over the length."""
    apart = scores(case, model) - torch.tensor(case.inputs["ref_scores"], dtype=torch.float64)
    return (apart.square() / 2).mean().item() / tools.ids_of(case)[1].shape[1]


def loss(case: Case, folder: Path, model: Any, beta: float) -> Tensor:
    """The trainer's, of the recorded micro-batch."""
    from rl4dlm.algorithms.gdsd import GDSDTrainer

    settings = case.settings
    tlc = settings["variant"] == "tlc"
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        GDSDTrainer,
        views(case),
        num_views=2 * settings["num_mc"],
        weights="elbo" if tlc else "flat",
        residual="clamped",
        epsilon=settings["epsilon_low"],
        epsilon_high=settings["epsilon_high"],
        psi=settings["psi"],
        beta=beta,
        scope="canvas",
    )
    batch = tools.batch_of(case, old=per_token(case, "old_scores"), ref=per_token(case, "ref_scores"))
    batch["completion_mask"] = torch.ones_like(batch["completion_ids"])
    found: Tensor = trainer._compute_loss(trainer.model, batch)
    return found


def per_token(case: Case, name: str) -> Tensor | None:
    """Recorded sums of pairs as scores `[B, 1, K, L]` of tokens in views, whose weighted sums they are."""
    if case.inputs.get(name) is None:
        return None
    sums = torch.tensor(case.inputs[name], dtype=torch.float64)  # [B, J]
    weight = views(case).weight * 2 * case.settings["num_mc"]  # [B, K, L], those of views
    rows, pairs = sums.shape
    placed = torch.zeros_like(weight)
    for row in range(rows):
        for pair in range(pairs):
            both = weight[row, 2 * pair : 2 * pair + 2]
            view, token = (both > 0).nonzero()[0].tolist()
            placed[row, 2 * pair + view, token] = 2 * sums[row, pair] / both[view, token]
    return placed[:, None].expand(-1, case.settings["num_iterations"], -1, -1)
