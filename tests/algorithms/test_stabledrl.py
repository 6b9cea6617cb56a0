"""StableDRL: SPG without its weights, bounded by them with, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm import SPGTrainer, StableDRLConfig, StableDRLTrainer
from rl4dlm.models.tiny import tiny_llada
from tests.models.float64 import exactly_float64
from tests.training.steps import adapter_step, check_gradient, one_step, plain_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

GROUP = 4
EOS = 1


def plain_objective(trainer: Any, record: dict[str, Any], weights: Tensor, beta: float, omega: float) -> Tensor:
    """The loss by its equations: bounds per token from the model's plain logits, a mean over completions."""
    log_probs, views = plain_log_probs(trainer, record)
    scored, losses = views.scored, []
    for i, advantage in enumerate(record["advantages"].tolist()):
        p, s = log_probs[i], scored[i]
        lower = torch.stack([(p[v] * s[v]).sum() / s[v].sum() for v in range(len(p))]).mean()
        level = s.sum(-1) / record["canvas_valid"][i].sum()
        upper = (s / level[:, None] * p.exp() ** beta).mean(0)[s.any(0)].log().mean() / beta
        losses.append(-weights[i] * advantage * (lower if advantage > 0 else omega * upper + (1 - omega) * lower))
    return torch.stack(losses).mean()


def test_the_first_step_is_the_sandwich_without_lengths(make_trainer: Any) -> None:
    trainer, gradients = one_step(make_trainer, StableDRLTrainer, block_length=4, num_views=3)
    record, log = trainer.seen[0], trainer.state.log_history[0]
    assert (record["advantages"] < 0).any() and (record["advantages"] > 0).any()
    check_gradient(trainer, plain_objective(trainer, record, torch.ones(8), 1.5, 0.5), gradients)
    assert log["diffusion/effective_sample_share"] == 1 and log["clip_ratio/region_mean"] == 0 and log["entropy"] > 0


def build(make_trainer: Any, trainer: type = StableDRLTrainer, **changes: Any) -> Any:
    """In float64, so that a difference is one of the algorithm; completions fill the canvas and have one length."""
    model = exactly_float64(tiny_llada(initializer_range=0.2, dtype=torch.float64))
    settings = {"block_length": 4, "max_steps": 1, "max_grad_norm": 0.0, "suppress_token_ids": [EOS], **changes}
    return make_trainer(model, trainer=trainer, config=trainer.config_class, **settings)  # type: ignore[attr-defined]


def worn_batch(trainer: Any) -> dict[str, Any]:
    """The batch of a step that has been made, in its second pass."""
    trainer.train()
    trainer.current_gradient_accumulation_steps = 1
    (batch,) = trainer._buffered_inputs
    assert batch["canvas_valid"].all()
    return dict(batch)


def with_ratios(trainer: Any, batch: dict[str, Any], log_ratio: Tensor) -> dict[str, Any]:
    """A batch whose lower bounds are `log_ratio` `[B]` nats per token above those of the old policy."""
    rows = {"old_per_token_logps": torch.zeros_like(batch["old_per_token_logps"])}
    seen: list[Tensor] = []
    loss = trainer.loss
    trainer.loss = lambda scores, batch: (seen.append(scores.log_probs.detach()), loss(scores, batch))[1]
    trainer._compute_loss(trainer.model, {**batch, **rows})
    trainer.loss = loss
    old = seen[0] - log_ratio[:, None]
    return {**batch, "old_per_token_logps": old[:, None]}


def gradients(trainer: Any, batch: dict[str, Any]) -> list[Tensor]:
    loss = trainer._compute_loss(trainer.model, dict(batch))
    return list(torch.autograd.grad(loss, list(trainer.model.parameters())))


def of_each(trainer: Any, batch: dict[str, Any]) -> list[list[Tensor]]:
    """What single completions ask for, `A_j grad S_j / n_j` with weight 1."""
    trainer.args.self_normalize = "none"
    found = []
    for row in range(len(batch["advantages"])):
        alone = torch.zeros_like(batch["advantages"])
        alone[row] = batch["advantages"][row]
        without = {name: value for name, value in batch.items() if name != "old_per_token_logps"}
        found.append([len(alone) * g for g in gradients(trainer, {**without, "advantages": alone})])
    trainer.args.self_normalize = "group"
    return found


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def norm(found: list[Tensor]) -> float:
    return float(torch.stack([g.norm() for g in found]).norm())


@pytest.fixture
def worn(make_trainer: Any) -> tuple[Any, dict[str, Any]]:
    trainer = build(make_trainer, num_iterations=2)
    return trainer, worn_batch(trainer)


LOG_RATIO = torch.tensor([0.3, -0.2, 2.5, 0.0, -4.0, 0.1, 0.7, -0.6], dtype=torch.float64)


def test_the_update_is_a_convex_combination_of_what_completions_ask_for(worn: Any) -> None:
    """w_j / sum of the group's w, c = 5 from above only, the mean over groups."""
    trainer, batch = worn
    each = of_each(trainer, batch)
    found = gradients(trainer, with_ratios(trainer, batch, LOG_RATIO))
    weights = LOG_RATIO.exp().clamp(max=5.0)
    place = batch["row_ids"] // GROUP
    shares = torch.stack([w / weights[place == g].sum() for w, g in zip(weights, place, strict=True)])
    assert shares.sum().item() == pytest.approx(2.0) and (shares >= 0).all()
    expected = [sum(s * g for s, g in zip(shares, column, strict=True)) / 2 for column in zip(*each, strict=True)]
    assert distance(found, expected) < 1e-10 and norm(found) > 1e-3
    assert trainer._metrics["train"]["clip_ratio/high_mean"][-1] == 1 / 8


def test_at_the_old_policy_it_is_spg_without_lengths(make_trainer: Any, worn: Any) -> None:
    trainer, batch = worn
    same = gradients(trainer, with_ratios(trainer, batch, torch.zeros(8, dtype=torch.float64)))
    spg = build(make_trainer, SPGTrainer, num_iterations=2)
    spg.current_gradient_accumulation_steps = 1
    spg.model.load_state_dict(trainer.model.state_dict())
    spg.model.train()
    spg._step = trainer._step
    batch = {**batch, "num_items_in_batch": batch["completion_mask"].sum()}
    assert distance(same, gradients(spg, batch)) < 1e-12
    trainer.epsilon_low = trainer.epsilon_high = 0.0
    assert distance(same, gradients(trainer, with_ratios(trainer, batch, LOG_RATIO))) < 1e-12, "no range, no ratio"


def test_what_a_group_s_ratios_have_in_common_cancels_unless_it_is_clipped(worn: Any) -> None:
    trainer, batch = worn
    small = LOG_RATIO.clamp(max=0.7)
    shifted = small + torch.where(batch["row_ids"] < GROUP, 0.5, -2.0)
    found, other = (gradients(trainer, with_ratios(trainer, batch, each)) for each in (small, shifted))
    assert distance(found, other) < 1e-10
    trainer.args.self_normalize = "none"
    found, other = (gradients(trainer, with_ratios(trainer, batch, each)) for each in (small, shifted))
    assert distance(found, other) > 1e-3


def test_one_ratio_gone_wrong_moves_no_further_than_one_completion_may(worn: Any) -> None:
    trainer, batch = worn
    each = of_each(trainer, batch)
    bound = max(norm(column) for column in each)
    for wrong in (2.0, 20.0, 700.0, math.inf):
        log_ratio = torch.zeros(8, dtype=torch.float64)
        log_ratio[3] = wrong
        for high in (4.0, math.inf):
            trainer.epsilon_high = high
            assert norm(gradients(trainer, with_ratios(trainer, batch, log_ratio))) <= bound


def test_groups_of_equal_rewards_teach_nothing(make_trainer: Any) -> None:
    trainer = build(make_trainer, rewards=lambda completions, **_: [1.0] * len(completions), num_iterations=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_ratios_may_be_of_whole_sequences(worn: Any) -> None:
    trainer, batch = worn
    found = gradients(trainer, with_ratios(trainer, batch, LOG_RATIO))
    trainer.args.ratio_norm = "none"
    whole = gradients(trainer, with_ratios(trainer, batch, LOG_RATIO / 8))  # eight tokens
    assert distance(found, whole) < 1e-10


def test_an_adapter_is_trained(make_trainer: Any) -> None:
    trainer = adapter_step(make_trainer, StableDRLTrainer, block_length=4)
    assert "ref_per_token_logps" not in trainer.seen[0]


def test_the_defaults_are_the_authors() -> None:
    config = StableDRLConfig(output_dir="run", bf16=False, use_cpu=True)
    assert (config.clip, config.self_normalize, config.epsilon, config.epsilon_high) == ("unconditional", "group", 1, 4)
    assert (config.num_generations, config.num_iterations, config.learning_rate) == (16, 2, 2e-6)
    assert (config.num_views, config.negatives, config.eubo_beta, config.mix_weight) == (2, "mix", 1.5, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": "ppo"}, "clip='ppo' is not allowed: StableDRL's ratios are weights of bounds"),
        ({"ratio_norm": "tokens"}, "ratio_norm='tokens' is not allowed; choose one of length, none"),
        ({"delta": 6.0}, "delta=6.0 has no effect with clip='unconditional'"),
        ({"beta": 0.1}, "beta=0.1 is not supported: the loss has no KL term"),
        ({"importance_sampling_level": "sequence"}, "the loss has one weight per sequence"),
    ],
)
def test_what_is_not_its_own_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableDRLConfig(output_dir="run", bf16=False, use_cpu=True, **settings)
