"""diffu-GRPO as an algorithm: its first step, its views, its clipping, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.views import Rows
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def plain_scores(trainer: Any, batch: dict[str, Any], hidden: Tensor) -> Tensor:
    """Log-probabilities `[B, C]` from the model's own logits, given which tokens are hidden."""
    ids = torch.cat([batch["prompt_ids"], batch["canvas_ids"]], 1)
    keys = torch.cat([batch["prompt_mask"], torch.ones_like(batch["canvas_ids"])], 1)
    positions = (keys.cumsum(-1) - 1).clamp(min=0)
    noised = torch.where(hidden, trainer.spec.mask_token_id, ids)
    logits = trainer.model(input_ids=noised, attention_mask=keys, position_ids=positions).logits
    canvas, width = batch["canvas_ids"].shape[1], batch["completion_ids"].shape[1]
    chosen = logits[:, -canvas:].log_softmax(-1).gather(-1, batch["canvas_ids"][..., None]).squeeze(-1)
    return chosen[:, :width]


def test_at_the_first_step_ratios_are_one_kl_is_zero_and_the_gradient_is_reinforce(make_trainer: Any) -> None:
    trainer = make_trainer(beta=0.04, max_steps=1, max_grad_norm=0.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    record, logs = trainer.seen[0], trainer.state.log_history[0]
    assert logs["kl"] == pytest.approx(0, abs=1e-7)
    assert logs["clip_ratio/region_mean"] == 0
    mask = record["completion_mask"].bool()
    for policy in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(record[policy][mask], record["scores"][mask], rtol=0, atol=1e-6)
    step = {name: (before[name] - p.detach()) / 0.1 for name, p in trainer.model.named_parameters()}

    # REINFORCE with the group's mean as baseline, on the model as it was, from its plain logits.
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(before[name])
    views = trainer.estimator.draw(_rows(record), seed=trainer.args.seed, iteration=0)
    scores = plain_scores(trainer, record, views.hidden[:, 0])
    advantages = record["advantages"][:, None]
    objective = -(mask * advantages * scores).sum() / mask.sum()
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(objective, parameters), strict=True):
        torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_whole_canvas_may_be_scored(make_trainer: Any) -> None:
    trainer = make_trainer(tiny_llada_that_ends(), scope="canvas", stop_at_eos=False, beta=0.04, max_steps=1)
    trainer.train()
    record = trainer.seen[0]
    assert trainer.estimator.scope == "canvas" and record["completion_mask"].all()
    assert not record["canvas_valid"].all() and (record["scores"] < 0).all()
    with pytest.raises(ValueError, match="scope='all' is not allowed; choose one of valid, canvas"):
        make_trainer(scope="all")


def _rows(record: dict[str, Any]) -> Any:
    names = ("prompt_ids", "prompt_mask", "canvas_ids", "canvas_valid", "row_ids")
    return Rows(*(record[name] for name in names))


def test_advantages_are_rewards_minus_the_group_mean_without_a_deviation(make_trainer: Any) -> None:
    trainer = make_trainer(
        rewards=lambda completions, **_: [float(i) ** 2 for i in range(len(completions))], max_steps=1
    )
    trainer.train()
    by_row = dict(zip(trainer.seen[0]["row_ids"].tolist(), trainer.seen[0]["advantages"].tolist(), strict=True))
    expected = [i**2 - sum(j**2 for j in range(i // 4 * 4, i // 4 * 4 + 4)) / 4 for i in range(8)]
    assert [by_row[i] for i in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("iterations", "accumulation", "per_generation"),
    [(3, 1, 1), (3, 2, 2), (4, 2, 2), (2, 2, 4), (2, 2, 3)],
)
def test_every_pass_over_a_batch_has_views_of_its_own_and_all_policies_share_them(
    make_trainer: Any, recording_estimator: Any, iterations: int, accumulation: int, per_generation: int
) -> None:
    rows = 8 * per_generation
    micro_steps = iterations * per_generation
    trainer = make_trainer(
        num_iterations=iterations,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        max_steps=-(-micro_steps // accumulation),
        p_mask_prompt=0.5,
        beta=0.04,
    )
    trainer.estimator = recording_estimator(trainer.estimator)
    trainer.train()
    drawn = [entry for entry in trainer.estimator.drawn if entry[1] < rows]  # of the first generation batch
    passes: dict[int, list[int]] = {}
    for in_loss, row, iteration, _ in drawn:
        if in_loss:
            passes.setdefault(row, []).append(iteration)
    assert passes == {row: list(range(iterations)) for row in range(rows)}
    views: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for _, row, iteration, hidden in drawn:
        views.setdefault((row, iteration), set()).add(hidden)
    assert all(len(found) == 1 for found in views.values()), "old, reference and current policy saw the same tokens"
    asked = {(row, iteration) for in_loss, row, iteration, _ in drawn if not in_loss}
    assert asked == {(row, n) for row in range(rows) for n in range(iterations)}
    different = [len({views[row, n].copy().pop() for n in range(iterations)}) for row in range(rows)]
    assert max(different) > 1


def test_a_policy_that_does_not_move_has_ratio_one_in_every_pass(make_trainer: Any) -> None:
    trainer = make_trainer(num_iterations=3, max_steps=3, p_mask_prompt=0.5, learning_rate=0.0)
    trainer.train()
    for record in trainer.seen:
        mask = record["completion_mask"].bool()
        for policy in ("old_per_token_logps", "ref_per_token_logps"):
            torch.testing.assert_close(record[policy][mask], record["scores"][mask], rtol=0, atol=1e-6)
    first, last = (dict(zip(r["row_ids"].tolist(), r["scores"], strict=True)) for r in trainer.seen[::2])
    assert any((first[row] - last[row]).abs().max() > 1e-4 for row in first), "yet the passes differ"


def test_without_prompt_masking_all_passes_share_one_view(make_trainer: Any, recording_estimator: Any) -> None:
    trainer = make_trainer(num_iterations=3, max_steps=3, p_mask_prompt=0.0)
    trainer.estimator = recording_estimator(trainer.estimator)
    trainer.train()
    assert {hidden for _, _, _, hidden in trainer.estimator.drawn} == {()}
    assert sum(not in_loss for in_loss, *_ in trainer.estimator.drawn) == 8  # the reference alone
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 0


@pytest.mark.parametrize("split", [(8, 1), (4, 2), (2, 4)])
def test_splitting_a_batch_into_micro_batches_changes_nothing(
    make_trainer: Any, losses: Callable[[Any], list[float]], split: tuple[int, int], unsplit: tuple[Any, Any]
) -> None:
    size, accumulation = split
    trainer = make_trainer(
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=4, beta=0.04
    )
    trainer.train()
    expected_losses, expected = unsplit
    assert losses(trainer) == pytest.approx(expected_losses, abs=2e-6)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def unsplit(build_trainer: Any, losses: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Losses and weights of a run whose steps take their whole batch at once, with gradient checkpointing on top."""
    folder = tmp_path_factory.mktemp("unsplit")
    trainer = build_trainer(folder, max_steps=4, beta=0.04, activation_checkpointing=True)
    trainer.train()
    return losses(trainer), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# --- the loss on its own ----------------------------------------------------------------------------------------------


def loss_batch(ratios: Tensor, advantages: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Scores whose policy ratios are given, and a batch in TRL's form."""
    scores = torch.full_like(ratios, -1.5, requires_grad=True)
    mask = torch.ones_like(ratios, dtype=torch.long) if mask is None else mask
    batch = {
        "prompt_ids": torch.zeros(len(ratios), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(ratios), 1, dtype=torch.long),
        "completion_ids": torch.full(ratios.shape, 9),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": scores.detach() - ratios.log(),
        "num_items_in_batch": mask.sum(),
    }
    return scores, batch


def loss_of(trainer: Any, scores: Tensor, batch: dict[str, Any]) -> Tensor:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch)


def test_clipping_stops_the_gradient_on_one_side_only(make_trainer: Any) -> None:
    trainer = make_trainer(beta=0.0, epsilon=0.5)
    ratios = torch.tensor([[0.3, 1.0, 1.7], [0.3, 1.0, 1.7]])
    scores, batch = loss_batch(ratios, torch.tensor([1.0, -1.0]))
    (gradient,) = torch.autograd.grad(loss_of(trainer, scores, batch), scores)
    expected = -torch.tensor([[0.3, 1.0, 0.0], [0.0, -1.0, -1.7]]) / 6
    torch.testing.assert_close(gradient, expected)


LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_of_trl_is_live(make_trainer: Any, level: str) -> None:
    trainer = make_trainer(beta=0.0, importance_sampling_level=level, use_cpu=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    advantages = torch.tensor([0.5, -0.25])
    normaliser = {"grpo": mask.sum(-1, keepdim=True) * 2, "dr_grpo": 2 * 8}
    for name in LOSS_TYPES:
        trainer.loss_type = name
        trainer.epsilon_high = 5.0 if name == "cispo" else 0.5  # there it bounds the ratio itself
        scores, batch = loss_batch(torch.ones(2, 4), advantages, mask)
        (gradient,) = torch.autograd.grad(loss_of(trainer, scores, batch), scores)
        assert gradient.isfinite().all() and gradient[mask.bool()].any() and not gradient[~mask.bool()].any(), name
        if level == "token" and name in ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo"):
            # At ratio 1 they all are REINFORCE, and differ in what they divide by.
            divisor = normaliser["grpo"] if name == "sapo" else normaliser.get(name, mask.sum())
            torch.testing.assert_close(gradient, -advantages[:, None] * mask / divisor)
        scores, batch = loss_batch(torch.ones(2, 4), torch.zeros(2), mask)
        (gradient,) = torch.autograd.grad(loss_of(trainer, scores, batch), scores)
        assert not gradient.any(), f"{name}: no advantage, no gradient"


@pytest.mark.parametrize(("name", "invariant"), [("dapo", True), ("dr_grpo", True), ("grpo", True), ("bnpo", False)])
def test_which_averages_survive_splitting_a_batch(make_trainer: Any, name: str, invariant: bool) -> None:
    trainer = make_trainer(
        beta=0.0, loss_type=name, gradient_accumulation_steps=2, per_device_train_batch_size=4, num_iterations=1
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    ratios, advantages = torch.linspace(0.7, 1.3, 16).view(4, 4), torch.tensor([0.3, -0.5, 0.1, 0.4])
    scores, batch = loss_batch(ratios, advantages, mask)
    trainer.model.train()

    def total(parts: list[slice]) -> float:
        trainer.current_gradient_accumulation_steps = len(parts)
        trainer.args.steps_per_generation = len(parts)
        return sum(
            trainer.loss(
                PolicyScores(scores[part], torch.ones_like(scores[part])),
                {key: value if value.dim() == 0 else value[part] for key, value in batch.items()},
            ).item()
            for part in parts
        )

    whole, halves = total([slice(0, 4)]), total([slice(0, 2), slice(2, 4)])
    assert (abs(whole - halves) < 1e-6) is invariant


@pytest.mark.parametrize("lengths", [[8, 8, 8, 8], [1, 1, 1, 1], [1, 8, 3, 5]])
def test_any_number_of_valid_tokens_gives_a_finite_loss(make_trainer: Any, lengths: list[int]) -> None:
    trainer = make_trainer(beta=0.0, num_iterations=1)
    canvas = torch.randint(7, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(8) < torch.tensor(lengths)[:, None]
    width = max(lengths)
    _, batch = loss_batch(torch.ones(4, width), torch.tensor([1.0, -1.0, 0.5, -0.5]), valid[:, :width].long())
    del batch["old_per_token_logps"]
    batch.update(
        prompt_ids=torch.full((4, 1), 9),
        canvas_ids=canvas,
        canvas_valid=valid,
        row_ids=torch.arange(4),
        drawn=torch.ones_like(valid),
        drawn_log_probs=torch.zeros(4, 8),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.model.parameters())
    assert trainer.seen[-1]["scores"].shape == (4, width)
    assert not trainer.seen[-1]["scores"][~valid[:, :width]].any()
