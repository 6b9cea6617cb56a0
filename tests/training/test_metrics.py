"""The definitions of the `diffusion/*` metrics, on rollouts written by hand."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.rollout.rollout import Rollout, Trace
from rl4dlm.training.metrics import identical_groups, rollout_gap, rollout_metrics


def test_rollout_metrics_count_what_they_say() -> None:
    # Row 0 writes four slots in two forwards. Row 1 ends at its second slot, after one forward that wrote two.
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    commit_step = torch.tensor([[0, 0, 1, 1], [0, 0, -1, -1]])
    nothing = torch.zeros(2, 4)
    rollout = Rollout(
        prompt_ids=[[5], [5]],
        canvas=torch.tensor([[7, 8, 9, 10], [7, 1, 1, 1]]),
        valid=valid,
        hinted=torch.zeros_like(valid),
        trace=Trace(commit_step, nothing, None, torch.tensor([2, 1])),
        nfe=torch.tensor([2, 1]),
        extra_forwards=torch.tensor([0, 0]),
        stop_reason=["complete", "eos"],
        row_ids=[0, 1],
        schedule="low_confidence",
        cache="none",
        exact=True,
        seed=0,
        mask_token_id=2,
    )
    assert rollout_metrics(rollout, seconds=2.0, num_processes=3) == pytest.approx(
        {
            "diffusion/nfe": 1.5,
            "diffusion/tokens_per_forward": 2.0,
            "diffusion/early_eos_share": 0.5,
            "diffusion/rollout_tokens_per_second": 9.0,
        }
    )


def test_groups_are_identical_when_their_valid_parts_are() -> None:
    canvas = torch.tensor([[5, 1, 8], [5, 1, 9], [5, 6, 1], [5, 6, 7]])
    valid = torch.tensor([[True, True, False], [True, True, False], [True, True, True], [True, True, True]])
    assert identical_groups(canvas, valid, num_generations=2) == 0.5
    assert identical_groups(canvas, torch.ones_like(valid), num_generations=2) == 0.0
    assert identical_groups(canvas, valid, num_generations=4) == 0.0


def test_the_gap_is_summed_over_masked_tokens() -> None:
    drawn = torch.tensor([[-1.0, -2.0, 0.0]])
    scores = torch.tensor([[-1.5, -1.0, -9.0]])
    total, tokens = rollout_gap(drawn, scores, torch.tensor([[1, 1, 0]])).tolist()
    assert (total, tokens) == (1.5, 2)
