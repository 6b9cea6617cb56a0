"""The Bernoulli policy: its density against a full enumeration, draws, and the schedule that asks it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.rollout.policies.bernoulli import BernoulliPolicy, choose, entropy, log_probability
from rl4dlm.rollout.policies.block_sizes import LearnedSizes, offered
from rl4dlm.rollout.policies.policy import Seen, attach_policy, fresh
from rl4dlm.rollout.policies.saving import load_policy, save_policy
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.bernoulli import utilities_of
from tests.rollout.chi_square import chi_square
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser
from tests.rollout.schedules.examples import unmasking_policy

LENGTH = 12


def choices(allowed: Tensor) -> Tensor:
    """Every set of allowed slots but the empty one, bool `[C, W]`."""
    found = [c for c in itertools.product([False, True], repeat=len(allowed)) if any(c)]
    sets = torch.tensor(found)
    return sets[~(sets & ~allowed).any(-1)]


def some(width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_choices_add_up_to_one(width: int) -> None:
    """The one that is made where nothing was drawn included, and whatever slots are allowed."""
    for seed in range(3):
        for allowed in choices(torch.ones(width, dtype=torch.bool)):
            sets = choices(allowed)
            utilities = some(width, seed).expand(len(sets), -1)
            found = log_probability(utilities, allowed.expand_as(sets), sets)
            assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-14)
            if int(allowed.sum()) == 1:
                assert found.tolist() == [0.0], "there was no choice"


def test_what_would_be_written_anyway_has_the_probability_of_both() -> None:
    """0.192 that it is drawn alone, and 0.128 that nothing is: 0.32, where published code says 0.19."""
    shares = torch.tensor([[0.6, 0.5, 0.36]], dtype=torch.float64)
    allowed, alone = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, False, False]])
    found = log_probability(shares.logit(), allowed, alone).exp()
    assert float(found) == pytest.approx(0.32, abs=1e-12)
    plain = torch.where(alone, shares, 1 - shares).prod()
    assert float(plain) == pytest.approx(0.192, abs=1e-12)
    assert float(found) == pytest.approx(float(plain + (1 - shares).prod()), abs=1e-12)
    other = torch.tensor([[False, True, False]])
    assert float(log_probability(shares.logit(), allowed, other).exp()) == pytest.approx(0.4 * 0.5 * 0.64, abs=1e-12)


def test_sets_are_drawn_as_the_density_says() -> None:
    rows, allowed = 4000, torch.tensor([True, False, True, True])
    utilities = some(4, 5).expand(rows, -1)
    uniform = keyed_uniform(0, "test", torch.arange(rows)[:, None], torch.arange(4))
    drawn = choose(utilities, allowed.expand(rows, -1), uniform)
    sets = choices(allowed)
    counts = (drawn[:, None] == sets).all(-1).sum(0)
    assert int(counts.sum()) == rows
    chi_square(counts, log_probability(utilities[: len(sets)], allowed.expand_as(sets), sets).exp())


def test_huge_utilities_are_certain() -> None:
    """All at once, or one per step, which is then no choice."""
    allowed = torch.tensor([[True, True, False, True]])
    for value, count in ((torch.inf, 3), (1e4, 3), (-1e4, 1), (-torch.inf, 1)):
        utilities = torch.full((1, 4), value, dtype=torch.float64)
        chosen = choose(utilities, allowed, torch.full((1, 4), 0.5, dtype=torch.float64))
        assert int(chosen.sum()) == count
        assert float(log_probability(utilities, allowed, chosen)) == 0.0
    assert choose(torch.full((1, 4), -1.0), allowed, None).tolist() == [[True, False, False, False]]
    assert choose(torch.tensor([[-1.0, 2.0, 3.0, 0.1]]), allowed, None).tolist() == [[False, True, False, True]]


def test_the_entropy_is_that_of_the_draws() -> None:
    allowed, shares = torch.tensor([[True, False, True]]), torch.tensor([[0.3, 0.5, 0.8]], dtype=torch.float64)
    expected = -sum(p * torch.tensor(p).log() + (1 - p) * torch.tensor(1 - p).log() for p in (0.3, 0.8))
    assert float(entropy(shares.logit(), allowed)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("kind", ["bernoulli", "sizes"])
def test_the_mean_estimate_is_the_gradient_of_the_expected_reward(kind: str) -> None:
    """Enumerated on a task of two steps whose second depends on the first: E[R grad log p] = grad E[R]."""
    weights = some(4, 1).requires_grad_()
    allowed = torch.ones(3, dtype=torch.bool)
    first = choices(allowed)

    def log_probs(sets: Tensor, open_slots: Tensor, bias: Tensor) -> Tensor:
        if kind == "sizes":  # one of three actions, by its number
            return offered((weights[:3] + bias)[None], open_slots[None])[0][sets.long().argmax(-1)]
        return log_probability((weights[:3] * (1 + bias)).expand(len(sets), -1), open_slots.expand_as(sets), sets)

    if kind == "sizes":
        first = torch.eye(3, dtype=torch.bool)
    expected, estimate = weights.new_zeros(()), torch.zeros(4, dtype=torch.float64)
    paths = []
    for one, start in zip(first, log_probs(first, allowed, weights[3] * 0), strict=True):
        left = allowed & ~one if kind == "bernoulli" else allowed
        after = choices(left) if kind == "bernoulli" else first
        if not bool(left.any()):
            paths.append((start, 1.0 + float(one[0])))
            continue
        for two, rest in zip(after, log_probs(after, left, weights[3] * one.double().sum()), strict=True):
            paths.append((start + rest, float(one[0]) - 0.7 * float(two[1]) + float(one[2] & two[2])))
    assert sum(float(path.detach().exp()) for path, _ in paths) == pytest.approx(1.0, abs=1e-12)
    for path, reward in paths:
        expected = expected + path.exp() * reward
        estimate += float(path.detach().exp()) * reward * torch.autograd.grad(path, weights, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(expected, weights)[0], estimate, rtol=0, atol=1e-12)
    assert bool((estimate.abs() > 1e-4).any())


# --- the network ------------------------------------------------------------------------------------------------------


def seen(rows: int, width: int = 6) -> Seen:
    generator = torch.Generator().manual_seed(rows)
    masked = torch.rand(rows, width, generator=generator) < 0.7
    everywhere = torch.ones_like(masked)
    features = torch.rand(rows, width, 1, generator=generator, dtype=torch.float64)
    return Seen(features, masked, everywhere, everywhere, torch.rand(rows, generator=generator).double())


def test_at_first_every_slot_is_written_as_likely() -> None:
    policy = fresh(BernoulliPolicy(), seed=3, dtype=torch.float64)
    assert bool((policy(seen(3)) == -2.0).all())
    assert sum(weight.numel() for weight in policy.parameters()) > 12 * 128**2
    with pytest.raises(ValueError, match="hidden_size=6 is not allowed with heads=2; it must be a multiple of 4"):
        BernoulliPolicy(hidden_size=6)
    with pytest.raises(ValueError, match="heads=0 is not allowed"):
        BernoulliPolicy(heads=0)


def test_a_row_is_judged_alone_and_by_open_slots() -> None:
    policy, what = unmasking_policy(), seen(5)
    together = policy(what)
    assert len({round(v, 6) for v in together[:, 0].tolist()}) == 5
    for row in range(5):
        own = Seen(*(getattr(what, name)[row : row + 1] for name in ("features", "masked", "inside", "exists", "time")))
        torch.testing.assert_close(policy(own)[0], together[row], rtol=0, atol=1e-13)
    others = torch.where(what.masked[..., None], what.features, 0.5)
    assert torch.equal(policy(replace(what, features=others)), together)
    for changed in (replace(what, time=what.time + 0.1), replace(what, features=what.features * 0.9)):
        assert not torch.allclose(policy(changed), together, atol=1e-3)


# --- the schedule -----------------------------------------------------------------------------------------------------


def config(**settings: Any) -> DecodingConfig:
    arguments = {"policy": unmasking_policy(), **settings.pop("schedule_args", {})}
    usual = {"canvas_length": LENGTH, "schedule": "bernoulli", "stop_at_eos": False, "record": ("policy",)}
    return DecodingConfig(**{**usual, **settings, "schedule_args": arguments})


def decoded(prompts: Any = PROMPTS, places: int | None = None, **settings: Any) -> Rollout:
    return RolloutEngine(denoiser(), max_batch_rows=places).generate(prompts, config(**settings), seed=4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_length": 4, "places": 2},
        {"temperature": 0.8, "cache": "prefix", "block_length": 6, "schedule_args": {"policy_temperature": 0.5}},
        {"defer_token_ids": (1, 3), "block_length": 6},
        {"stop_at_eos": True, "temperature": 1.0},
    ],
    ids=["whole", "blocks", "drawn tokens", "deferred", "ends"],
)
def test_what_the_policy_saw_and_chose_is_recorded(settings: dict[str, Any]) -> None:
    rollout = decoded(**settings)
    assert_same_rows(rollout, decoded(**{**settings, "record": ()}))
    trace, length = rollout.trace, LENGTH
    features, allowed, chosen = trace.policy_features, trace.policy_allowed, trace.policy_chosen
    assert features is not None and allowed is not None and chosen is not None
    steps = int(trace.steps.max())
    assert features.shape == allowed.shape == chosen.shape == (len(PROMPTS), steps, length)
    written = trace.commit_step[:, None] == torch.arange(steps)[:, None]
    assert torch.equal(chosen, written), "the choice is what is written"
    assert torch.equal(allowed.any(-1), torch.arange(steps) < trace.steps[:, None])
    assert torch.equal(features > 0, allowed)
    confidence = (features * chosen).sum(1)
    torch.testing.assert_close(confidence, trace.confidence * (trace.commit_step >= 0), rtol=0, atol=0)
    rows, at = allowed.any(-1).nonzero(as_tuple=True)
    states = features[rows, at], allowed[rows, at]
    temperature = settings.get("schedule_args", {}).get("policy_temperature", 1.0)
    utilities = utilities_of(unmasking_policy(), *states, at.double() / length) / temperature
    found = log_probability(utilities, states[1], chosen[rows, at])
    torch.testing.assert_close(trace.selection_log_prob[rows, at], found, rtol=0, atol=1e-12)
    assert bool((found < 0).any()) and not bool(trace.selection_log_prob[~allowed.any(-1)].any())


def test_a_policy_that_is_sure_writes_all_at_once_or_one_per_step() -> None:
    for bias, steps in ((1e6, 3), (-1e6, LENGTH)):
        policy = fresh(BernoulliPolicy(hidden_size=8), seed=0, dtype=torch.float64)
        torch.nn.init.constant_(policy.output.bias, bias)
        rollout = decoded(block_length=4, schedule_args={"policy": policy})
        assert rollout.trace.steps.tolist() == [steps] * len(PROMPTS)
        assert not bool(rollout.trace.selection_log_prob.any())


def test_greedy_is_the_same_whatever_the_seed() -> None:
    first = decoded(schedule_args={"policy_temperature": 0})
    other = RolloutEngine(denoiser()).generate(PROMPTS, config(schedule_args={"policy_temperature": 0}), seed=5)
    assert torch.equal(first.canvas, other.canvas) and torch.equal(first.trace.commit_step, other.trace.commit_step)
    assert not bool(first.trace.selection_log_prob.any())
    drawn = decoded()
    assert not torch.equal(first.trace.commit_step, drawn.trace.commit_step)


def test_the_policy_of_the_model_is_used_where_none_is_named(tmp_path: Any) -> None:
    model = tiny_llada()
    settings = DecodingConfig(canvas_length=8, schedule="bernoulli")
    with pytest.raises(ValueError, match="needs a policy, and the model has none"):
        RolloutEngine(model).generate([[5, 6]], settings)
    attach_policy(model, unmasking_policy())
    found = RolloutEngine(model).generate([[5, 6]], settings, num_generations=3)
    save_policy(unmasking_policy(), tmp_path)
    for policy in (unmasking_policy(), tmp_path, str(tmp_path / "unmasking_policy.safetensors")):
        named = replace(settings, schedule_args={"policy": policy})
        assert torch.equal(RolloutEngine(model).generate([[5, 6]], named, num_generations=3).canvas, found.canvas)
    assert load_policy(tmp_path).settings == {"hidden_size": 8, "heads": 2}
    sizes = fresh(LearnedSizes((1, 2)), seed=0, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs a policy of kind 'bernoulli', not 'block_sizes'"):
        replace(settings, schedule_args={"policy": sizes})
    attach_policy(model, sizes)
    with pytest.raises(ValueError, match="needs a policy of kind 'bernoulli', not 'block_sizes'"):
        RolloutEngine(model).generate([[5, 6]], settings)
    with pytest.raises(ValueError, match="policy_temperature=-1 is not allowed"):
        replace(settings, schedule_args={"policy_temperature": -1})


@pytest.mark.parametrize("schedule", ["bernoulli", "ctrldiff"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_that_has_become_nan_is_said(schedule: str, temperature: float) -> None:
    policy = BernoulliPolicy(hidden_size=8) if schedule == "bernoulli" else LearnedSizes((1, 2))
    fresh(policy, seed=0, dtype=torch.float64)
    last = policy.output if isinstance(policy, BernoulliPolicy) else policy.choice
    with torch.no_grad():
        last.bias.fill_(torch.nan)
    given = {"policy": policy, "policy_temperature": temperature}
    with pytest.raises(ValueError, match="not numbers"):
        RolloutEngine(tiny_llada()).generate([[5]], DecodingConfig(4, schedule=schedule, schedule_args=given))
