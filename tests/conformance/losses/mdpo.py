"""MDPO: advantages of steps, which of them are chosen, scores of their predictions, losses and gradients.

The reference attends to padding. Each of its processes chooses the steps of its own rows, weighs tokens by what the
schedule ranks by, and averages over the open slots of all its rows: where rows have as many, and the schedule ranks by
probabilities, that is the loss here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"advantages", "chosen_steps", "loss", "loss_per_step", "per_token_logps", "ref_per_token_logps", "grad"}
ROUNDING = "MDPO's code divides by |M| + 1e-4, and by the open slots of all rows of a process instead of each row's own"


def run(case: Case, folder: Path) -> Verdict:
    """Compares advantages, chosen steps, scores, loss and gradients."""
    from rl4dlm.algorithms.mdpo import MDPOTrainer, chosen_steps, step_advantages

    tools.check_outputs(case, OUTPUTS)
    settings, inputs, outputs, model = case.settings, case.inputs, case.outputs, tools.model_of(case)
    rewards = torch.tensor(inputs["step_rewards"], dtype=torch.float64)
    advantages = step_advantages(rewards[None])[0]
    tools.compare("advantages", advantages, outputs["advantages"], tools.LOSS_TOLERANCE)
    rows, count = torch.tensor(settings["rows_in_process"]), settings["sample_train_steps"]
    chosen = chosen_steps(advantages[rows][None], count)[0]
    score = advantages[rows].abs().sum(0)
    recorded = torch.tensor(outputs["chosen_steps"])
    tools.compare("chosen_steps", score[recorded], score[chosen])  # of equal ones torch.topk takes any
    completions = torch.tensor(inputs["completion_ids"])[rows]
    prompts = torch.tensor(inputs["prompt_ids"]).expand(len(rows), -1)
    given = {"prompt_ids": prompts.tolist(), "completion_ids": completions.tolist()}
    rows_case = replace(case, inputs={**inputs, **given, "completion_mask": torch.ones_like(completions).tolist()})
    trainer = tools.trainer_for(
        rows_case,
        folder,
        model,
        MDPOTrainer,
        None,
        denoising_steps=settings["steps"],
        block_length=settings["block_length"],
        num_trained_steps=count,
        temperature=settings["temperature"],
        score_temperature=settings["temperature"],
        epsilon=settings["epsilon"],
        beta=settings["beta"],
        stop_at_eos=True,
    )
    trainer.estimator = trainer.build_estimator()
    picked = {
        name: torch.tensor(inputs[f"step_{name}"])[rows][:, recorded]
        for name in ("inputs", "predictions", "confidence")
    }
    reference = outputs["ref_per_token_logps"]
    batch = tools.batch_of(rows_case, advantages=torch.zeros(len(rows)))
    batch["prompt_mask"] = torch.tensor(inputs["prompt_mask"]).expand(len(rows), -1)
    batch |= {
        "step_states": picked["inputs"],
        "step_predictions": picked["predictions"],
        "step_confidence": picked["confidence"].double(),
        "prediction_advantages": advantages[rows][:, recorded],
    }
    if reference is not None:
        batch["ref_per_token_logps"] = torch.tensor(reference, dtype=torch.float64)[:, None]
    for name, weights in (("per_token_logps", "model"), ("ref_per_token_logps", "ref_model")):
        if outputs[name] is not None:
            scores = plain(tools.model_of(case, weights), batch, settings["temperature"])
            tools.compare(name, scores, outputs[name], 5 * tools.SCORE_TOLERANCE)
    opened = picked["inputs"] == spec_of(case).mask_token_id
    found: list[Tensor] = []
    compared = trainer.compared
    trainer.compared = lambda scores: (found.append(compared(scores)), found[-1])[1]

    def ours() -> Tensor:
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        tools.compare("per_token_logps", found[-1][opened], torch.tensor(outputs["per_token_logps"])[opened])
        return loss

    def per_step() -> Tensor:
        """The reference's, `[K]`, from our scores."""
        trainer._compute_loss(trainer.model, batch)
        scores, length = found[-1], completions.shape[1]
        number = opened.sum(-1, keepdim=True)
        ratio = (scores - scores.detach()).exp()
        losses = -ratio * batch["prediction_advantages"][..., None] * length / (number + 1e-4)
        if settings["beta"]:
            losses = losses + settings["beta"] * (batch["ref_per_token_logps"][:, 0] - scores) ** 2 / 2
        summed = (losses * batch["step_confidence"] * opened).sum((0, 2))
        return summed / (opened.sum((0, 2)) + 1e-4)

    tools.compare("loss_per_step", per_step(), outputs["loss_per_step"], tools.LOSS_TOLERANCE)
    return tools.verdict(rows_case, ours, lambda: per_step().sum(), model, ROUNDING)


@torch.no_grad()
def plain(model: Any, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """Log-probabilities `[B, K, L]` of predictions at all slots, open or not, as they are recorded."""
    found = []
    for shown, predicted in zip(batch["step_states"].unbind(1), batch["step_predictions"].unbind(1), strict=True):
        mask = torch.cat([batch["prompt_mask"], torch.ones_like(shown)], dim=1)
        hidden = mask[:, None, None].bool()
        logits = model(input_ids=torch.cat([batch["prompt_ids"], shown], dim=1), attention_mask=hidden).logits
        log_probs = (logits[:, -shown.shape[1] :] / temperature).log_softmax(-1)
        found.append(log_probs.gather(-1, predicted[..., None]).squeeze(-1))
    return torch.stack(found, dim=1)
