"""EBPO: bounds of all blocks in the recorded views, losses of recorded batches, gradients and metrics.

The record is of DARE's port; a reference that drops pads before the forward.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.training import sequence_ratio
from rl4dlm.training.clipping import Clip, clipped_units, surrogate
from rl4dlm.training.losses import kl_estimate
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"elbo", "token_terms", "loss", "metrics", "attention_view0_row0", "grad"}
KL = {None: "k2", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3", "k1": "k1", "kl": "k1", "abs": "abs"}
ALLOWED = ("k2", "k3")
REFUSED = "EBPO's port has KL terms whose gradient does not hold the policy at the reference; here they are refused"
TERM_TOLERANCE = 1e-5  # float32 terms, of up to L_b times a log-probability
BOUND_TOLERANCE = 1e-4  # their sums


def run(case: Case, folder: Path) -> Verdict:
    """As `compared`, where nothing stays replaced."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return compared(case, folder, monkeypatch)


def compared(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """Compares whatever the case records of: attention, terms of tokens, bounds, loss, gradients and metrics."""
    from rl4dlm.algorithms.ebpo import EBPOTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model, spec = case.settings, case.outputs, tools.model_of(case), spec_of(case)
    rows, mask = tools.packed(case), torch.tensor(case.noise["is_mask"]).bool()
    count = mask.shape[1]
    assert count == settings["mc_num"]
    beta, kind = settings["kl_loss_coef"] or 0.0, KL[settings.get("kl_loss_type")]
    blocks = {"per_block": True, "block_length": spec.block_length, "block_origin": spec.grid_origin}
    inner = ELBO(count, "count", **blocks)
    views = inner.views(rows, mask, torch.zeros(mask.shape[:2]))  # counts give the weights
    with torch.no_grad():
        found = score_views(model, spec, rows.ids, rows.attention_mask, views)
    terms = found.log_probs * views.weight * count
    bounds = inner.reduce(found.log_probs, views).sum(-1)
    if "token_terms" in outputs:
        tools.compare("token_terms", terms, outputs["token_terms"], TERM_TOLERANCE)
    if "elbo" in outputs:
        tools.compare("elbo", bounds, outputs["elbo"], BOUND_TOLERANCE)
    if "attention_view0_row0" in outputs:
        lengths = int(rows.prompt_mask[0].sum()), int(rows.valid[0].sum())
        assert outputs["attention_view0_row0"] == tools.two_copies(*lengths, spec).int().tolist()

    if beta and kind not in ALLOWED:
        with pytest.raises(ValueError, match="kl_estimator="):
            EBPOTrainer.config_class(output_dir=str(folder), bf16=False, use_cpu=True, beta=beta, kl_estimator=kind)
        monkeypatch.setattr(sequence_ratio, "kl_estimate", lambda difference, _: divergence(difference, kind))

    low, high = settings["clip_ratio_low"], settings["clip_ratio_high"]
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        EBPOTrainer,
        views,
        num_views=count,
        epsilon=low,
        epsilon_high=high,
        beta=beta,
        **({"kl_estimator": kind if kind in ALLOWED else "k2"} if beta else {}),
    )
    old = torch.tensor(case.inputs["old_elbo"], dtype=torch.float64)
    ref = case.inputs.get("ref_elbo")
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    known = None if ref is None else per_token(ref, mask.shape[2])
    batch = tools.of_rows(tools.batch_of(case, old=per_token(old, mask.shape[2]), ref=known), rows)
    clip, advantages = Clip("log", low, high), batch["advantages"]
    losses = surrogate(bounds - old, bounds, advantages, clip)
    metrics = {
        "actor/pg_loss": losses,
        "actor/pg_clipfrac": torch.stack(clipped_units(bounds - old, advantages, clip)).any(0).double(),
        "actor/ppo_kl": old - bounds,
        "actor/pg_clipfrac_lower": torch.zeros_like(losses),
        "actor/ebpo_old_elbo": old,
        "actor/ebpo_new_elbo": bounds,
        "actor/ebpo_log_ratio": bounds - old,
        "actor/kl_loss": divergence(bounds - (old if ref is None else ref), kind),
        "actor/kl_coef": torch.full_like(losses, beta),
    }
    size = settings["ppo_micro_batch_size_per_gpu"]
    for name, value in (outputs.get("metrics") or {}).items():
        each = [part.mean() for part in metrics[name].split(size)]
        tools.compare(name, torch.stack(each), value, BOUND_TOLERANCE)
    tools.compare_loss(case, trainer._compute_loss(trainer.model, batch), model, BOUND_TOLERANCE)
    refused = bool(beta) and kind not in ALLOWED
    return Verdict(equal=not refused, rules=frozenset([REFUSED] if refused else []))


def divergence(difference: Tensor, kind: str) -> Tensor:
    """The port's estimates, those that a trainer here refuses included."""
    return difference.abs() if kind == "abs" else kl_estimate(difference, kind)


def per_token(sums: Tensor, length: int) -> Tensor:
    """Bounds `[B]` as scores of tokens `[B, 1, L]` with these sums."""
    return torch.nn.functional.pad(sums[:, None, None], (0, length - 1))
