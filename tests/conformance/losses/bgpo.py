"""BGPO: bounds of each view, losses of the recorded micro-batches, gradients and metrics.

The records are of DARE's port, which drops padding before the forward and divides bounds by the length of the canvas.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.training.clipping import Clip, ratio_surrogate
from rl4dlm.training.losses import ratio_bound
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"bounds", "elbo", "loss", "loss_per_backward", "metrics", "grad"}
TOKENS = "DARE's BGPO can weigh completions by their number of tokens; here a mean over completions"


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: bounds, losses, gradients and metrics."""
    from rl4dlm.algorithms.bgpo import BGPOTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model = case.settings, case.outputs, tools.model_of(case)
    assert settings.get("kl_loss_coef") is None, "a KL term is not known here"
    rows, count, spec = tools.packed(case), settings["mc_num"], spec_of(case)
    mask = torch.tensor(case.noise["is_mask"]).bool()
    length = mask.shape[-1]
    inner = ELBO(count, form="count")
    views = inner.views(rows, mask, torch.zeros(mask.shape[:2]))  # counts give the weights
    with torch.no_grad():
        found = score_views(model, spec, rows.ids, rows.attention_mask, views)
        sums = inner.per_draw(found.log_probs, views)  # [B, K]
    if "bounds" in outputs:
        tools.compare("bounds", sums / length, outputs["bounds"])
    if "elbo" in outputs:
        tools.compare("elbo", sums.mean(-1), outputs["elbo"], tools.LOSS_TOLERANCE)

    trainer = tools.trainer_for(
        case,
        folder,
        model,
        BGPOTrainer,
        views,
        num_views=count,
        bound_norm="canvas",
        epsilon=settings["clip_ratio_low"],
        epsilon_high=settings["clip_ratio_high"],
        delta=settings["clip_ratio_c"],
        beta=0.0,
    )
    old = torch.tensor(case.inputs["old_bounds"], dtype=torch.float64)
    batch = tools.of_rows(tools.batch_of(case, old=old[:, None] * length), rows)
    size = settings["ppo_micro_batch_size_per_gpu"]
    parts = [slice(start, start + size) for start in range(0, len(mask), size)]

    def loss_of(part: slice) -> Tensor:
        trainer.estimator = tools.Recorded(views[part], inner)
        some = {name: value[part] if value.dim() else value for name, value in batch.items()}
        loss: Tensor = trainer._compute_loss(trainer.model, some)
        return loss

    def ours() -> Tensor:
        return torch.stack([loss_of(part) for part in parts]).mean()

    weights = torch.cat([weights_of(rows.valid[part].sum(-1), settings["loss_agg_mode"]) for part in parts])

    def literal() -> Tensor:  # row by row, each weighed as its micro-batch is averaged there
        each = torch.stack([loss_of(slice(i, i + 1)) for i in range(len(mask))])
        return (each * weights).sum() / len(parts)

    advantages = batch["advantages"][:, None]
    compare_parts(case, sums / length - old, advantages, weights, parts)
    rules = () if settings["loss_agg_mode"] == "seq-mean-token-mean" else (TOKENS,)
    return tools.verdict(case, ours, literal, model, *rules)


def weights_of(tokens: Tensor, mode: str) -> Tensor:
    """What completions of a micro-batch with so many tokens weigh in verl's ways to average."""
    if mode == "token-mean":
        return tokens / tokens.sum().double()
    weights = torch.ones(len(tokens), dtype=torch.float64) / len(tokens)
    if mode == "seq-mean-token-mean":
        return weights
    assert mode == "seq-mean-token-sum", mode
    return weights * tokens


def compare_parts(case: Case, difference: Tensor, advantages: Tensor, weights: Tensor, parts: list[slice]) -> None:
    """Losses of each backward, a view of a micro-batch, and metrics, one number per micro-batch."""
    settings, outputs = case.settings, case.outputs
    low, high, most = (settings[f"clip_ratio_{name}"] for name in ("low", "high", "c"))
    bound = ratio_bound(difference, advantages)
    values = ratio_surrogate(bound, advantages, Clip("ppo", low, high, most))  # [B, K]
    plain, clipped = -advantages * bound, -advantages * bound.clamp(1 - low, 1 + high)
    tokens = tools.mask_of(case).sum(-1).double()
    terms = {
        "actor/pg_clipfrac": (clipped > plain).double(),
        "actor/pg_clipfrac_lower": ((torch.max(plain, clipped) > -advantages * most) & (advantages < 0)).double(),
        "actor/ppo_kl": -bound.log(),
    }
    each: list[float] = []
    expected: dict[str, list[float]] = {"actor/pg_loss": [], **{name: [] for name in terms}}
    for part in parts:
        losses = (values[part] * weights[part, None]).sum(0)
        each += (losses / len(parts) / values.shape[1]).tolist()
        expected["actor/pg_loss"].append(losses.mean().item())
        shares = tokens[part, None] / tokens[part].sum()
        for name, term in terms.items():
            expected[name].append((term[part] * shares).sum(0).mean().item())
    if "loss_per_backward" in outputs:
        tools.compare("loss_per_backward", each, outputs["loss_per_backward"], tools.LOSS_TOLERANCE)
    for name, value in (outputs.get("metrics") or {}).items():
        assert expected[name] == pytest.approx(value, abs=tools.LOSS_TOLERANCE), name
