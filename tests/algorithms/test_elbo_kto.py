"""ELBO-KTO: its loss and gradient from plain logits, what is exact where policy and reference are one, its data."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from rl4dlm import ELBOKTOConfig, ELBOKTOTrainer, tiny_llada, tiny_tokenizer
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.views import Rows
from rl4dlm.training.preferences import rows_of_completions
from tests.algorithms.test_vrpo import PAIRS, build as vrpo, moved, plain_bounds, variance_of_scores
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ROWS = [{"prompt": f"{i}+1=", "completion": "abcd"[: 1 + i % 4], "label": i % 3 != 0} for i in range(8)]


def build(folder: Path, rows: Any = None, **settings: Any) -> Any:
    adapter = settings.pop("peft_config", None)
    common = {"per_device_train_batch_size": 4, "max_steps": 1, "max_grad_norm": 0.0}
    args = ELBOKTOConfig(**{"output_dir": str(folder), **SMALL_RUN, **common, **settings})
    data = Dataset.from_list(ROWS if rows is None else rows)
    model = tiny_llada(initializer_range=0.2)
    return ELBOKTOTrainer(model, None, args, data, None, tiny_tokenizer(), peft_config=adapter)


def batch_of(trainer: Any) -> dict[str, Tensor]:
    trainer.model.train()
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "label": ~batch["label"]}


@pytest.mark.parametrize(
    "settings",
    [{"num_views": 1}, {"complement": True, "reward_baseline": "zero"}, {"num_views": 3, "length_normalize": True}],
)
def test_a_policy_that_is_its_reference_has_reward_zero_and_loss_one_half(tmp_path: Path, settings: Any) -> None:
    trainer = build(tmp_path, **settings)
    assert trainer._compute_loss(trainer.model, batch_of(trainer)).item() == 0.5
    found = trainer._metrics["train"]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "elbo_kto/baseline"):
        assert found[name] == [0.0]
    moved(trainer.model)
    trainer._compute_loss(trainer.model, batch_of(trainer))
    assert found["rewards/margins"][1] != 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("baseline", ["zero", "batch_mean"])
def test_the_loss_is_the_papers(tmp_path: Path, baseline: str, normalize: bool) -> None:
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = build(tmp_path, beta=3.0, reward_baseline=baseline, length_normalize=normalize, **weights)
    moved(trainer.model, 0.3)
    batch = batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    with torch.no_grad():
        policy = plain_bounds(trainer, batch)
        model, trainer.model = trainer.model, trainer.ref_model
        rewards = policy - plain_bounds(trainer, batch)
        trainer.model = model
    if normalize:
        rewards = rewards / batch["completion_mask"].sum(-1)
    shifted = 3.0 * (rewards - (rewards.mean() if baseline == "batch_mean" else 0))
    each = [
        1.5 * (1 - 1 / (1 + math.exp(-s))) if wanted else 0.7 * (1 - 1 / (1 + math.exp(s)))
        for s, wanted in zip(shifted.tolist(), batch["label"].tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(each) / 4, abs=1e-5) and loss.item() != 0.55
    found = trainer._metrics["train"]
    assert found["rewards/chosen"][0] == pytest.approx(3 * rewards[batch["label"]].mean().item(), abs=1e-4)
    assert found["logps/rejected"][0] == pytest.approx(policy[~batch["label"]].mean().item(), abs=1e-4)
    for limit in (6, 8):
        assert found[f"elbo_kto/share_above_{limit}"][0] == (shifted.abs() > limit).double().mean().item()


def test_the_first_gradient_raises_what_is_wanted_and_lowers_what_is_not(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_views=3, beta=0.3)
    batch = batch_of(trainer)
    parameters = list(trainer.model.parameters())
    found = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), parameters)
    sign = torch.where(batch["label"], 1.0, -1.0)
    expected = torch.autograd.grad(-0.25 * 0.3 * (sign * plain_bounds(trainer, batch)).mean(), parameters)
    assert any(float(g.abs().max()) > 1e-3 for g in expected)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-6)


def test_labels_and_rewards_change_their_sign_together(tmp_path: Path) -> None:
    """With all labels flipped, and policy and reference exchanged, the loss is the same; flipped alone it is 1 less."""
    trainer = build(tmp_path, num_views=2, beta=5.0)
    moved(trainer.model)
    batch = batch_of(trainer)
    loss, other = (trainer._compute_loss(trainer.model, b).item() for b in (batch, flipped(batch)))
    assert other == pytest.approx(1 - loss, abs=1e-6) and abs(loss - 0.5) > 1e-4
    model, trainer.ref_model = trainer.model, trainer.model
    twin = build(tmp_path / "twin").model  # the untouched weights
    assert trainer._compute_loss(twin, flipped(batch)).item() == pytest.approx(loss, abs=1e-6)
    assert trainer.model is model


def test_all_counts_and_masks_give_the_bound(tmp_path: Path) -> None:
    """The mean over |M| uniform in 1..5 and all M of a size is the mean over the orders in which tokens are written."""
    trainer = build(tmp_path)
    rows = rows_of_completions(batch_of(trainer))[0][torch.tensor([3])]
    size = int(rows.valid[0].sum())
    assert size == rows.valid.shape[1] == 5, "four letters and the end"
    masks = [torch.tensor(m) for m in itertools.product([False, True], repeat=size) if any(m)]

    def estimate(mask: Tensor) -> float:
        views = ELBO(1, "count").views(rows, mask[None, None], torch.zeros(1, 1))
        return trainer.bounds(trainer.model, rows, views)[0].sum().item()

    with torch.no_grad():
        found = {tuple(mask.tolist()): estimate(mask) for mask in masks}
    mean = sum(value / size / math.comb(size, sum(mask)) for mask, value in found.items())
    one = {  # log p of each hidden token, from views that score it alone
        (mask, i): value for mask in found for i, value in enumerate(log_probs(trainer, rows, torch.tensor(mask)))
    }
    orders = []
    for order in itertools.permutations(range(size)):
        hidden, total = [True] * size, 0.0
        for i in order:
            total += one[tuple(hidden), i]
            hidden[i] = False
        orders.append(total)
    assert mean == pytest.approx(sum(orders) / len(orders), abs=1e-4)
    drawn = trainer.estimator.draw(rows, seed=0, iteration=0)
    counts = drawn.hidden[0, :, -size:].sum(-1)
    assert counts.unique().tolist() == [1, 2, 3, 4, 5], "eight views are spread over five counts"


@torch.no_grad()
def log_probs(trainer: Any, rows: Rows, mask: Tensor) -> list[float]:
    ids = rows.ids.clone()
    ids[0, -len(mask) :][mask] = trainer.spec.mask_token_id
    logits = trainer.model(input_ids=ids, attention_mask=rows.attention_mask.long()).logits[0, -len(mask) :]
    return logits.log_softmax(-1).gather(-1, rows.canvas_ids[0][:, None]).squeeze(-1).tolist()


def test_shared_views_take_the_variance_of_rewards_down(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    moved(trainer.model)
    assert variance_of_scores(trainer, 1, shared=True) < 0.1 * variance_of_scores(trainer, 1, shared=False)


def test_an_adapter_learns_beside_the_model_without_it(tmp_path: Path) -> None:
    trainer = build(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), num_views=2)
    trainer.train()
    assert trainer.ref_model is None
    log = trainer.state.log_history[0]
    assert log["loss"] == 0.5 and "kl" not in log and log["elbo_kto/baseline"] == 0 and log["num_tokens"] > 0
    trainer.create_model_card()
    assert "2510.23658" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_training_raises_the_margin(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_views=4, max_steps=12, learning_rate=0.05, beta=1.0)
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.1


def test_evaluation_has_the_same_views_every_time(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "beta": 1.0}
    args = ELBOKTOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **{**SMALL_RUN, **settings})
    data = Dataset.from_list(ROWS)
    trainer = ELBOKTOTrainer(tiny_llada(initializer_range=0.2), None, args, data, data, tiny_tokenizer())
    moved(trainer.model)
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2 and found[0]["eval_loss"] == found[1]["eval_loss"] != 0.5
    assert found[0]["eval_elbo_kto/baseline"] == found[1]["eval_elbo_kto/baseline"] != 0
    with pytest.raises(ValueError, match="row 0 of eval_dataset has label=1"):
        ELBOKTOTrainer("x", None, args, data, Dataset.from_list([{**ROWS[0], "label": 1}]))


@pytest.mark.parametrize("method", ["elbo_kto", "vrpo"])
def test_a_run_that_is_resumed_has_the_reference_that_it_had(tmp_path: Path, method: str) -> None:
    """With `sync_ref_model` the reference is another one than at first, which checkpoints have to hold."""
    more: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    more |= {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "num_views": 2}

    def run(name: str, checkpoint: Any = None) -> Any:
        folder = tmp_path / name
        made = build(folder, **more) if method == "elbo_kto" else vrpo(folder, **more)
        made.train(resume_from_checkpoint=checkpoint)
        return made

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in ((whole.model, resumed.model), (whole.ref_model, resumed.ref_model)):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    first = tiny_llada(initializer_range=0.2)
    assert not torch.equal(whole.ref_model.lm_head.weight, first.lm_head.weight)


def test_pairs_are_taken_apart(tmp_path: Path) -> None:
    trainer = build(tmp_path, PAIRS)
    assert len(trainer.train_dataset) == 16 and sum(trainer.train_dataset["label"]) == 8


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "completion": "b"}], "has columns prompt, completion, but no label"),
        ([{"prompt": "a", "label": True}], "but no completion; needed are prompt, completion and label"),
        (
            [{"prompt": "a", "completion": "b", "label": label} for label in (1, 0)],
            "row 0 of train_dataset has label=1",
        ),
        ([{"prompt": "a", "completion": "b", "label": label} for label in (True, None)], "row 1 of train_dataset"),
        ([{"prompt": "a", "completion": "b", "label": "yes"}], "label='yes', which is not allowed"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, rows: Any, said: str) -> None:
    args = ELBOKTOConfig(output_dir=str(tmp_path), **SMALL_RUN)
    with pytest.raises(ValueError) as error:
        ELBOKTOTrainer("no model is looked for", None, args, Dataset.from_list(rows))
    assert said in str(error.value)


def test_a_length_that_no_prompt_fits_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length=3 leaves nothing of train_dataset"):
        build(tmp_path, max_length=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True is not supported"),
        ({"loss_type": "kto"}, "loss_type='kto' is not supported: the loss is ELBO-KTO's"),
        ({"reward_baseline": "kl"}, "reward_baseline='kl' is not allowed"),
        ({"beta": 0.0}, "beta=0.0 is not allowed"),
        ({"undesirable_weight": -1.0}, "undesirable_weight=-1.0 is not allowed"),
        ({"complement": True, "num_views": 3}, "num_views=3 is not allowed with complement=True"),
        ({"beta": math.inf}, "beta=inf is not allowed"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "leave nothing to learn from"),
        ({"precompute_ref_batch_size": 2}, "precompute_ref_batch_size=2 is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"per_device_train_batch_size": 1}, "reward_baseline='batch_mean' is not allowed with a batch of one"),
        ({"per_device_eval_batch_size": 1, "eval_strategy": "epoch"}, "raise per_device_eval_batch_size"),
        ({"disable_dropout": False}, "disable_dropout=False is not supported"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        ELBOKTOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    assert said in str(error.value)
