"""CJ-GRPO: scores of recorded steps, losses, gradients and metrics.

The reference scores the whole canvas, attends to padding, and takes the mean over the tokens of a step of the whole
micro-batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.step_selectors import AllSteps
from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.likelihood.views import Rows
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"per_token_logps", "tokens_per_step", "loss", "metrics", "grad"}
JOINT = "CJ-GRPO's code averages a step's tokens over the micro-batch; here each completion has means of its own"
METRICS = (
    "CJ-GRPO's metrics are means over steps of means over the micro-batch, clip_ratio of one that compares wrongly"
)
SCORES = 1e-5  # the reference keeps log-probabilities of steps in float32


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: scores, tokens of each step, loss, gradients, metrics."""
    from rl4dlm.algorithms.cj_grpo import CJGRPOTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model = case.settings, case.outputs, tools.model_of(case)
    prompts, completions = tools.ids_of(case)
    ones, step = torch.ones_like(completions), torch.tensor(case.inputs["step_map"])
    rows = Rows(
        prompts, torch.ones_like(prompts), completions, ones, torch.arange(len(prompts)), commit_step=step
    )  # fmt: skip
    with torch.no_grad():
        views = RecordedSteps(AllSteps(), "canvas").draw(rows, seed=0, iteration=0)
        scores = score_views(model, spec_of(case), rows.ids, rows.attention_mask, views).log_probs.sum(1)
    if "per_token_logps" in outputs:
        tools.compare("per_token_logps", scores, outputs["per_token_logps"], SCORES)
    if "tokens_per_step" in outputs:
        counts = (step[:, None] == torch.arange(settings["steps"])[:, None]).sum(-1)
        assert counts.tolist() == outputs["tokens_per_step"]

    trainer = tools.trainer_for(
        case,
        folder,
        model,
        CJGRPOTrainer,
        views,
        scope="canvas",
        epsilon=settings["epsilon"],
        beta=settings["beta"],
        cfg_scale=settings.get("cfg_scale") or 0.0,
    )
    trainer.estimator = trainer.build_estimator()
    fixed = {name: case.inputs.get(f"{name}_per_token_logps") for name in ("old", "ref")}
    batch = tools.batch_of(
        case, **{name: torch.tensor(value)[:, None] for name, value in fixed.items() if value is not None}
    )
    batch |= {"completion_mask": ones, "canvas_valid": ones.bool(), "commit_step": step}

    def ours() -> Tensor:
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        return loss

    def literal() -> Tensor:
        trainer._aggregated = lambda losses, *_: joint(losses, step, settings["steps"])
        return ours()

    verdict = tools.verdict(case, ours, literal, model, JOINT)
    recorded = outputs.get("metrics") or {}
    for name, value in metrics(scores, batch, settings).items():
        if name in recorded:
            assert value == pytest.approx(recorded[name], abs=tools.LOSS_TOLERANCE), name
    logged = trainer._metrics["train"]
    same = all(name in logged and logged[name][-1] == pytest.approx(v, abs=2e-5) for name, v in recorded.items())
    return Verdict(verdict.equal, verdict.rules | (frozenset() if same else frozenset({METRICS})))


def joint(values: Tensor, step: Tensor, steps: int) -> Tensor:
    """The mean over steps of the mean over all tokens that rows wrote in that step."""
    of_step = [(step == k).to(values) for k in range(steps)]
    return sum((values * where).sum() / where.sum() for where in of_step) / steps  # type: ignore[return-value]


def metrics(scores: Tensor, batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """What the reference logs."""
    step, steps, found = batch["commit_step"], settings["steps"], {}
    old, ref = (batch.get(f"{name}_per_token_logps") for name in ("old", "ref"))
    if ref is not None:
        d = ref[:, 0] - scores
        found["kl"] = joint(d.exp() - d - 1, step, steps).item()
    ratio = (scores - (scores if old is None else old[:, 0])).exp()
    advantages, epsilon = batch["advantages"][:, None], settings["epsilon"]
    plain, clipped = ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    found["clip_ratio"] = joint((plain < clipped).double(), step, steps).item()
    return found
