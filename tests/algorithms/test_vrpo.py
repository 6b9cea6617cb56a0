"""VRPO: its score on policy, its gradient from plain logits, what shared views and budgets do to variance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from rl4dlm import VRPOConfig, VRPOTrainer, tiny_llada, tiny_sdar, tiny_tokenizer
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.one_step import OneStepPerBlock
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows
from rl4dlm.training.preferences import rows_of_completions
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PAIRS = [{"prompt": f"{i}+1=", "chosen": "abcd"[: 1 + i % 4], "rejected": "zyx"[: 1 + i % 3]} for i in range(8)]


def build(folder: Path, model: Any = None, **settings: Any) -> Any:
    adapter = settings.pop("peft_config", None)
    model = tiny_llada(initializer_range=0.2) if model is None else model
    common = {"per_device_train_batch_size": 4, "max_steps": 1, "max_grad_norm": 0.0, "loss_type": ["sigmoid"]}
    args = VRPOConfig(**{"output_dir": str(folder), **SMALL_RUN, **common, "loss_weights": None, **settings})
    rows = Dataset.from_list(PAIRS)
    return VRPOTrainer(model, None, args, rows, None, tiny_tokenizer(), peft_config=adapter)


def batch_of(trainer: Any) -> dict[str, Tensor]:
    trainer.model.train()
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def moved(model: Any, share: float = 0.05) -> None:
    """A policy near its reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(share * p.abs().mean() * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize("settings", [{"num_views": 1}, {"num_views": 4, "complement": True}, {"num_views": 8}])
def test_a_policy_that_is_its_reference_has_loss_log_two(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = build(tmp_path, **settings)
    batch = batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert trainer._metrics["train"]["rewards/margins"][-1] == 0
    moved(trainer.model)
    assert trainer._compute_loss(trainer.model, batch).item() != pytest.approx(math.log(2), abs=1e-4)


def plain_bounds(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """`[2 B]`, from the model's own logits, view by view."""
    rows, _ = rows_of_completions(batch)
    views = trainer.estimator.draw(rows, seed=trainer.args.seed, iteration=0)
    positions = (rows.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for k in range(views.hidden.shape[1]):
        noised = torch.where(views.hidden[:, k], trainer.spec.mask_token_id, rows.ids)
        keys = rows.attention_mask.long()
        logits = trainer.model(input_ids=noised, attention_mask=keys, position_ids=positions).logits
        log_probs = logits[:, -rows.canvas_ids.shape[1] :].log_softmax(-1).gather(-1, rows.canvas_ids[..., None])
        total = total + (log_probs.squeeze(-1) * views.weight[:, k]).sum(-1)
    return total


@pytest.mark.parametrize("one_view", [False, True])
def test_the_first_gradient_raises_what_is_chosen_and_lowers_what_is_not(tmp_path: Path, one_view: bool) -> None:
    trainer = build(tmp_path, num_views=3, beta=0.3, one_view=one_view)
    batch = batch_of(trainer)
    parameters = list(trainer.model.parameters())
    found = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), parameters)
    chosen, rejected = plain_bounds(trainer, batch).chunk(2)
    expected = torch.autograd.grad(-0.5 * 0.3 * (chosen - rejected).mean(), parameters)
    assert any(float(g.abs().max()) > 1e-3 for g in expected)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-6)


def test_the_cross_entropy_of_what_is_chosen_is_its_bound_per_token(tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.05])
    batch = batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    with torch.no_grad():
        bounds = plain_bounds(trainer, batch).chunk(2)[0]
    tokens = batch["completion_mask"].chunk(2)[0].sum()
    assert loss.item() == pytest.approx(math.log(2) - 0.05 * (bounds.sum() / tokens).item(), rel=1e-5)


def test_swapping_a_pair_changes_the_sign_of_its_score(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_views=2)
    batch = batch_of(trainer)
    moved(trainer.model)
    margins = []
    for rows in (torch.arange(8), torch.arange(8).roll(4)):
        trainer._compute_loss(trainer.model, {name: value[rows] for name, value in batch.items()})
        margins.append(trainer._metrics["train"]["rewards/margins"][-1])
    assert margins[0] == pytest.approx(-margins[1], abs=1e-6) and abs(margins[0]) > 1e-4


def test_rows_are_the_same_tokens(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    batch = batch_of(trainer)
    rows, columns = rows_of_completions(batch)
    for i in range(8):
        real = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert torch.equal(
            torch.cat([rows.prompt_ids[i][rows.prompt_mask[i]], rows.canvas_ids[i][rows.valid[i]]]), real
        )
        assert torch.equal(batch["input_ids"][i][columns[i]][rows.valid[i]], rows.canvas_ids[i][rows.valid[i]])
    again, _ = rows_of_completions({name: value[[3, 5]] for name, value in batch.items()})
    assert torch.equal(again.row_ids, rows.row_ids[[3, 5]]) and len(rows.row_ids.unique()) == 8
    with pytest.raises(ValueError, match="no prompt before it"):
        rows_of_completions({**batch, "completion_mask": batch["attention_mask"]})


def variance_of_scores(trainer: Any, num_views: int, shared: bool) -> float:
    """Mean variance, over 48 draws, of B_theta - B_ref of the completions."""
    rows, _ = rows_of_completions(batch_of(trainer))
    estimator, found = ELBO(num_views, "count", stratify="none"), []
    for seed in range(48):
        both = []
        for model, other in ((trainer.model, 0), (trainer.ref_model, 0 if shared else 1000)):
            views = estimator.draw(rows, seed=seed + other, iteration=0)
            with torch.no_grad():
                scored = score_views(model, trainer.spec, rows.ids, rows.attention_mask, views)
            both.append(estimator.reduce(scored.log_probs, views).sum(-1))
        found.append(both[0] - both[1])
    return float(torch.stack(found).var(0).mean())


def test_variance_falls_with_shared_views_and_with_the_budget(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    moved(trainer.model)
    one, eight = (variance_of_scores(trainer, n, shared=True) for n in (1, 8))
    assert eight == pytest.approx(one / 8, rel=0.5)
    assert one < 0.1 * variance_of_scores(trainer, 1, shared=False)


def test_a_budget_of_levels_is_worth_more_than_one_of_masks(tmp_path: Path) -> None:
    """Four levels of one mask each, against two levels of two: the variance of the estimate."""
    trainer = build(tmp_path)
    rows, _ = rows_of_completions(batch_of(trainer))
    rows = Rows(
        rows.prompt_ids[3:4].expand(256, -1), rows.prompt_mask[3:4].expand(256, -1),
        rows.canvas_ids[3:4].expand(256, -1), rows.valid[3:4].expand(256, -1), torch.arange(256),
    )  # fmt: skip
    estimator = ELBO(4, "count", stratify="none")
    size = int(rows.valid[0].sum())
    generator = torch.Generator().manual_seed(0)
    found = []
    for levels in (4, 2):
        count = torch.randint(1, size + 1, (256, levels), generator=generator).repeat_interleave(4 // levels, 1)
        keys = torch.rand(256, 4, rows.canvas_ids.shape[1], generator=generator).masked_fill(~rows.valid[:, None], 9)
        mask = keys.argsort(-1).argsort(-1) < count[..., None]
        views = estimator.views(rows, mask, torch.zeros(256, 4))
        with torch.no_grad():
            scored = score_views(trainer.model, trainer.spec, rows.ids, rows.attention_mask, views)
        found.append(float(estimator.reduce(scored.log_probs, views).sum(-1).var()))
    assert found[0] < found[1]


def test_an_adapter_learns_beside_the_model_without_it(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = build(tmp_path, peft_config=lora, num_views=2)
    trainer.train()
    assert trainer.ref_model is None
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-5) and "logits/chosen" not in log
    assert (tmp_path / "README.md").exists() or not trainer.create_model_card()


def test_training_raises_the_margin(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_views=4, max_steps=12, learning_rate=0.02, beta=1.0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 0.1


# --- one step of each block -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_one_step_of_each_block_is_unbiased_for_all_of_them(weighted: bool) -> None:
    """Each state of a block of two tokens, and its token, counts as it does in the mean over orders."""
    count = 4000
    ids = torch.full((count, 6), 9)
    valid = torch.ones(count, 4, dtype=torch.bool)
    rows = Rows(ids[:, :2], torch.ones(count, 2, dtype=torch.bool), ids[:, 2:], valid, torch.arange(count))
    views = OneStepPerBlock(2, block_length=2, weighted=weighted).draw(rows, seed=0, iteration=0)
    hidden, weight = views.hidden[..., 2:], views.weight * 2
    assert bool((hidden | ~views.scored).all())
    full = 1.0 if weighted else 0.5
    for block in (0, 2):
        a, b = (hidden[..., block + i] for i in (0, 1))
        for i, state in ((0, a & b), (1, a & b), (0, a & ~b), (1, b & ~a)):
            share = float((weight[..., block + i] * state).mean())
            assert share == pytest.approx(0.5 * full, abs=0.04 * full)


def test_one_step_of_each_block_trains_a_model_with_blocks(tmp_path: Path) -> None:
    model = tiny_sdar(initializer_range=0.2)
    trainer = build(tmp_path, model, steps="one_per_block", num_views=2)
    assert trainer.estimator == OneStepPerBlock(2, trainer.spec.block_length, 1, True, trainer.spec.grid_origin)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(ValueError, match="steps='one_per_block' is not allowed for a model with attention='full'"):
        build(tmp_path, steps="one_per_block", block_length=2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True is not supported"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5 is not supported"),
        ({"use_weighting": True}, "use_weighting=True is not supported"),
        ({"steps": "all"}, "steps='all' is not allowed"),
        ({"tokens_per_step": 2}, "tokens_per_step=2 is not supported: it has no effect with steps='bound'"),
        ({"complement": True, "num_views": 3}, "num_views=3 is not allowed with complement=True"),
        ({"complement": True, "steps": "one_per_block"}, "complement=True is not supported"),
        ({"disable_dropout": False}, "disable_dropout=False is not supported"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        VRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    assert said in str(error.value)
