"""IGPO: which given tokens count, scores, losses and gradients, in the recorded views.

The reference attends to padding and counts every hidden token of the canvas, also behind the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.training.clipping import Clip, surrogate
from rl4dlm.training.losses import kl_estimate
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"loss", "per_token_logps", "per_token_entropy", "scored_mask", "metrics", "grad"}
RATIO = "the sequence ratio of IGPO's code averages all tokens of the canvas, dropped hints too; here those that count"


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: scores, entropies, the filter, loss, gradients and metrics."""
    from rl4dlm.algorithms.igpo import IGPOTrainer, most_entropic

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model = case.settings, case.outputs, tools.model_of(case)
    prompts, completions = tools.ids_of(case)
    length, sequence = completions.shape[1], bool(settings["use_gspo"])
    is_mask = torch.tensor(case.noise["is_mask"]).bool()
    hidden, given = is_mask[:, -length:], torch.tensor(case.inputs["inpaint_mask"]).bool()
    views = Views(is_mask[:, None], torch.ones(hidden.shape, dtype=torch.float64)[:, None])
    ids = torch.cat([prompts, completions], dim=1)

    found = score_views(model, spec_of(case), ids, torch.ones_like(ids), views)
    scores = found.log_probs[:, 0]
    tools.compare("per_token_logps", scores, outputs["per_token_logps"])
    tools.compare("per_token_entropy", found.entropies[:, 0], outputs["per_token_entropy"])
    entropies, share = torch.tensor(case.inputs["old_per_token_entropy"]), settings["entropy_clipping_ratio_inpaint"]
    hints = hidden & given
    scored = hidden & (~hints | most_entropic(entropies, hints, share))
    assert torch.equal(scored.long(), torch.tensor(outputs["scored_mask"]).long()), "scored_mask"

    trainer = tools.trainer_for(
        case,
        folder,
        model,
        IGPOTrainer,
        views,
        **tools.ratio_settings(case),
        scope="canvas",
        hint_entropy_share=share,
        importance_sampling_level="sequence" if sequence else "token",
        loss_type="bnpo",
        num_generations=4,
        per_device_train_batch_size=4,
        free_tail=0,
        hide_answer=False,
    )
    old = torch.tensor(case.inputs["old_per_token_logps"], dtype=torch.float64)
    ref = case.inputs.get("ref_per_token_logps")
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    batch = tools.batch_of(case, old=old[:, None], ref=None if ref is None or not settings["beta"] else ref[:, None])
    batch.update(completion_mask=hidden.long(), hinted=given, old_entropies=entropies[:, None])

    def ours() -> Tensor:
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        return loss

    advantages, literal = batch["advantages"][:, None], literal_terms(case, scores, old, ref)
    compare_metrics(outputs.get("metrics") or {}, literal, scored, given, scores, found.entropies[:, 0], advantages)
    rules = (RATIO,) if sequence else ()
    return tools.verdict(case, ours, lambda: (literal["loss"] * scored).sum() / scored.sum(), model, *rules)


def literal_terms(case: Case, scores: Tensor, old: Tensor, ref: Tensor | None) -> dict[str, Tensor]:
    """Terms per token as the reference has them, `[B, L]`: ratio, kl, loss, and whether the unclipped term is lower."""
    low, high, beta = (case.settings[name] for name in ("epsilon_low", "epsilon_high", "beta"))
    advantages = torch.tensor(case.inputs["advantages"], dtype=torch.float64)[:, None]
    log_ratio = scores - old
    if case.settings["use_gspo"]:
        log_ratio = log_ratio.mean(-1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    loss = surrogate(log_ratio, scores, advantages, Clip("ppo", low, high))
    terms = {"ratio": ratio, "lower": (ratio * advantages < ratio.clamp(1 - low, 1 + high) * advantages).double()}
    if ref is not None and beta:
        terms["kl"] = kl_estimate(scores - ref, "k3")
        loss = loss + beta * terms["kl"]
    return {**terms, "loss": loss}


def compare_metrics(
    recorded: dict[str, Any],
    terms: dict[str, Tensor],
    scored: Tensor,
    given: Tensor,
    scores: Tensor,
    entropies: Tensor,
    advantages: Tensor,
) -> None:
    """Recorded metrics against means over scored tokens, over given ones among them and over the others."""

    def mean(values: Tensor, mask: Tensor = scored) -> float:
        return ((values * mask).sum() / mask.sum().clamp(min=1)).item()

    hints, drawn = scored & given, scored & ~given
    every = advantages.expand_as(scores)
    expected = {
        "entropy": mean(entropies),
        "policy_ratio": mean(terms["ratio"]),
        "clip_ratio": mean(terms["lower"]),
        "num_inpainted_tokens_in_loss": float(hints.sum()),
        "num_generated_tokens_in_loss": float(drawn.sum()),
    }
    if "kl" in terms:
        expected["kl"] = mean(terms["kl"])
    for mask, of, where in ((hints, "hint_tokens", "inpainted"), (drawn, "generated_tokens", "generated")):
        expected[f"{of}_clip_ratio"] = mean(terms["lower"], mask)
        expected[f"{of}_policy_ratio_mean"] = mean(terms["ratio"], mask)
        expected[f"loss_{where}"] = mean(terms["loss"], mask)
        expected[f"advantages_{where}_mean"] = mean(every, mask)
        expected[f"logprobs_{where}_mean"] = mean(scores, mask)
    for name, value in recorded.items():
        assert expected[name] == pytest.approx(value, abs=tools.LOSS_TOLERANCE), name
