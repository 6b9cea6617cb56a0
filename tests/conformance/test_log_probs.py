"""Recorded per-token log-probabilities, from the recorded masks through `score_views`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from tests.conformance import report
from tests.conformance.cases import Case, load_cases
from tests.conformance.denoisers import denoiser, spec_of

TOLERANCE = 2e-6  # the references round log-probabilities to float32


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in load_cases() if c.kind == "logps"])
def test_per_token_log_probs(case: Case):
    recorded = {
        name.removesuffix("per_token_logps"): torch.tensor(value).double()
        for name, value in case.outputs.items()
        if name.endswith("per_token_logps") and value is not None
    }
    assert recorded
    hidden = hidden_tokens(case)  # [n, B, T]
    for prefix, expected in recorded.items():
        computed = log_probs(case, hidden, denoiser(case, f"{prefix}model"))
        torch.testing.assert_close(computed.double(), expected.view(computed.shape), rtol=0, atol=TOLERANCE)
    report.equal[case.family].append(case.name)


def hidden_tokens(case: Case) -> Tensor:
    """The tokens that the reference hid, bool `[n, B, T]`, one view per iteration."""
    views: Any = case.noise.get("is_mask")
    if views is None:
        views = [seed["is_mask"] for seed in case.noise["per_seed"]]
    hidden = torch.tensor(views).bool()
    return hidden if hidden.dim() == 3 else hidden[None]


def log_probs(case: Case, hidden: Tensor, model: torch.nn.Module) -> Tensor:
    """Log-probabilities `[n, B, C]`; d1 attends to everything, padding included."""
    prompts, completions = torch.tensor(case.inputs["prompt_ids"]), torch.tensor(case.inputs["completion_ids"])
    ids = torch.cat([prompts, completions], dim=1)
    views = Views(hidden.transpose(0, 1), torch.ones(len(ids), len(hidden), completions.shape[1]))
    with torch.no_grad():
        scores = score_views(
            model,
            spec_of(case),
            ids,
            torch.ones_like(ids),
            views,
            cfg_scale=case.settings.get("cfg_scale") or 0.0,
        )
    return scores.log_probs.transpose(0, 1)
