"""Dream-Coder's RL: scores in both views, losses of the recorded micro-batches, gradients and metrics.

The reference cuts pairs of rows and views, ordered by view, into micro-batches. A micro-batch is all rows here, with
views that count for nothing where they are in another one. It shows what is behind the end, so that the scope is the
canvas, and leaves padding out of the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.complementary import Complementary
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"loss", "loss_per_micro_batch", "per_token_logps", "metrics", "grad"}
LEVEL = "without context weights Dream-Coder's code multiplies surrogates by 1/t; here all tokens count the same"


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: scores, losses, gradients and metrics."""
    from rl4dlm.algorithms.dream_coder_rl import DreamCoderRLTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, inputs, outputs, model = case.settings, case.inputs, case.outputs, tools.model_of(case)
    prompts, completions = tools.ids_of(case)
    count, width = completions.shape
    attention = torch.tensor(inputs["attention_mask"])
    rows = Rows(
        prompts,
        attention[:, :-width],
        completions,
        torch.ones_like(completions),
        torch.arange(count),
        seen=attention[:, -width:].bool(),
    )
    first = torch.tensor(case.noise["is_mask"]).bool()[0]
    views = Complementary(scope="canvas").views(rows, first.expand(count, 1, -1))
    with torch.no_grad():
        everything = Views(views.hidden, torch.ones_like(views.weight))
        temperature = settings["temperature"]
        scores = score_views(model, spec_of(case), rows.ids, rows.attention_mask, everything, temperature=temperature)
    if "per_token_logps" in outputs:
        tools.compare("per_token_logps", scores.log_probs, outputs["per_token_logps"])

    coefficient = settings["kl_loss_coef"]
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        DreamCoderRLTrainer,
        views,
        cart_p=settings["context_adaptive_reweight_p"] or None,
        substitute_groups=False,
        epsilon=settings["clip_ratio"],
        epsilon_high=settings["clip_ratio_high"],
        beta=coefficient or 0.0,
        loss_type="bnpo",
        scope="canvas",
        temperature=temperature,
        score_temperature=temperature,
    )
    batch = tools.batch_of(case)
    batch["prompt_mask"], batch["canvas_seen"] = rows.prompt_mask.long(), rows.seen
    counted = completions != settings["pad_token_id"] if settings["no_loss_on_pad"] else torch.ones_like(rows.valid)
    batch["completion_mask"] = counted.long()
    parts = micro_batches(case, views)

    def losses(beta: float = coefficient or 0.0) -> list[Tensor]:
        trainer.args.beta = beta
        found = []
        for part in parts:
            trainer.estimator = tools.Recorded(part, trainer.estimator.inner)
            found.append(trainer._compute_loss(trainer.model, {**batch, **others(case, part)}))
        trainer.args.beta = coefficient or 0.0
        return found

    def literal() -> list[Tensor]:
        assert all(int(part.scored.any(-1).sum()) <= 1 for part in parts), "1/t has no meaning for several rows"
        level = [case.noise["t"][v] for v in range(2) for _ in range(count)]
        both = zip(losses(), losses(beta=0.0), level, strict=True)
        return [whole - surrogate + surrogate / t for whole, surrogate, t in both]

    rules = () if settings["context_adaptive_reweight_p"] else (LEVEL,)
    each = literal if rules else losses
    with torch.no_grad():
        found = torch.stack(each()) / len(parts)
    if "loss_per_micro_batch" in outputs:
        tools.compare("loss_per_micro_batch", found, outputs["loss_per_micro_batch"], tools.LOSS_TOLERANCE)
    compare_metrics(case, trainer, batch, parts, found * len(parts), scores)
    mean = [lambda which=which: torch.stack(which()).mean() for which in (losses, literal)]
    return tools.verdict(case, *mean, model, *rules)


def micro_batches(case: Case, views: Views) -> list[Views]:
    """The views of each micro-batch: those of the other ones count for nothing."""
    count, size = len(views), case.settings["ppo_micro_batch_size_per_gpu"]
    place = torch.arange(2)[None] * count + torch.arange(count)[:, None]  # [B, K], view by view
    each = []
    for start in range(0, 2 * count, size):
        inside = (place >= start) & (place < start + size)
        each.append(Views(views.hidden, views.weight * inside[..., None]))
    return each


def others(case: Case, part: Views) -> dict[str, Tensor]:
    """Old and reference scores `[B, 1, L]` of the view of a micro-batch that hides a token; 0 where none does."""
    names = {"old_per_token_logps": "old_log_probs", "ref_per_token_logps": "ref_log_probs"}
    return {
        ours: (torch.tensor(case.inputs[theirs], dtype=torch.float64) * part.scored).sum(1, keepdim=True)
        for ours, theirs in names.items()
        if case.inputs.get(theirs) is not None
    }


def compare_metrics(
    case: Case, trainer: Any, batch: dict[str, Any], parts: list[Views], losses: Tensor, scores: Any
) -> None:
    """Recorded metrics, of which there is one per micro-batch, against weighted means."""
    settings, recorded = case.settings, case.outputs.get("metrics") or {}
    low, high = settings["clip_ratio"], settings["clip_ratio_high"]
    advantages = torch.tensor(case.inputs["advantages"], dtype=torch.float64)[:, None]
    found: dict[str, list[float]] = {name: [] for name in ("entropy_loss", "pg_clipfrac", "ppo_kl", "kl_loss")}
    for part in parts:
        weights = trainer._weights(part, batch)
        other = others(case, part)
        score = (scores.log_probs * part.scored).sum(1)
        log_ratio = score - other["old_per_token_logps"][:, 0]
        ratio = log_ratio.exp()
        terms = {
            "entropy_loss": (scores.entropies * part.scored).sum(1),
            "pg_clipfrac": (-advantages * ratio.clamp(1 - low, 1 + high) > -advantages * ratio).double(),
            "ppo_kl": -log_ratio,
        }
        if settings["kl_loss_coef"] is not None:
            terms["kl_loss"] = trainer.token_kl(
                score, {**batch, "ref_per_token_logps": other["ref_per_token_logps"][:, 0]}
            )
        total = weights.sum().clamp(min=1e-8)
        for name, values in terms.items():
            found[name].append(((values * weights).sum() / total).item())
    penalty = torch.tensor(found["kl_loss"] or [0.0] * len(parts)) * (settings["kl_loss_coef"] or 0.0)
    expected: dict[str, Any] = {f"actor/{name}": values for name, values in found.items()}
    expected["actor/kl_loss"] = found["kl_loss"][-1] if found["kl_loss"] else None
    expected["actor/kl_coef"] = settings["kl_loss_coef"]
    expected["actor/pg_loss"] = (losses - penalty).tolist()
    for name, value in recorded.items():
        assert expected[name] == pytest.approx(value, abs=tools.LOSS_TOLERANCE), name
