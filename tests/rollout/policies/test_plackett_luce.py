"""Ordered draws against a full enumeration: densities, gradients, and how often each order is drawn."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.rollout.policies.plackett_luce import draw, greedy, log_density, log_factors
from tests.rollout.chi_square import chi_square

SLOTS = 6
ELIGIBLE = torch.tensor([[True, False, True, True, True, False]])
OPEN = ELIGIBLE[0].nonzero().squeeze(-1).tolist()


def utilities(seed: int = 0) -> Tensor:
    return 2 * torch.randn(1, SLOTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orders(count: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(OPEN, count))


def as_order(slots: tuple[int, ...]) -> Tensor:
    order = torch.full((1, SLOTS), -1)
    order[0, list(slots)] = torch.arange(len(slots))
    return order


def enumerated(h: Tensor, slots: tuple[int, ...]) -> Tensor:
    """The log-probability, factor by factor."""
    left, total = list(OPEN), h.new_zeros(())
    for slot in slots:
        total = total + h[0, left].log_softmax(-1)[left.index(slot)]
        left.remove(slot)
    return total


def test_ordered_draws_add_up_to_one() -> None:
    h = utilities()
    for count in (1, 2, 3):
        every = torch.cat([as_order(slots) for slots in orders(count)])
        many = (h.expand(len(every), -1), ELIGIBLE.expand(len(every), -1))
        density = log_density(*many, every)
        assert torch.allclose(density.exp().sum(), torch.ones((), dtype=torch.float64), atol=1e-12)
        assert torch.allclose(density, torch.stack([enumerated(h, slots) for slots in orders(count)]), atol=1e-12)


def test_one_slot_is_a_softmax() -> None:
    h = utilities()
    found = torch.cat([log_density(h, ELIGIBLE, as_order((slot,))) for slot in OPEN])
    assert torch.allclose(found, h[0, OPEN].log_softmax(-1), atol=1e-12)


def test_a_constant_and_huge_utilities_change_nothing() -> None:
    h, order = utilities(), as_order((4, 0, 2))
    for constant in (-1e4, 3.0, 1e4):
        assert torch.allclose(log_density(h + constant, ELIGIBLE, order), log_density(h, ELIGIBLE, order), atol=1e-9)
    single = torch.tensor([[-100.0, 0.0, 100.0, 90.0, 80.0, 0.0]])  # exp of these overflows in float32
    assert torch.allclose(log_density(single, ELIGIBLE, as_order((2, 3))), torch.tensor([-4.54e-05 * 2]), atol=1e-4)


def test_slots_that_cannot_be_drawn_have_no_probability_and_no_gradient() -> None:
    h = utilities().requires_grad_()
    log_density(h, ELIGIBLE, as_order((2, 0))).sum().backward()
    assert h.grad is not None and (h.grad[~ELIGIBLE] == 0).all() and (h.grad[ELIGIBLE] != 0).all()
    try:
        log_density(h, ELIGIBLE, as_order((1,)))
    except ValueError as error:
        assert "slot 1 of row 0" in str(error)
    else:
        raise AssertionError("a slot that is not eligible has a density")
    drawn = draw(h.detach() + 50 * ~ELIGIBLE, ELIGIBLE, torch.tensor([9]), torch.full((1, SLOTS), 0.5).double())
    assert ((drawn >= 0) == ELIGIBLE).all()


def test_the_gradient_is_that_of_the_enumerated_log_probability() -> None:
    for slots in orders(3):
        h, other = utilities().requires_grad_(), utilities().requires_grad_()
        log_density(h, ELIGIBLE, as_order(slots)).sum().backward()
        enumerated(other, slots).backward()
        assert h.grad is not None and other.grad is not None and torch.allclose(h.grad, other.grad, atol=1e-12)


def test_a_draw_of_everything_is_certain() -> None:
    h = utilities().requires_grad_()
    density = log_density(h, ELIGIBLE, as_order((4, 0, 3, 2)))
    density.sum().backward()
    assert density.item() == 0 and h.grad is not None and not h.grad.any()
    rows = torch.cat([h.detach(), h.detach()])
    both = log_density(rows, ELIGIBLE.expand(2, -1), torch.cat([as_order((4, 0, 3, 2)), as_order((4, 0))]))
    assert both[0] == 0 and torch.allclose(both[1], enumerated(h.detach(), (4, 0)))


def test_factors_stand_where_they_were_drawn() -> None:
    h = utilities()
    factors = log_factors(h, ELIGIBLE, as_order((3, 0)))
    first = h[0, OPEN].log_softmax(-1)[OPEN.index(3)]
    assert torch.allclose(factors[0, 3], first) and torch.allclose(factors.sum(), enumerated(h, (3, 0)))
    assert not factors[0, [1, 2, 4, 5]].any()


def test_draws_follow_the_density() -> None:
    count, h = 20_000, utilities() / 2
    rows = torch.arange(count)[:, None]
    uniforms = keyed_uniform(3, "unmasking order", rows, torch.zeros_like(rows), torch.arange(SLOTS)[None])
    drawn = draw(h.expand(count, -1), ELIGIBLE.expand(count, -1), torch.full((count,), 2), uniforms)
    assert ((drawn >= 0).sum(-1) == 2).all()
    number = {slots: i for i, slots in enumerate(orders(2))}
    seen = torch.zeros(len(number), dtype=torch.float64)
    first, second = (drawn == 0).long().argmax(-1).tolist(), (drawn == 1).long().argmax(-1).tolist()
    for pair in zip(first, second, strict=True):
        seen[number[pair]] += 1
    chi_square(seen, torch.stack([enumerated(h, slots) for slots in orders(2)]).exp())


def test_the_greedy_order_is_that_of_the_utilities() -> None:
    h = torch.tensor([[1.0, 9.0, 3.0, 3.0, -1.0, 9.0]])
    assert greedy(h, ELIGIBLE, torch.tensor([3])).tolist() == [[2, -1, 0, 1, -1, -1]]
