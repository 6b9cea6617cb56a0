"""Clips of policy ratios, and weights that are normalised over groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rl4dlm.training.clipping import (
    CLIPS,
    Clip,
    clipped_units,
    effective_share,
    importance_weights,
    ratio_surrogate,
    self_normalised,
    surrogate,
)
from rl4dlm.training.losses import weighted_likelihood


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_slope(log_ratio: float, advantage: float, clip: Clip) -> tuple[float, float]:
    scores = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)  # of an old policy whose score is 0
    loss = surrogate(scores, scores, torch.tensor(advantage, dtype=torch.float64), clip)
    return loss.item(), torch.autograd.grad(loss, scores)[0].item()


@pytest.mark.parametrize("kind", ["ppo", "log"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "slope"),
    [
        (1.0, 2.0, None, -2.0, -2.0),
        (1.3, 1.0, None, -1.28, 0.0),  # above 1 + high: nothing more to gain
        (0.7, 1.0, None, -0.7, -0.7),
        (0.7, -1.0, None, 0.8, 0.0),  # below 1 - low
        (1.5, -1.0, None, 1.5, 1.5),
        (9.0, -1.0, None, 9.0, 9.0),
        (9.0, -1.0, 3.0, 3.0, 0.0),  # bounded
        (9.0, 1.0, 3.0, -1.28, 0.0),  # for A < 0 only
        (2.0, -1.0, 3.0, 2.0, 2.0),
        (4.0, 0.0, 3.0, 0.0, 0.0),
    ],
)
def test_ppos_surrogate_is_clipped(
    kind: str, ratio: float, advantage: float, dual: float | None, loss: float, slope: float
) -> None:
    clip = Clip(kind, 0.2, 0.28, dual)
    assert loss_and_slope(math.log(ratio), advantage, clip) == pytest.approx((loss, slope))
    if kind == "ppo":
        found = ratio_surrogate(torch.tensor(ratio).double(), torch.tensor(advantage).double(), clip)
        assert found.item() == pytest.approx(loss)


@pytest.mark.parametrize("low", [0.0, 0.2, 1.0, 1.5])
@pytest.mark.parametrize("dual", [None, 3.0])
def test_log_ratios_are_clipped_as_ratios_are(low: float, dual: float | None) -> None:
    log_ratio, advantages = 2 * numbers(200), numbers(200, seed=1)
    log_ratio[:3] = 0.0
    log_ratio.requires_grad_()
    losses = [surrogate(log_ratio, log_ratio, advantages, Clip(kind, low, 0.28, dual)) for kind in ("ppo", "log")]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-14)
    slopes = [torch.autograd.grad(loss.sum(), log_ratio)[0] for loss in losses]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-13)


def test_what_log_ratios_clip_may_overflow() -> None:
    assert loss_and_slope(1000.0, 1.0, Clip("log", 0.2)) == pytest.approx((-1.2, 0.0))
    assert loss_and_slope(1000.0, 0.0, Clip("log", 0.2)) == (0.0, 0.0)
    assert loss_and_slope(1000.0, -1.0, Clip("log", 0.2, dual=3.0)) == pytest.approx((3.0, 0.0))
    assert math.isnan(loss_and_slope(1000.0, 0.0, Clip("ppo", 0.2))[0])


@pytest.mark.parametrize("kind", CLIPS)
def test_on_policy_every_clip_has_the_gradient_of_the_log_probability(kind: str) -> None:
    scores, advantages = numbers(8, 5).requires_grad_(), numbers(8, 1, seed=1)
    loss = surrogate(scores - scores.detach(), scores, advantages, Clip(kind, 0.2))
    assert loss.shape == scores.shape
    (found,) = torch.autograd.grad(loss.sum(), scores)
    (expected,) = torch.autograd.grad(weighted_likelihood(scores, advantages).sum(), scores)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("ratio", "slope"), [(1.5, 1.5), (0.9, 0.9), (9.0, 5.0), (0.01, 0.2), (1e6, 5.0)], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
def test_an_unconditional_clip_weighs_what_it_clips_whatever_the_sign(
    ratio: float, slope: float, advantage: float
) -> None:
    """Between 1/c and c, here 1/5 and 5; the log-probability alone has a gradient."""
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    scores = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    loss = surrogate(log_ratio, scores, torch.tensor(advantage).double(), Clip("unconditional", 0.8, 4.0))
    assert loss.item() == pytest.approx(3 * slope * advantage)
    of_ratio, of_score = torch.autograd.grad(loss, (log_ratio, scores), allow_unused=True)
    assert of_ratio is None and of_score.item() == pytest.approx(-slope * advantage)


def test_a_ratio_gone_wrong_moves_ppo_without_bound_and_an_unconditional_clip_within_its_range() -> None:
    """F4 of the spec: for A < 0 PPO takes the branch that is not clipped."""
    for exponent in (2.0, 5.0, 20.0, 200.0):
        assert loss_and_slope(exponent, -1.0, Clip("ppo", 0.2))[1] == pytest.approx(math.exp(exponent))
        assert loss_and_slope(exponent, -1.0, Clip("none"))[1] == pytest.approx(math.exp(exponent))
        assert loss_and_slope(exponent, -1.0, Clip("unconditional", 1.0, 4.0))[1] == pytest.approx(5.0)


def test_without_a_range_the_unconditional_gradient_is_the_unclipped_surrogates() -> None:
    scores, advantages = numbers(50).requires_grad_(), numbers(50, seed=1)
    wide = Clip("unconditional", 1.0, math.inf)
    found, expected = (
        torch.autograd.grad(surrogate(scores, scores, advantages, clip).sum(), scores)[0]
        for clip in (wide, Clip("none"))
    )
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_a_range_of_nothing_forgets_the_old_policy() -> None:
    weights = importance_weights(3 * numbers(20), Clip("unconditional", 0.0, 0.0))
    assert torch.equal(weights, torch.ones(20, dtype=torch.float64))


def test_one_range_is_for_both_sides_unless_there_are_two() -> None:
    log_ratio, advantages = numbers(4, 5), numbers(4, 1, seed=1)
    for kind in CLIPS:
        one, two = (surrogate(log_ratio, log_ratio, advantages, Clip(kind, 0.2, high)) for high in (None, 0.2))
        assert torch.equal(one, two)


def test_what_is_clipped_is_counted() -> None:
    log_ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5]).double().log()
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0]).double()
    expected = {"ppo": ([0], [4]), "log": ([0], [4]), "unconditional": ([0, 1], [3, 4]), "none": ([], [])}
    for kind, (below, above) in expected.items():
        low, high = clipped_units(log_ratio, advantages, Clip(kind, 0.2))
        assert low.nonzero().flatten().tolist() == below and high.nonzero().flatten().tolist() == above


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "soft"}, "kind='soft' is not allowed; choose one of ppo, log, unconditional, none"),
        ({"low": -0.1}, "low=-0.1 is not allowed; it must be 0 or larger"),
        ({"high": math.nan}, "high=nan is not allowed; it must be 0 or larger"),
        ({"kind": "unconditional", "dual": 3.0}, "dual=3.0 is not allowed with kind='unconditional'"),
    ],
)
def test_impossible_clips_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip(**settings)  # type: ignore[arg-type]


def test_what_stands_for_a_ratio_has_no_logarithm_to_clip() -> None:
    with pytest.raises(ValueError, match="kind='log' is not allowed for what stands for a ratio"):
        ratio_surrogate(torch.ones(1), torch.ones(1), Clip("log"))


# --- self-normalised weights ------------------------------------------------------------------------------------------

WIDE = Clip("unconditional", 1.0, math.inf)
GROUPS = torch.tensor([8, 0, 8, 4, 0, 4, 8, 4, 0, 8])


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_equal_weights_are_one_to_the_last_bit(kind: str) -> None:
    for weight in (1.0, 0.25):
        found = self_normalised(torch.full((10, 7), weight).double(), GROUPS, kind)
        assert torch.equal(found, torch.ones(10, 7, dtype=torch.float64))
    tiny = self_normalised(torch.full((10, 7), 1e-200, dtype=torch.float64), GROUPS, kind)
    torch.testing.assert_close(tiny, torch.ones(10, 7, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(10,), (10, 6)])
def test_weights_are_shares_of_their_groups_sum(shape: tuple[int, ...]) -> None:
    weights = importance_weights(numbers(*shape), WIDE)
    counts = numbers(*shape, seed=1) > -0.5
    found = self_normalised(weights, GROUPS, "group", counts)
    for group in GROUPS.unique():
        mine, here = group == GROUPS, counts[group == GROUPS]
        shares = weights[mine] / weights[mine][here].sum()
        torch.testing.assert_close(found[mine] / here.sum(), shares, rtol=1e-14, atol=0)
        assert found[mine][here].mean().item() == pytest.approx(1.0)
    whole = self_normalised(weights, GROUPS, "batch")
    torch.testing.assert_close(whole, weights / weights.mean(), rtol=1e-14, atol=0)
    assert torch.equal(self_normalised(weights, GROUPS, "none"), weights)


def test_what_all_log_ratios_of_a_group_have_in_common_changes_nothing_unless_weights_stay_as_they_are() -> None:
    log_ratio, shift = numbers(10), numbers(9, seed=1)[GROUPS]
    for kind, same in (("group", True), ("batch", False), ("none", False)):
        before, after = (
            self_normalised(importance_weights(values, WIDE), GROUPS, kind) for values in (log_ratio, log_ratio + shift)
        )
        assert torch.allclose(before, after, rtol=1e-13, atol=0) is same


def test_order_and_splits_change_nothing() -> None:
    weights, counts = numbers(10, 3).exp(), numbers(10, 3, seed=1) > 0
    whole = self_normalised(weights, GROUPS, "group", counts)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    found = self_normalised(weights[order], GROUPS[order], "group", counts[order])
    torch.testing.assert_close(found, whole[order], rtol=1e-14, atol=0)
    halves = [slice(0, 5), slice(5, 10)]
    rows = torch.stack([(weights * counts).sum(1), counts.sum(1).double()], 1)
    for half in halves:  # what two processes see: their own rows, and of the others what is gathered
        gathered = iter((GROUPS, rows))
        found = self_normalised(weights[half], GROUPS[half], "group", counts[half], lambda _: next(gathered))  # noqa: B023
        torch.testing.assert_close(found, whole[half], rtol=1e-14, atol=0)


def test_the_update_is_a_convex_combination_and_a_ratio_gone_wrong_bounds_it() -> None:
    advantages, groups = numbers(8, seed=1), torch.zeros(8, dtype=torch.long)
    log_ratio = numbers(8)
    for wrong in (10.0, 1e3, math.inf):
        log_ratio[2] = wrong
        shares = self_normalised(importance_weights(log_ratio, WIDE), groups) / 8
        assert (shares >= 0).all() and shares.sum().item() == pytest.approx(1.0)
        assert (shares * advantages).sum().abs() <= advantages.abs().max()
    assert shares[2].item() == pytest.approx(1.0)


def test_groups_without_weight_or_units_have_none() -> None:
    weights = torch.tensor([0.0, 0.0, 1.0, 3.0]).double()
    groups, counts = torch.tensor([0, 0, 2, 2]), torch.tensor([True, True, False, False])
    assert self_normalised(weights, groups).tolist() == [0.0, 0.0, 0.5, 1.5]
    assert self_normalised(weights, groups, counts=counts).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert effective_share(weights, groups).tolist() == pytest.approx([0.0, 0.0, 0.8, 0.8])
    with pytest.raises(ValueError, match="self_normalize='row' is not allowed; choose one of none, group, batch"):
        self_normalised(weights, groups, "row")
