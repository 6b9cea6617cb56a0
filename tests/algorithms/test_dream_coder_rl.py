"""Dream-Coder's RL: weights, clipping, substitution of groups, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from rl4dlm.algorithms.dream_coder_rl import DreamCoderRLConfig, DreamCoderRLTrainer
from rl4dlm.likelihood.complementary import Complementary, context_weights
from rl4dlm.likelihood.views import Rows
from rl4dlm.training.interventions.inpainting import Inpainting
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class Recording(DreamCoderRLTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        value = super().loss(scores, batch)
        copies = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.seen.append({**copies, "scores": scores, "loss": value.detach().clone()})
        return value


@pytest.fixture
def make(make_trainer: Any) -> Callable[..., Any]:
    def build(**changes: Any) -> Any:
        return make_trainer(**{"trainer": Recording, "config": DreamCoderRLConfig, **changes})

    return build


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_the_first_pass_is_on_policy_and_the_loss_is_the_weighted_mean(make: Any, adapter: Any) -> None:
    trainer = make(peft_config=adapter, beta=0.02)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    first, second = trainer.seen
    mask = first["completion_mask"].bool()
    for policy in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(first[policy][mask], first["scores"].log_probs[mask], rtol=0, atol=1e-6)
    # Weights by hand: neighbours that the view shows within the completion.
    hidden = first["scores"].views.scored
    weights = (context_weights(first["canvas_valid"][:, None] & ~hidden, 0.1) * hidden).sum(1)[
        :, : mask.shape[1]
    ] * mask
    torch.testing.assert_close(first["weight_total"][0].double(), weights.sum())
    expected = -(weights * first["advantages"][:, None]).sum() / weights.sum()
    assert first["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] == 0
    assert not torch.equal(first["scores"].views.hidden, second["scores"].views.hidden), "masks are new in each pass"
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("cart_p", [0.1, None])
def test_splitting_a_batch_changes_nothing(make: Any, cart_p: float | None) -> None:
    def run(size: int, accumulation: int) -> list[Tensor]:
        trainer = make(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, cart_p=cart_p, max_steps=3
        )
        trainer.train()
        return [p.detach().clone() for p in trainer.model.parameters()]

    for whole, split in zip(run(8, 1), run(2, 4), strict=True):
        torch.testing.assert_close(whole, split, rtol=0, atol=2e-6)


def one_batch(ratios: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    scores = torch.full_like(ratios, -1.5, requires_grad=True)
    batch = {
        "completion_mask": mask.long(),
        "canvas_valid": mask.bool(),
        "advantages": advantages,
        "old_per_token_logps": scores.detach() - ratios.log(),
    }
    return scores, batch


def views_of(mask: Tensor, hidden: Tensor) -> Any:
    count, length = mask.shape
    canvas = torch.full((count, length), 9)
    rows = Rows(canvas[:, :1], torch.ones(count, 1), canvas, mask, torch.arange(count))
    return Complementary().views(rows, hidden[:, None])


def gradient_of(trainer: Any, scores: Tensor, batch: dict[str, Any], views: Any) -> Tensor:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.loss(PolicyScores(scores, torch.ones_like(scores), views), batch)
    (gradient,) = torch.autograd.grad(loss, scores)
    return gradient


def test_clipping_is_higher_upwards_and_bounded_where_advantages_are_negative(make: Any) -> None:
    trainer = make(cart_p=None, delta=3.0)
    ratios = torch.tensor([[0.7, 0.9, 1.25, 1.3], [0.7, 1.25, 2.9, 3.1]])
    mask = torch.ones(2, 4)
    scores, batch = one_batch(ratios, torch.tensor([1.0, -1.0]), mask)
    gradient = gradient_of(trainer, scores, batch, views_of(mask, torch.rand(2, 4) < 0.5))
    expected = -torch.tensor([[0.7, 0.9, 1.25, 0.0], [0.0, -1.25, -2.9, 0.0]]) / 8
    torch.testing.assert_close(gradient, expected)


def test_tokens_without_visible_neighbours_or_behind_the_end_count_nothing(make: Any) -> None:
    trainer = make(cart_p=1.0)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    hidden = torch.tensor([[True, False, True, True, True], [True, True, True, False, False]])
    scores, batch = one_batch(torch.ones(2, 5), torch.tensor([1.0, 1.0]), mask)
    gradient = gradient_of(trainer, scores, batch, views_of(mask, hidden))
    weights = torch.tensor([[0.5, 1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5, 0.0]])
    torch.testing.assert_close(gradient, -weights / weights.sum())
    # One view hides everything: nothing is visible, and nothing is learnt.
    scores, batch = one_batch(torch.ones(2, 5), torch.tensor([1.0, 1.0]), mask)
    gradient = gradient_of(trainer, scores, batch, views_of(mask, torch.ones(2, 5, dtype=torch.bool)))
    assert gradient.isfinite().all() and not gradient.any()


def test_groups_that_teach_nothing_are_overwritten(make: Any) -> None:
    rewards = [0.0] * 4 + [1.0, 0.0, 0.0, 1.0] + [1.0] * 4 + [0.0, 0.0, 0.0, 1.0]

    def run(substitute: bool, rewards: list[float]) -> dict[str, Any]:
        trainer = make(
            per_device_train_batch_size=16,
            rewards=lambda completions, **_: rewards,
            substitute_groups=substitute,
            max_steps=1,
        )
        trainer.train()
        seen = trainer.seen[0]
        seen["share"] = trainer.state.log_history[0].get("substituted_groups")
        return seen

    plain, seen = run(False, rewards), run(True, rewards)
    ids = sorted(seen["row_ids"].tolist())
    assert len(ids) == 16 and not set(ids) & {*range(4), *range(8, 12)}
    assert set(ids) == {*range(4, 8), *range(12, 16)}, "informative groups are still there"
    assert seen["share"] == 0.5
    assert (seen["advantages"] != 0).all()
    place = {int(row): i for i, row in enumerate(plain["row_ids"])}
    for i, row in enumerate(seen["row_ids"].tolist()):
        for name in ("canvas_ids", "advantages", "old_per_token_logps", "prompt_ids", "completion_mask"):
            torch.testing.assert_close(seen[name][i], plain[name][place[row]], msg=f"{name} moves along")
    nothing = run(True, [1.0] * 16)
    assert sorted(nothing["row_ids"].tolist()) == list(range(16))
    assert nothing["loss"] == 0 and nothing["share"] == 0


def test_groups_are_judged_by_their_advantages(make: Any) -> None:
    first, second = [0.0, 0.0, 0.0, 1.0] * 2, [2.0, 2.0, 2.0, 0.0, 0.0, 4.0, 0.0, 0.0]

    def kept(aggregation: str) -> set[int]:
        trainer = make(
            rewards=[lambda completions, **_: first, lambda completions, **_: second],
            reward_weights=[1.0, 0.5],
            multi_objective_aggregation=aggregation,
            max_steps=1,
        )
        trainer.train()
        return {row // 4 for row in trainer.seen[0]["row_ids"].tolist()}

    assert kept("sum_then_normalize") == {1}, "the weighted sums of the first group are all 1"
    assert kept("normalize_then_sum") == {0, 1}, "advantages differ, where each reward is normalised by itself"


def test_the_whole_canvas_is_shown_and_scored(make: Any) -> None:
    trainer = make(model=tiny_llada_that_ends(), scope="canvas", stop_at_eos=False, max_steps=1)
    trainer.train()
    seen = trainer.seen[0]
    hidden = seen["scores"].views.scored  # complementary: every token of the canvas once
    assert (hidden.sum(1) == 1).all() and seen["completion_mask"].all() and not seen["canvas_valid"].all()
    weights = (context_weights(~hidden, 0.1) * hidden).sum(1)
    torch.testing.assert_close(seen["weight_total"][0].double(), weights.sum())


@pytest.mark.parametrize(("kind", "expected"), [("k1", 0.1), ("k2", 0.005), ("k3", 0.0048374)])
def test_kinds_of_the_kl_term(make: Any, kind: str, expected: float) -> None:
    # At the policy that the completions are of, the ratio that k1 needs is 1.
    trainer = make(cart_p=None, beta=1.0, kl_estimator=kind, use_bias_correction_kl=kind == "k1")
    mask = torch.ones(2, 4)
    scores, batch = one_batch(torch.ones(2, 4), torch.zeros(2), mask)
    batch["ref_per_token_logps"] = scores.detach() - 0.1
    gradient_of(trainer, scores, batch, views_of(mask, torch.rand(2, 4) < 0.5))
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(expected, abs=1e-6)


def test_f5_rows_may_count_the_same_and_share_their_noise(make: Any) -> None:
    # The first row hides one token of eight, the second one half: over the batch the first one counts for less.
    mask, hidden = torch.ones(2, 8), torch.zeros(2, 8, dtype=torch.bool)
    hidden[0, 3], hidden[1, ::2] = True, True
    shares = {}
    for loss_type in ("bnpo", "grpo"):
        trainer = make(loss_type=loss_type, cart_p=0.5)
        scores, batch = one_batch(torch.ones(2, 8), torch.ones(2), mask)
        shares[loss_type] = -gradient_of(trainer, scores, batch, views_of(mask, hidden)).sum(-1)
    torch.testing.assert_close(shares["grpo"], torch.full((2,), 0.5))
    assert shares["bnpo"][0] < 0.95 * shares["bnpo"][1] and shares["bnpo"].sum().item() == pytest.approx(1)

    trainer = make(noise_per="process", loss_type="bnpo", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    first, second = trainer.seen[:2]
    for record in (first, second):
        length = record["canvas_ids"].shape[1]
        hidden = record["scores"].views.hidden[:, :, -length:]
        both = (record["canvas_valid"][:, None] & record["canvas_valid"][:1, None]).expand_as(hidden)
        assert torch.equal(hidden[both], hidden[:1].expand_as(hidden)[both]), "one mask for all rows"
    assert len(trainer.seen) > 2
    estimator = trainer.estimator
    rows = Rows(*(torch.ones(16, 8, dtype=torch.long),) * 4, torch.arange(16))
    drawn = estimator.draw(rows, seed=0, iteration=0).hidden[:, 0, -8:]
    assert torch.equal(drawn[:8], drawn[:1].expand(8, -1)) and torch.equal(drawn[8:], drawn[8:9].expand(8, -1))
    assert not torch.equal(drawn[0], drawn[8]), "another process has another one"


@pytest.mark.parametrize("scope", ["valid", "canvas"])
def test_f6_given_tokens_are_in_no_weight_and_no_neighbour_where_they_are_hidden(make: Any, scope: str) -> None:
    data = Dataset.from_dict({"prompt": [f"p{i}" for i in range(4)], "solution": ["abcdefgh"] * 4})
    calls = []

    def rewards(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))  # wrong at first, and right once hints were given
        return [float(len(calls) % 2 == 0 and i % 4 < 2) for i in range(len(completions))]

    class WithHints(Recording):
        def build_intervention(self) -> Inpainting:
            return Inpainting(**hints)

    hints: dict[str, Any] = {"free_tail": 0, "hint_ratio": (0.5, 1.0), "chunk_length": (1, 2), "hide_answer": False}
    trainer = make(
        dataset=data,
        rewards=rewards,
        trainer=WithHints,
        substitute_groups=False,
        scope=scope,
        stop_at_eos=scope == "valid",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_iterations=1,
        max_steps=1,
    )
    trainer.train()
    total = 0.0
    for seen in trainer.seen:
        views, hinted = seen["scores"].views, seen["hinted"]
        width = seen["completion_mask"].shape[1]
        shown = ~views.hidden[:, :, -hinted.shape[1] :]
        if scope == "valid":
            shown = shown & seen["canvas_valid"][:, None]
        own = ((context_weights(shown, 0.1) * ~shown).sum(1) * ~hinted)[:, :width] * seen["completion_mask"]
        torch.testing.assert_close(trainer._weights(views, seen), own)
        total += own.sum().item()
    assert any(seen["hinted"].any() for seen in trainer.seen)
    assert trainer.seen[0]["weight_total"][0].item() == pytest.approx(total)


def test_equal_rewards_have_no_gradient(make: Any) -> None:
    trainer = make(rewards=lambda completions, **_: [0.5] * len(completions), max_steps=1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cart_p", 0.0),
        ("loss_type", "dr_grpo"),
        ("noise_per", "batch"),
        ("importance_sampling_level", "sequence"),
        ("use_bias_correction_kl", True),
        ("entropy_coef", 0.1),
        ("delta", 1.1),
        ("sapo_temperature_neg", 2.0),
        ("vespo_lambda_pos", 2.0),
        ("entropy_target", 2.0),
        ("kl_estimator", "k4"),
        ("scope", "all"),
    ],
)
def test_what_has_no_meaning_is_refused(make: Any, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        make(**{setting: value})
