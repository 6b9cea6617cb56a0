"""coupled-GRPO: scores of both policies in the recorded pairs of views, and losses of the recorded micro-batch.

The reference noises the whole canvas, tokens behind the end included, and averages over the tokens of a micro-batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

METRICS = "the metrics kl and clip_ratio of coupled-GRPO multiply every row by the masks of all rows; the loss is right"
TOLERANCE = 1e-5  # the reference rounds log-probabilities to float32 before it multiplies them by up to 5
ESTIMATOR = Coupled(scope="canvas")


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: scores, loss, gradients, metrics."""
    outputs = case.outputs
    unknown = set(outputs) - {"per_token_logps", "ref_per_token_logps", "loss", "grad", "metrics"}
    assert outputs and not unknown, f"nothing known computes {', '.join(unknown)}"
    for name in ("per_token_logps", "ref_per_token_logps"):
        if outputs.get(name) is not None:
            model = tools.model_of(case, name.removesuffix("per_token_logps") + "model")
            found = torch.stack([scores(case, model, n) for n in range(len(drawn(case)))], dim=1)
            torch.testing.assert_close(found.double(), torch.tensor(outputs[name]).double(), rtol=0, atol=TOLERANCE)
    if not {"loss", "grad", "metrics"} & set(outputs):
        return Verdict(equal=True)

    from rl4dlm.algorithms.coupled_grpo import CoupledGRPOTrainer

    settings, model = case.settings, tools.model_of(case)
    iteration = settings.get("this_itr_idx", 0)
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        CoupledGRPOTrainer,
        views(case, iteration),
        **tools.ratio_settings(case),
        loss_type="bnpo",
        scope="canvas",
    )
    batch = tools.batch_of(case, old=case.inputs.get("old_per_token_logps"), ref=case.inputs.get("ref_per_token_logps"))
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    if "loss" in outputs:
        assert loss.item() == pytest.approx(outputs["loss"], abs=tools.LOSS_TOLERANCE)
    if "grad" in outputs:
        tools.compare_gradients(outputs["grad"], model, spec_of(case).mask_token_id)
    recorded, logged = outputs.get("metrics") or {}, trainer._metrics["train"]
    literal = metrics(case, model, batch)
    for name, value in recorded.items():
        assert literal[name] == pytest.approx(value, abs=tools.LOSS_TOLERANCE), name
    same = all(logged[name][-1] == pytest.approx(value, abs=tools.LOSS_TOLERANCE) for name, value in recorded.items())
    return Verdict(equal=True, rules=frozenset() if same else frozenset({METRICS}))


def drawn(case: Case) -> list[dict[str, Any]]:
    """What was drawn, per inner iteration; a loss may record its own iteration's alone."""
    each: list[dict[str, Any]] = case.noise.get("per_seed") or [case.noise]
    return each


def views(case: Case, iteration: int) -> Views:
    """The recorded views of an inner iteration."""
    each = drawn(case)
    noise = each[iteration if len(each) > 1 else 0]
    prompts, completions = tools.ids_of(case)
    mask = torch.tensor(noise["is_mask"]).bool()[:, prompts.shape[1] :]
    level = torch.full((len(mask), 1), noise["mask_ratio"], dtype=torch.float64)
    ones = torch.ones_like(completions)
    rows = Rows(prompts, torch.ones_like(prompts), completions, ones, torch.arange(len(prompts)))
    return ESTIMATOR.views(rows, mask[:, None], level)


@torch.no_grad()
def scores(case: Case, model: LlamaForCausalLM, iteration: int) -> Tensor:
    """Scores `[B, L]` in the recorded views; the reference attends to everything, padding included."""
    ids, shown = torch.cat(tools.ids_of(case), dim=1), views(case, iteration)
    found = score_views(model, spec_of(case), ids, torch.ones_like(ids), shown)
    return ESTIMATOR.reduce(found.log_probs, shown)


def metrics(case: Case, model: LlamaForCausalLM, batch: dict[str, Tensor]) -> dict[str, float]:
    """What the reference logs: `[B, 1, L]` values against `[B, L]` masks and `[B, 1]` advantages."""
    settings, mask = case.settings, batch["completion_mask"]
    iteration = settings.get("this_itr_idx", 0)
    now = scores(case, model, iteration)[:, None].double()

    def of(name: str) -> Tensor | None:
        return batch[name][:, [min(iteration, batch[name].shape[1] - 1)]] if name in batch else None

    def mean(values: Tensor) -> float:
        return ((values * mask).sum() / mask.sum()).item()

    old, reference = of("old_per_token_logps"), of("ref_per_token_logps")
    ratio, advantages = (now - (now if old is None else old)).exp(), batch["advantages"][:, None]
    low = (ratio < 1 - settings["epsilon_low"]) & (advantages < 0)
    high = (ratio > 1 + settings["epsilon_high"]) & (advantages > 0)
    found = {f"clip_ratio/low_{of_all}": mean(low) for of_all in ("mean", "min")}
    found |= {f"clip_ratio/high_{of_all}": mean(high) for of_all in ("mean", "max")}
    found["clip_ratio/region_mean"] = mean(low | high)
    if reference is not None:
        found["kl"] = mean((reference - now).exp() - (reference - now) - 1)
    return found
