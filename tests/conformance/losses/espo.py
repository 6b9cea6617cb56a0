"""ESPO: evidence lower bounds of both policies in the recorded pairs of views, and losses of the recorded micro-batch.

The reference noises and scores the whole canvas.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

ENTROPY = "the metric entropy of ESPO is minus the bound per token; the loss does not use it"
EXTREMES = "the metrics clip_ratio/low_min and high_max of ESPO are extremes over processes, TRL's over completions"
BOUND_TOLERANCE = 2e-6  # per token of the canvas


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: bounds, loss, gradients, metrics."""
    outputs = case.outputs
    unknown = {name for name in outputs if name not in ("loss", "grad", "metrics") and _kind(name) is None}
    assert outputs and not unknown, f"nothing known computes {', '.join(unknown)}"
    count = case.settings["num_mc"]
    for name, value in outputs.items():
        if (kind := _kind(name)) is None or value is None:
            continue
        model = tools.model_of(case, "ref_model" if name.startswith("ref_") else "model")
        complement, draws = {"reduce_var": (True, count), "plain": (False, count), "first_seed": (True, 1)}[kind]
        iterations = range(len(case.noise["per_seed"]) // count)
        found = torch.stack([bounds(case, model, n, draws, complement) for n in iterations], dim=1)
        length = tools.ids_of(case)[1].shape[1]
        torch.testing.assert_close(found, torch.tensor(value).double(), rtol=0, atol=BOUND_TOLERANCE * length)
    if not {"loss", "grad", "metrics"} & set(outputs):
        return Verdict(equal=True)

    from rl4dlm.algorithms.espo import ESPOTrainer

    settings, model = case.settings, tools.model_of(case)
    iteration = settings.get("this_itr_idx", 0)
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        ESPOTrainer,
        views(case, iteration, count, complement=True),
        num_views=2 * count,
        **tools.ratio_settings(case),
        kl_estimator=settings.get("kl", "k2"),
        scope="canvas",
    )
    batch = tools.batch_of(case, old=per_token(case, "old_elbo"), ref=per_token(case, "ref_elbo"))
    batch["completion_mask"] = torch.ones_like(batch["completion_ids"])
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    if "loss" in outputs:
        assert loss.item() == pytest.approx(outputs["loss"], abs=tools.LOSS_TOLERANCE)
    if "grad" in outputs:
        tools.compare_gradients(outputs["grad"], model, spec_of(case).mask_token_id)
    return Verdict(equal=True, rules=compare_metrics(case, model, trainer._metrics["train"]))


def compare_metrics(case: Case, model: LlamaForCausalLM, logged: dict[str, list[float]]) -> frozenset[str]:
    """Recorded metrics against logged ones, and the rules by which some of them differ."""
    recorded = case.outputs.get("metrics") or {}
    bound = bounds(case, model, case.settings.get("this_itr_idx", 0), case.settings["num_mc"], complement=True)
    literal = {
        "entropy": (ENTROPY, -bound.mean().item() / tools.ids_of(case)[1].shape[1]),
        "clip_ratio/low_min": (EXTREMES, logged["clip_ratio/low_mean"][-1]),
        "clip_ratio/high_max": (EXTREMES, logged["clip_ratio/high_mean"][-1]),
    }
    rules = set()
    for name, value in recorded.items():
        rule, expected = literal.get(name, ("", logged[name][-1]))
        assert expected == pytest.approx(value, abs=tools.LOSS_TOLERANCE), name
        if rule and logged[name][-1] != pytest.approx(value, abs=tools.LOSS_TOLERANCE):
            rules.add(rule)
    return frozenset(rules)


def _kind(name: str) -> str | None:
    """How a recorded bound was estimated, by its name."""
    words = name.removeprefix("ref_").removeprefix("elbo_").removeprefix("mc_")
    return words if "elbo_" in name and words in ("reduce_var", "plain", "first_seed") else None


def views(case: Case, iteration: int, draws: int, complement: bool) -> Views:
    """The first of the recorded views of an inner iteration."""
    prompts, completions = tools.ids_of(case)
    first = iteration * case.settings["num_mc"]
    each = [torch.tensor(seed["is_mask"]) for seed in case.noise["per_seed"][first : first + draws]]
    mask = torch.stack(each, dim=1)[..., prompts.shape[1] :].bool()  # [B, J, L]
    ones = torch.ones_like(completions)
    rows = Rows(prompts, torch.ones_like(prompts), completions, ones, torch.arange(len(prompts)))
    return estimator(draws, complement).views(rows, mask, torch.zeros(mask.shape[:2]))  # counts give the weights


def estimator(draws: int, complement: bool) -> ELBO:
    """As ESPO estimates a bound."""
    return ELBO(2 * draws if complement else draws, "count_with_zero", complement, scope="canvas")


@torch.no_grad()
def bounds(case: Case, model: LlamaForCausalLM, iteration: int, draws: int, complement: bool) -> Tensor:
    """Bounds `[B]` in the recorded views; the reference attends to everything, padding included."""
    ids, shown = torch.cat(tools.ids_of(case), dim=1), views(case, iteration, draws, complement)
    found = score_views(model, spec_of(case), ids, torch.ones_like(ids), shown)
    return estimator(draws, complement).reduce(found.log_probs, shown).sum(-1).double()


def per_token(case: Case, name: str) -> Tensor | None:
    """Recorded bounds `[B, n]` as scores of tokens `[B, n, L]` with these sums."""
    if case.inputs.get(name) is None:
        return None
    sums = torch.tensor(case.inputs[name], dtype=torch.float64)[..., None]
    return torch.nn.functional.pad(sums, (0, tools.ids_of(case)[1].shape[1] - 1))
