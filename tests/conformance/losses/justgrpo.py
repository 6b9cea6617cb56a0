"""JustGRPO: advantages, scores of every token, losses and gradients of recorded completions.

The reference scores the whole canvas, attends to padding, and orders rows by generation, then prompt.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows
from rl4dlm.training.advantages import scaled
from rl4dlm.training.clipping import Clip, surrogate
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"advantages", "loss", "loss_per_position", "per_token_logps", "nfe_forward_calls", "grad"}
SHARE = "JustGRPO's code divides by the number of completions with an advantage and 1e-5, times a gain; here by all"


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: advantages, forwards, scores, losses per position, loss and gradients."""
    from rl4dlm.algorithms.justgrpo import JustGRPOTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model = case.settings, case.outputs, tools.model_of(case)
    prompts, completions = tools.ids_of(case)
    count, length = completions.shape
    ones = torch.ones_like(completions)
    rows = Rows(prompts, torch.ones_like(prompts), completions, ones, torch.arange(count))
    views = LeftToRight(scope="canvas").draw(rows, seed=0, iteration=0)
    advantages = group_advantages(torch.tensor(case.inputs["rewards"], dtype=torch.float64), settings["group_size"])
    scale = settings.get("gain", 1.0) / length / (case.inputs["valid_samples"] + 1e-5)
    with torch.no_grad():
        found = score_views(
            model, spec_of(case), rows.ids, rows.attention_mask, views, temperature=settings["temperature"]
        )
        scores = LeftToRight(scope="canvas").reduce(found.log_probs, views)
    if "advantages" in outputs:
        tools.compare("advantages", advantages, outputs["advantages"])
    if "nfe_forward_calls" in outputs:
        assert views.hidden.shape[1] == outputs["nfe_forward_calls"]
    if "per_token_logps" in outputs:
        tools.compare("per_token_logps", scores, outputs["per_token_logps"])
    if "loss_per_position" in outputs:
        losses = surrogate(torch.zeros_like(scores), scores, advantages[:, None], Clip("ppo", settings["eps"]))
        tools.compare("loss_per_position", losses.sum(0) * scale, outputs["loss_per_position"])
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        JustGRPOTrainer,
        views,
        scope="canvas",
        loss_type="dr_grpo",
        epsilon=settings["eps"],
        beta=0.0,
        temperature=settings["temperature"],
        score_temperature=settings["temperature"],
    )
    batch = tools.batch_of(case, advantages=advantages)
    batch["completion_mask"] = ones

    def ours() -> Tensor:
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        return loss

    # dr_grpo is a mean over rows of sums over the length of the canvas.
    return tools.verdict(case, ours, lambda: ours() * count * length * scale, model, SHARE)


def group_advantages(rewards: Tensor, size: int) -> Tensor:
    """Of rows in the order of the reference, as TRL has them: above the group's mean, over its deviation."""
    groups = rewards.view(size, -1).T  # [N, G]
    return scaled(groups - groups.mean(-1, keepdim=True), groups, "group").T.flatten()
