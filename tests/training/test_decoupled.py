"""Rewards that are normalised apart: what they do not depend on, and that wrong answers earn nothing for speed."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.training.decoupled import group_advantages, kept_groups, normalised

NAN = float("nan")


def test_scales() -> None:
    values = torch.tensor([[1.0, 3.0, 5.0, NAN], [2.0, 2.0, 2.0, 2.0]])
    z = 1.5**0.5
    expected = {
        "z_score": [[-z, 0, z, 0], [0] * 4],
        "min_max": [[0, 0.5, 1, 0], [0.5] * 4],
        "none": [[1, 3, 5, 0], [2] * 4],
    }
    for kind, found in expected.items():
        torch.testing.assert_close(
            normalised(values, kind), torch.tensor(found, dtype=torch.float64), rtol=0, atol=1e-12
        )
    with pytest.raises(ValueError, match="normalisation='log' is not allowed; choose one of z_score, min_max, none"):
        normalised(values, "log")
    assert not normalised(torch.full((1, 7), 0.1 + 0.2), "z_score").any(), "equal rewards, whatever their last digit"


def test_a_change_of_units_changes_nothing() -> None:
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in ("z_score", "min_max"):
        torch.testing.assert_close(normalised(7 * rewards - 3, kind), normalised(rewards, kind), rtol=0, atol=1e-12)


def test_a_gate_compares_those_among_it_alone() -> None:
    """Of eight completions two are right, and one of the wrong ones is twice as fast."""
    right = torch.tensor([[True, True, *[False] * 6]])
    speed = torch.tensor([[4.0, 5.0, 9.0, *[4.5] * 5]])
    accuracy = normalised(right.double(), "z_score")
    published = accuracy + normalised(speed, "z_score")
    assert int(published.argmax()) == 2, "the published sum pays the wrong one most"
    gated = normalised(speed, "z_score", right)
    torch.testing.assert_close(gated, torch.tensor([[-1.0, 1.0, *[0.0] * 6]]).double())
    total = accuracy + gated
    assert int(total.argmax()) == 1 and bool((total[~right] < total[right].min()).all())


def test_groups_that_are_kept() -> None:
    right = torch.tensor([[True, False], [False, False], [True, True], [True, False]])
    speed = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 3.0], [1.0, NAN]])
    assert kept_groups(right, speed, 0.01).tolist() == [True, False, False, False]
    assert kept_groups(right, speed, 0.0).tolist() == [True, False, True, True]


def test_advantages_are_of_the_groups_that_are_kept() -> None:
    rewards, kept = torch.tensor([[1.0, 3.0], [50.0, 60.0], [2.0, 2.0]]), torch.tensor([True, False, True])
    batch = group_advantages(rewards, "batch", kept)
    values = torch.tensor([1.0, 3.0, 2.0, 2.0]).double()
    torch.testing.assert_close(batch[kept].flatten(), (values - 2) / values.std())
    assert not batch[1].any()
    group = group_advantages(rewards, "group", kept)
    torch.testing.assert_close(group[0], torch.tensor([-1.0, 1.0]).double() / 2**0.5)
    assert not group[1:].any()
    assert group_advantages(rewards, "center", kept)[0].tolist() == [-1.0, 1.0]
    assert not group_advantages(rewards, "batch", torch.zeros(3).bool()).any()


def test_completions_that_could_not_be_scored_are_in_no_mean():
    rewards, known = torch.tensor([[1.0, -1.0, 0.0, -1.0]] * 2), torch.tensor([[True, True, False, True]] * 2)
    kept = torch.ones(2).bool()
    center = group_advantages(rewards, "center", kept, known)
    torch.testing.assert_close(center[0], torch.tensor([4 / 3, -2 / 3, 0.0, -2 / 3], dtype=torch.float64))
    for kind in ("group", "batch"):
        alone = group_advantages(rewards[:, [0, 1, 3]], kind, kept)
        torch.testing.assert_close(group_advantages(rewards, kind, kept, known)[:, [0, 1, 3]], alone)
