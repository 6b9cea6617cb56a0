"""d-TreeRPO: advantages of a recorded tree's edges, scores, distillation, losses and gradients of some of its edges.

The rows of a recorded loss are edges, from one canvas to another. Here such a row is a completion whose edge above is
left out: its tokens count as written at step 0, those of the edge at step 1. The reference attends to padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.training.losses import kl_estimate
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"edge_advantages", "logps", "loss", "metrics", "grad"}


def run(case: Case, folder: Path) -> Verdict:
    """Compares advantages, scores, logged parts, loss and gradients."""
    from rl4dlm.algorithms.tree_rpo import Edges, TreeRPOTrainer, foreseen, rising

    tools.check_outputs(case, OUTPUTS)
    settings, inputs, outputs, model = case.settings, case.inputs, case.outputs, tools.model_of(case)
    assert settings["temperature"] > 0 and (
        settings["self_distillation_gamma"],
        settings["self_distillation_beta"],
    ) == (
        2.0,
        0.7,
    )
    check_advantages(case)
    before, after = torch.tensor(inputs["parent_completion"]), torch.tensor(inputs["child_completion"])
    spec = spec_of(case)
    mask, ends = spec.mask_token_id, torch.isin(after, torch.tensor(spec.eos_token_ids))
    written, filled = before != mask, (before == mask) & (after != mask)
    scored = filled & (ends.cumsum(-1) - ends.long() == 0)
    prompts = torch.tensor(inputs["prompt_ids"])[torch.tensor(inputs["row_prompt"])]
    edges = {"prompt_ids": prompts.tolist(), "completion_ids": after.tolist()}
    edges["completion_mask"] = torch.ones_like(after).tolist()
    edge_case = replace(case, inputs={**inputs, **edges})
    distils = settings["enable_self_distillation_loss"]
    trainer = tools.trainer_for(
        edge_case,
        folder,
        model,
        TreeRPOTrainer,
        None,
        branches=[2],
        denoising_steps=2,
        block_length=None,
        epsilon=settings["epsilon"],
        beta=settings["beta"],
        distillation=settings["self_distillation_lambda_max"] if distils else 0.0,
        distillation_steps=settings["max_steps"],
    )
    trainer.estimator = RecordedSteps(Edges((1,), (0.0, 1.0)))
    trainer.state.global_step = settings["global_step"]
    old, ref = (torch.tensor(inputs[name])[:, None] if inputs[name] else None for name in ("old_logps", "ref_logps"))
    batch = tools.batch_of(edge_case, old=old, ref=ref)
    batch["canvas_valid"] = torch.ones_like(scored)
    batch["commit_step"] = torch.where(written, 0, torch.where(filled, 1, -1))
    batch["hinted"] = ~scored & ~written  # neither open slots nor what is behind the end is scored
    batch["commit_step"] = batch["commit_step"].masked_fill(batch["hinted"] & ~filled, -1)
    batch["step_advantages"] = torch.tensor(inputs["advantages"], dtype=torch.float64)[:, None, None]
    strength, tau = rising(settings["global_step"], settings["max_steps"], trainer.args.distillation)
    if distils:
        weight, log_q, cells = torch.zeros(after.shape).double(), torch.zeros(after.shape).double(), 0
        for group in set(inputs["group_ids"]):
            rows = torch.tensor([i for i, g in enumerate(inputs["group_ids"]) if g == group])
            found = foreseen(after[rows], scored[rows], batch["step_advantages"][rows, 0, 0], tau)
            weight[rows], log_q[rows], cells = found[0], found[1], cells + int(found[2].sum())
        batch |= {"foreseen": weight, "foreseen_log_q": log_q}
        batch["foreseen_slots"] = torch.full((len(after),), float(cells))
    found_scores: list[Tensor] = []
    compared = trainer.compared

    def kept(scores: Tensor) -> Tensor:
        found_scores.append(compared(scores))
        return found_scores[-1]

    trainer.compared = kept
    loss = trainer._compute_loss(trainer.model, batch)
    tools.compare("logps", found_scores[-1], outputs["logps"])
    check_metrics(case, trainer, scored, found_scores[-1], strength, tau)
    tools.compare_loss(case, loss, model)
    return Verdict(equal=True)


def check_advantages(case: Case) -> None:
    """Those of all edges, from the rewards of leaves; the tree is one of two levels."""
    from rl4dlm.algorithms.tree_rpo import edge_advantages

    parents, rewards = case.inputs["edge_parent"], torch.tensor(case.inputs["leaf_rewards"], dtype=torch.float64).T
    first = parents.count(0)
    second = parents.count(1)
    assert parents == [0] * first + [node for node in range(1, first + 1) for _ in range(second)]
    found = edge_advantages(rewards, [first, second])  # [P, leaves, 2]
    edges = torch.cat([found[:, ::second, 0], found[..., 1]], dim=1)
    tools.compare("edge_advantages", edges.T, case.outputs["edge_advantages"])


def check_metrics(case: Case, trainer: object, scored: Tensor, scores: Tensor, strength: float, tau: float) -> None:
    """The parts of the loss that the reference logs."""
    recorded, logged = case.outputs["metrics"], trainer._metrics["train"]  # type: ignore[attr-defined]
    settings, scores = case.settings, scores.detach()
    ratio = (scores - torch.tensor(case.inputs["old_logps"], dtype=torch.float64)).exp()
    parts = {"local_loss": case.outputs["loss"], "kl_penalty_local": 0.0}
    for name, outside in (("hi", ratio > 1 + settings["epsilon"]), ("lo", ratio < 1 - settings["epsilon"])):
        parts[f"local_clip_ratio_{name}"] = float((outside & scored).sum() / scored.sum())
    if settings["beta"]:
        estimate = kl_estimate(scores - torch.tensor(case.inputs["ref_logps"], dtype=torch.float64), "k3")
        means = (estimate * scored).sum(-1) / scored.sum(-1).clamp(min=1)
        parts["kl_penalty_local"] = settings["beta"] * float(means.mean())
    if strength:
        parts |= {"lambda_t": strength, "tau_t": tau}
        parts["self_distillation_loss"] = logged["diffusion/foreseen_divergence"][-1]
        parts["self_distillation_loss*lambda_t"] = strength * parts["self_distillation_loss"]
    parts["local_loss"] -= parts["kl_penalty_local"] + parts.get("self_distillation_loss*lambda_t", 0.0)
    assert parts == pytest.approx(recorded, abs=tools.LOSS_TOLERANCE)
