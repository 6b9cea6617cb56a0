"""IGPO: its first step, the entropy filter, groups after replacement, and plain GRPO where nothing triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig, DiffuGRPOTrainer
from rl4dlm.algorithms.igpo import IGPOConfig, IGPOTrainer, kept_hints, most_entropic
from rl4dlm.training.trainer import PolicyScores
from tests.training.steps import tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

HINTS = {"free_tail": 0, "hint_ratio": [0.5, 1.0], "chunk_length": [1, 2], "hide_answer": False}


class Recording(IGPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        value = super().loss(scores, batch)
        copies = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.seen.append({**copies, "scores": scores.log_probs.detach().clone(), "loss": value.detach().clone()})
        return value


def data() -> Dataset:
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(4)], "solution": ["abcdefgh"] * 4})


class Verifier:
    """Wrong in the first round; of the attempts, the first two of each group are right."""

    __name__ = "verifier"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        return [float(self.calls % 2 == 0 and i % 4 < 2) for i in range(len(completions))]


@pytest.fixture
def make(make_trainer: Any) -> Callable[..., Any]:
    def build(**changes: Any) -> Any:
        defaults = {"trainer": Recording, "config": IGPOConfig, "dataset": data(), "rewards": Verifier(), **HINTS}
        return make_trainer(**{**defaults, **changes})

    return build


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_wrong_groups_get_right_completions_and_teach(make: Any, adapter: Any) -> None:
    trainer = make(peft_config=adapter, num_generations=4, beta=0.01)
    trainer.train()
    record = trainer.seen[0]
    assert int(record["replaced"].sum()) == 4, "two in each of two groups"
    # With a share rho of right completions their advantage is 1 - rho, that of wrong ones -rho.
    assert record["advantages"][record["replaced"]].tolist() == [0.5] * 4
    assert record["advantages"][~record["replaced"]].tolist() == [-0.5] * 4
    mask = record["completion_mask"].bool()
    for policy in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(record[policy][mask], record["scores"][mask], rtol=0, atol=1e-6)
    log = trainer.state.log_history[0]
    assert log["intervention/row_share"] == 0.5 and log["kl"] == pytest.approx(0, abs=1e-7)
    assert record["loss"].item() == pytest.approx(0, abs=1e-6), "at ratio one it is minus the mean advantage"
    hinted = record["hinted"][:, : mask.shape[1]]
    assert hinted[record["replaced"]].any(-1).all() and (mask & hinted).any(), "given tokens are scored"
    kept = mask.sum() - (mask & hinted).sum() + kept_hints((mask & hinted).sum(-1), 0.2).sum()
    assert int(record["num_items_in_batch"]) == int(kept)


def test_the_whole_canvas_may_be_scored(make: Any) -> None:
    trainer = make(model=tiny_llada_that_ends(), scope="canvas", stop_at_eos=False, num_generations=4, max_steps=1)
    trainer.train()
    record = trainer.seen[0]
    assert trainer.estimator.scope == "canvas" and record["completion_mask"].all()
    assert not record["canvas_valid"].all() and (record["scores"] < 0).all()


def test_without_an_all_wrong_group_it_is_grpo(make: Any, make_trainer: Any) -> None:
    common = {
        "dataset": data(),
        "rewards": lambda completions, **_: [float(i % 4 == 0) for i in range(len(completions))],
        "max_steps": 3,
        "beta": 0.01,
        "epsilon": 0.2,
        "temperature": 1.2,
    }
    igpo = make(**common, importance_sampling_level="token", loss_type="dapo")
    plain = make_trainer(**common, trainer=DiffuGRPOTrainer, config=DiffuGRPOConfig, p_mask_prompt=0.0)
    for trainer in (igpo, plain):
        trainer.train()
    for ours, theirs in zip(igpo.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_filter_keeps_the_most_uncertain_hints() -> None:
    entropies = torch.tensor([[0.9, 0.1, 0.5, 0.5, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]])
    hints = torch.tensor([[False, True, True, True, True], [True, True, True, True, True]])
    for share, counts in ((0.2, [1, 1]), (0.5, [2, 2]), (0.6, [2, 3]), (1.0, [4, 5]), (0.0, [0, 0])):
        kept = most_entropic(entropies, hints, share)
        assert kept.sum(-1).tolist() == counts and not (kept & ~hints).any()
    assert most_entropic(entropies, hints, 0.2).tolist() == [
        [False, False, True, False, False],
        [True, False, False, False, False],
    ]
    assert kept_hints(torch.tensor([0, 1, 4, 5, 10]), 0.2).tolist() == [0, 1, 1, 1, 2]
    assert not most_entropic(entropies, torch.zeros_like(hints), 0.5).any()


def loss_and_gradient(trainer: Any, share: float, level: str = "sequence") -> Tensor:
    trainer.args.hint_entropy_share, trainer.importance_sampling_level = share, level
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    scores = torch.full((2, 5), -1.5, requires_grad=True)
    hinted = torch.tensor([[True, True, False, False, True, False], [False] * 6])
    batch = {
        "prompt_ids": torch.zeros(2, 1, dtype=torch.long),
        "prompt_mask": torch.ones(2, 1, dtype=torch.long),
        "completion_ids": torch.full((2, 5), 9),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_per_token_logps": scores.detach() - torch.tensor([[0.1, -0.05, 0.02, 0.0, 0.01], [0.0] * 5]),
        "num_items_in_batch": torch.tensor(6),
        "hinted": hinted,
        "old_entropies": torch.tensor([[0.1, 0.9, 5.0, 5.0, 0.2], [1.0] * 5]),
    }
    (gradient,) = torch.autograd.grad(trainer.loss(PolicyScores(scores, torch.ones_like(scores)), batch), scores)
    return gradient


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_dropped_hints_have_no_gradient(make: Any, level: str) -> None:
    trainer = make(beta=0.0)
    gradient = loss_and_gradient(trainer, 0.2, level)
    assert (gradient != 0).tolist() == [[False, True, True, True, False], [True, True, True, False, False]]
    everything = loss_and_gradient(trainer, 1.0, level)
    assert (everything != 0).tolist() == [[True] * 5, [True, True, True, False, False]]
    none = loss_and_gradient(trainer, 0.0, level)
    assert (none != 0)[0].tolist() == [False, False, True, True, False]
    if level == "sequence":  # rho A / n / G, the ratio being that of the kept tokens
        ratio = torch.tensor([-0.05, 0.02, 0.0]).mean().exp()
        torch.testing.assert_close(gradient[0, 1:4], (-ratio / 3 / 2).expand(3))
        torch.testing.assert_close(gradient[1, :3], torch.tensor([1 / 6] * 3))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hint_entropy_share", 1.5),
        ("hint_ratio", [0.9, 0.1]),
        ("max_replaced_share", 0.1),
        ("free_tail", 8),
        ("scope", "all"),
    ],
)
def test_bad_settings_are_refused(make: Any, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        make(**{setting: value})
    with pytest.raises(ValueError, match="no column 'solution'"):
        make(dataset=Dataset.from_dict({"prompt": ["a"] * 4}))
