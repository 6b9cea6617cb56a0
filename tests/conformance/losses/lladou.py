"""LLaDOU: utilities of slots, log-probabilities of steps and of their tokens, losses, gradients of model and policy.

Prompts are padded on the right in the reference, and what follows the completion is hidden; here they are padded on
the left. The reference's number of completions with an advantage is one of each prompt's group, with 1e-5 added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.choices import Choices, choices_of
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.step_selectors import AllSteps
from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.likelihood.views import Rows, StepFacts, Views
from rl4dlm.models.distributions import HiddenStates
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.rollout.policies.hidden_states import HiddenStatePolicy, LinearPolicy, UnmaskingPolicyModule
from rl4dlm.rollout.policies.policy import Seen, attach_policy
from rl4dlm.training.clipping import Clip, surrogate
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {
    "position_scores", "step_log_probs", "step_token_log_probs", "loss", "loss_per_step", "grad",
    "unmasking_policy_grad_norm",
}  # fmt: skip
OURS = {
    "weight": "weight",
    "time_embedding.mlp.0": "time_in",
    "time_embedding.mlp.2": "time_out",
    "norm_out_1.modulation": "before.modulation",
    "norm_out_2.modulation": "behind.modulation",
    "mask_linear": "utility",
    "mask_embedding": "is_masked",
    "block_embedding": "is_inside",
}
"""The reference's names of weights, and ours."""

SCORES = 3e-5  # the reference keeps log-probabilities of tokens in float32
UTILITIES = 1e-5  # and its utilities


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: utilities, scores of steps, loss, gradients."""
    from rl4dlm.algorithms.lladou import LLaDOUTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, inputs, outputs = case.settings, case.inputs, case.outputs
    assert settings["num_head_layers"] == 0 and settings.get("gain", 1.0) == 1.0
    model = attach_scoring(tools.model_of(case))
    policy = attach_policy(model, policy_of(case))
    rows = rows_of(case)
    views = RecordedSteps(AllSteps(), "canvas").draw(rows, seed=0, iteration=0)
    choices = choices_of(rows, views, block_length=settings["block_length"], steps=settings["steps"])
    with torch.no_grad():
        found = score_views(
            model,
            spec_of(case),
            rows.ids,
            rows.attention_mask,
            views,
            temperature=settings["temperature"],
            choices=choices,
        )
        assert found.choices is not None
        utilities = utilities_of(model, policy, rows, views, choices)
    tools.compare("position_scores", utilities, outputs["position_scores"], UTILITIES)
    tools.compare("step_token_log_probs", found.log_probs.sum(-1), outputs["step_token_log_probs"], SCORES)
    scores = (found.log_probs + found.choices).sum(-1)
    tools.compare("step_log_probs", scores, outputs["step_log_probs"], SCORES)
    advantages = torch.tensor(inputs["advantages"], dtype=torch.float64)
    losses = surrogate(torch.zeros_like(scores), scores, advantages[:, None], Clip("ppo", settings["eps"]))
    scale = settings["steps"] * (inputs["valid_samples"] + 1e-5)
    tools.compare("loss_per_step", losses.sum(0) / scale, outputs["loss_per_step"], 1e-9)

    trainer = tools.trainer_for(
        case,
        folder,
        model,
        LLaDOUTrainer,
        views,
        epsilon=settings["eps"],
        temperature=settings["temperature"],
        denoising_steps=settings["steps"],
        block_length=settings["block_length"],
    )
    trainer.estimator = trainer.build_estimator()
    assert int((advantages != 0).sum()) == inputs["valid_samples"]
    loss = trainer._compute_loss(trainer.model, batch_of(rows, advantages))
    model.zero_grad()
    loss.backward()
    assert loss.item() == pytest.approx(outputs["loss"], abs=1e-9)
    norms = {name: weight.grad.norm().item() for name, weight in policy.named_parameters()}  # type: ignore[union-attr]
    for name, value in outputs["unmasking_policy_grad_norm"].items():
        assert norms[our(name)] == pytest.approx(value, abs=1e-4 * max(1.0, value)), name
    del model.unmasking_policy
    tools.compare_gradients(outputs["grad"], model, spec_of(case).mask_token_id)
    return Verdict(equal=True)


def our(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    return f"{OURS[stem]}.{kind}" if stem else OURS[name]


def policy_of(case: Case) -> HiddenStatePolicy:
    """The recorded policy; its weights are those of the case."""
    settings, recorded = case.settings, case.inputs["unmasking_policy"]
    weights = {our(name): torch.tensor(value, dtype=torch.float64) for name, value in recorded.items()}
    policy: HiddenStatePolicy
    if settings["unmasking_policy"] == "linear":
        policy = LinearPolicy(len(weights["weight"]))
    else:
        size = len(weights["time_in.bias"])
        policy = UnmaskingPolicyModule(size, frequencies=settings["frequency_embedding_size"], layers=0)
    policy.load_state_dict(weights, assign=True)
    return policy


def rows_of(case: Case) -> Rows:
    """The recorded rows with left padding, and the order in which their steps chose."""
    inputs = case.inputs
    width, canvas = max(inputs["prompt_lengths"]), torch.tensor(inputs["completion_ids"])
    prompts = torch.zeros(len(canvas), width, dtype=torch.long)
    mask = torch.zeros_like(prompts)
    for row, prompt in enumerate(inputs["prompt_ids"]):
        prompts[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    order = torch.tensor(inputs["order"])  # [B, S, K]
    places = torch.arange(order.shape[2]).expand_as(order)
    rank = torch.full_like(canvas, -1).scatter(-1, order.flatten(1), places.flatten(1))
    step = torch.tensor(inputs["step_map"])
    ids = torch.arange(len(canvas))
    ones = torch.ones_like(canvas)
    return Rows(prompts, mask, canvas, ones, ids, commit_step=step, facts=StepFacts(rank=rank))


def utilities_of(model: Any, policy: HiddenStatePolicy, rows: Rows, views: Views, choices: Choices) -> Tensor:
    """Of all slots in each view, `[B, K, L]`."""
    length = rows.canvas_ids.shape[1]
    found = []
    for k in range(views.hidden.shape[1]):
        ids = views.apply(rows.ids, model.config.diffusion["mask_token_id"])[:, k]
        (states,) = model(
            input_ids=ids,
            attention_mask=rows.attention_mask,
            score_positions=torch.arange(ids.shape[1]).expand_as(ids) >= ids.shape[1] - length,
            score_reduce=HiddenStates(),
        )
        masked, inside, exists = choices.flags[:, k].unbind(-1)
        found.append(policy(Seen(states.view(len(ids), length, -1), masked, inside, exists, choices.time[:, k])))
    return torch.stack(found, dim=1)


def batch_of(rows: Rows, advantages: Tensor) -> dict[str, Tensor]:
    """The rows in the trainer's form."""
    assert rows.commit_step is not None and rows.facts is not None and rows.facts.rank is not None
    ones = torch.ones_like(rows.canvas_ids)
    return {
        "prompt_ids": rows.prompt_ids,
        "prompt_mask": rows.prompt_mask.long(),
        "completion_ids": rows.canvas_ids,
        "completion_mask": ones,
        "canvas_ids": rows.canvas_ids,
        "canvas_valid": ones.bool(),
        "advantages": advantages,
        "num_items_in_batch": ones.sum(),
        "row_ids": rows.row_ids,
        "drawn": torch.zeros_like(ones).bool(),
        "drawn_log_probs": torch.zeros(ones.shape),
        "commit_step": rows.commit_step,
        "commit_rank": rows.facts.rank,
    }
