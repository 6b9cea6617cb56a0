"""EGSPO: chosen steps, their advantages and log-probabilities, losses and gradients of one of the chosen steps.

The reference takes the chosen steps in the order of their entropies, one for all completions in a micro-step; it
attends to padding and scores the whole canvas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.algorithms.egspo import EGSPOTrainer
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.step_selectors import AllSteps, TopEntropy
from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.likelihood.views import Rows, StepFacts, Views
from rl4dlm.training.losses import kl_estimate
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"chosen_steps", "advantages_per_step", "step_log_probs", "ref_step_log_probs", "loss", "metrics", "grad"}
EXACT_KL = "EGSPO's code can have the KL term over the whole vocabulary; here it is k3 of a step's log-probability"
SCORES = 2e-5


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: steps, advantages, scores of both policies, loss, gradients, metrics."""
    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model = case.settings, case.outputs, tools.model_of(case)
    assert settings["pred_state"] == "next" and not settings["terminate_at_last_non_eos"], "not known here"
    prompts, completions = tools.ids_of(case)
    step, count = torch.tensor(case.inputs["step_map"]), settings["logps_eval_num_steps"]
    entropy = torch.tensor(case.inputs["step_entropy"], dtype=torch.float64)
    rows = Rows(
        prompts, torch.ones_like(prompts), completions, torch.ones_like(completions), torch.arange(len(prompts)),
        commit_step=step, facts=StepFacts(entropy.gather(-1, step)),
    )  # fmt: skip
    ranked = entropy.argsort(dim=-1, descending=True, stable=True)[:, :count]  # by entropy
    chosen = RecordedSteps(TopEntropy(count), "canvas").steps(rows, seed=0, iteration=0).first
    assert torch.equal(ranked.sort(-1).values, chosen)
    if "chosen_steps" in outputs:
        assert ranked.tolist() == outputs["chosen_steps"]
    if "advantages_per_step" in outputs:
        tools.compare("advantages_per_step", advantages(case), outputs["advantages_per_step"])
    whole = settings["logps_aggregation_mode"] == "sum"

    def step_scores(name: str) -> Tensor:
        scored = tools.model_of(case, name)
        views = RecordedSteps(AllSteps(), "canvas").draw(rows, seed=0, iteration=0)
        with torch.no_grad():
            found = score_views(scored, spec_of(case), rows.ids, rows.attention_mask, views).log_probs.sum(-1)
        tokens = views.scored.sum(-1)
        return (found if whole else found / tokens.clamp(min=1)).gather(-1, ranked)

    for policy, name in (("model", "step_log_probs"), ("ref_model", "ref_step_log_probs")):
        if name in outputs:
            tools.compare(name, step_scores(policy), outputs[name], SCORES)

    index = settings["eval_index"]
    step_of = ranked[:, index : index + 1]
    scored = step == step_of
    views = Views(
        torch.cat([torch.zeros_like(prompts).bool(), step >= step_of], dim=-1)[:, None], scored.double()[:, None]
    )
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        EGSPOTrainer,
        views,
        scope="canvas",
        epsilon=settings["epsilon"],
        epsilon_high=settings["epsilon_high"],
        beta=settings["beta"],
        ratio_norm="sum" if whole else "mean",
        num_scored_steps=1,
        step_lambda=settings["lambda1"],
    )
    trainer.estimator = Fixed(views)
    tokens = scored.sum(-1, keepdim=True)

    def shared(values: Any) -> Tensor:
        """A step's log-probability, shared out over its tokens."""
        each = torch.as_tensor(values, dtype=torch.float64)[:, index, None] / (tokens if whole else 1)
        return (each * scored)[:, None]

    reference = outputs.get("ref_step_log_probs")
    reference = step_scores("ref_model") if reference is None else reference
    batch = tools.batch_of(case, advantages=torch.zeros(len(prompts)), old=shared(case.inputs["old_step_log_probs"]),
                           ref=shared(reference))  # fmt: skip
    ones = torch.ones_like(completions)
    batch |= {"completion_mask": ones, "canvas_valid": ones.bool(), "commit_step": step}
    batch["commit_entropy"] = entropy.gather(-1, step)
    batch["step_advantages"] = advantages(case)[:, index, None][:, None]
    kl_of_mean = trainer._kl
    if not whole:  # of the mean of a step's log-probabilities
        trainer._kl = lambda log_probs, step, counted, batch: (
            kl_of_mean(log_probs / tokens, step, counted, scaled(batch, tokens)) * tokens
        )

    recorded = outputs.get("metrics") or {}
    for name, value in metrics(case, step_scores("model"), reference, views, model, whole).items():
        if name in recorded:
            assert value == pytest.approx(recorded[name], abs=tools.LOSS_TOLERANCE), name

    def ours() -> Tensor:
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        return loss

    def literal() -> Tensor:
        trainer._kl = lambda *_: exact_kl(case, views, model, whole) / (tokens if whole else 1)
        return ours()

    rules = (EXACT_KL,) if settings["use_exact_kl"] else ()
    return tools.verdict(case, ours, literal, model, *rules)


class Fixed(RecordedSteps):
    """The estimator with recorded views."""

    def __init__(self, views: Views) -> None:
        super().__init__(TopEntropy(1), "canvas")
        object.__setattr__(self, "views", views)

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """Those."""
        views: Views = self.views  # type: ignore[attr-defined]
        return views


def scaled(batch: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    return {**batch, "ref_per_token_logps": batch["ref_per_token_logps"] / tokens}


def advantages(case: Case) -> Tensor:
    """Ours of the recorded rewards: of each chosen step, and last of the completion."""
    settings = case.settings
    rewards = torch.tensor(case.inputs["step_rewards"], dtype=torch.float64)
    groups = rewards.view(-1, settings["num_generations"], rewards.shape[1])
    trainer: Any = type("Settings", (), {})()
    trainer.args = type("Arguments", (), {})()
    trainer.args.step_lambda = settings["lambda1"]
    trainer.args.step_baseline = "reward" if settings["standard_grpo_returns"] else "return"
    found = EGSPOTrainer.step_advantages(trainer, groups[..., -1], groups[..., :-1], {})
    assert found is not None
    share = 1.0 if settings["normalize_returns"] else 1 + settings["lambda1"]  # the code can leave out the division
    return (found * share).flatten(0, 1)


def metrics(case: Case, scores: Tensor, reference: Any, views: Views, model: Any, whole: bool) -> dict[str, float]:
    """What the reference logs, of the one chosen step."""
    settings, index = case.settings, case.settings["eval_index"]
    mine, old, ref = (
        torch.as_tensor(values, dtype=torch.float64)[:, index]
        for values in (scores, case.inputs["old_step_log_probs"], reference)
    )
    ratio, gain = (mine - old).exp(), advantages(case)[:, index]
    clipped = ratio.clamp(1 - settings["epsilon"], 1 + settings["epsilon_high"]) * gain
    k3 = kl_estimate(mine - ref, "k3").mean().item()
    with torch.no_grad():
        tokens = views.weight.shape[2] / settings["diffusion_steps"] if whole else 1.0
        exact = exact_kl(case, views, model, whole).mean().item() / tokens
    return {
        "exact_kl": exact,
        "k3_estimate_kl": k3,
        "kl": exact if settings["use_exact_kl"] else k3,
        "clip_ratio": (ratio * gain < clipped).double().mean().item(),
    }


def exact_kl(case: Case, views: Views, model: Any, whole: bool) -> Tensor:
    """The divergence from the reference over the vocabulary, of the step's tokens together, `[B, 1]`."""
    rows = torch.cat(tools.ids_of(case), dim=1)
    shown = views.apply(rows, spec_of(case).mask_token_id)[:, 0]
    scored, length = views.scored[:, 0], views.weight.shape[2]

    def log_probs(policy: Any) -> Tensor:
        found: Tensor = policy(input_ids=shown, attention_mask=torch.ones_like(shown)).logits[:, -length:]
        return found.log_softmax(-1)

    mine = (log_probs(model).exp() + 1e-10).log()
    with torch.no_grad():
        theirs = (log_probs(tools.model_of(case, "ref_model")).exp() + 1e-10).log()
    each = (mine.exp() * (mine - theirs)).sum(-1) * scored
    summed = each.sum(-1, keepdim=True)
    return summed if whole else summed / (scored.sum(-1, keepdim=True) * mine.shape[-1])
