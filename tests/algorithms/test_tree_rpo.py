"""d-TreeRPO: trees of completions, values and advantages of edges, what is scored of them, and what is foreseen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.algorithms.tree_rpo import Edges, TreeRPOConfig, TreeRPOTrainer, edge_advantages, foreseen, rising
from rl4dlm.training.interventions.inpainting import Inpainting
from tests.training.steps import adapter_step, check_splits, one_step, plain_log_probs, tiny_llada_that_ends

SMALL = {"max_completion_length": 8, "denoising_steps": 4, "temperature": 1.0, "branches": [2, 2], "num_generations": 4}


def config(**changes: Any) -> TreeRPOConfig:
    return TreeRPOConfig(**{"output_dir": "x", "bf16": False, "use_cpu": True, "report_to": "none", **SMALL, **changes})


def test_values_and_advantages():
    """A value is the mean of the children's; an edge has what it is worth above the mean of its siblings."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.5] * 6], dtype=torch.float64)
    found = edge_advantages(rewards, [2, 3])
    assert found.shape == (2, 6, 2) and not bool(found[1].any())
    assert found[0, :, 0].tolist() == pytest.approx([1 / 3 - 2 / 3] * 3 + [2 / 3 - 1 / 3] * 3)
    assert found[0, :, 1].tolist() == pytest.approx([1, -0.5, -0.5, -1, 0.5, 0.5])
    deep = edge_advantages(torch.rand(3, 24, dtype=torch.float64), [2, 3, 4])
    assert torch.allclose(deep[..., 2].view(3, 2, 3, 4).sum(-1), torch.zeros(()).double(), atol=1e-12)
    assert torch.allclose(deep[..., 1].view(3, 2, 3, 4)[..., 0].sum(-1), torch.zeros(()).double(), atol=1e-12)
    assert torch.equal(deep[..., 0].view(3, 2, 12)[..., :1].expand(-1, -1, 12), deep[..., 0].view(3, 2, 12))
    # b / (b - 1) of what it is worth above the parent
    rewards = torch.rand(5, 16, dtype=torch.float64)
    above = rewards.view(5, 4, 4) - rewards.view(5, 4, 4).mean(-1, keepdim=True)
    assert torch.allclose(edge_advantages(rewards, [4, 4])[..., 1], (4 / 3 * above).flatten(1))


def test_a_leaf_that_could_not_be_scored_has_no_say():
    rewards = torch.tensor([[1.0, math.nan, 0.0, 0.5], [math.nan, math.nan, 1.0, 0.0]])
    found = edge_advantages(rewards, [2, 2])
    assert found[0, :, 0].tolist() == [0.75, 0.75, -0.75, -0.75]
    assert found[0, 0, 1] == 0 and found[0, 1, 1].isnan() and found[0, 2:, 1].tolist() == [-0.5, 0.5]
    assert bool(found[1, :2].isnan().all()) and found[1, 2:, 0].tolist() == [0, 0]


def test_what_is_foreseen():
    tokens = torch.tensor([[5, 6, 7], [5, 8, 7], [9, 6, 7]])
    scored = torch.tensor([[True, True, False], [True, True, False], [True, False, False]])
    weight, log_q, there = foreseen(tokens, scored, torch.tensor([1.0, 0.5, -1.0]), 0.5)
    first = math.exp(2) / (math.exp(2) + math.e)
    assert weight[:, 0].tolist() == pytest.approx([first, 1 - first, 0])
    assert log_q[:2, 0].exp().tolist() == pytest.approx([1, 1])  # both wrote the same
    assert log_q[:2, 1].exp().tolist() == pytest.approx([first, 1 - first])
    assert there.tolist() == [True, True, False] and not bool(weight[:, 2].any())
    nothing = foreseen(tokens, scored, torch.tensor([0.0, 0.0, -1.0]), 0.5)
    assert not bool(nothing[0].any()) and not bool(nothing[2].any())
    assert rising(0, 100, 3e-3) == pytest.approx((0, 2)) and rising(500, 100, 3e-3) == pytest.approx((3e-3, 1e-6))
    assert rising(50, 100, 3e-3)[0] == pytest.approx(3e-3 * (math.e - 1) / (math.e**2 - 1))


def test_a_child_counts_by_its_advantage_however_many_of_its_leaves_have_ended():
    """Two children of two leaves; at slot 1 one leaf of the first has ended, at slot 2 both."""
    tokens = torch.tensor([[5, 6, 7], [5, 6, 7], [9, 8, 4], [9, 8, 4]])
    scored = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, True]])
    weight, log_q, there = foreseen(tokens, scored, torch.tensor([1.0, 1.0, 0.5, 0.5]), 0.5, leaves=2)
    first = math.exp(2) / (math.exp(2) + math.e)
    other = (1 - first) / 2
    assert weight[:, 0].tolist() == pytest.approx([first / 2, first / 2, other, other])
    assert weight[:, 1].tolist() == pytest.approx([first, 0, other, other])
    assert weight[:, 2].tolist() == pytest.approx([0, 0, 0.5, 0.5])
    assert log_q[0, :2].exp().tolist() == pytest.approx([first, first]) and there.all()


def test_the_divergence_is_a_mean_over_slots_however_a_batch_is_split(make_trainer: Any):
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            trainer=TreeRPOTrainer, config=TreeRPOConfig, **{**SMALL, "num_iterations": 1, "max_steps": 2},
            distillation=0.1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        found.append([entry["diffusion/foreseen_divergence"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], abs=1e-4) and min(found[0]) > 0.1


def test_edges_are_stretches_of_steps(make_trainer: Any):
    """Branches share what was written before them, and nothing but that; each edge has the view before it."""
    trainer, _ = one_step(
        make_trainer, TreeRPOTrainer, **SMALL, model=tiny_llada_that_ends(), beta=0.0, num_iterations=1
    )
    record = trainer.seen[0]
    order = record["row_ids"].argsort()
    canvas, step = record["canvas_ids"][order].view(2, 2, 2, 8), record["commit_step"][order].view(2, 2, 2, 8)
    early = (step >= 0) & (step < 2)
    assert torch.equal(early[:, :, 0], early[:, :, 1])
    assert torch.equal(torch.where(early, canvas, 0)[:, :, 0], torch.where(early, canvas, 0)[:, :, 1])
    assert not torch.equal(canvas[:, 0, 0], canvas[:, 1, 0]) and not torch.equal(canvas[:, :, 0], canvas[:, :, 1])
    _, views = plain_log_probs(trainer, record)
    for row in range(8):
        step = record["commit_step"][row]
        drawn = record["canvas_valid"][row]
        for k, weight in enumerate(views.weight[row]):
            scored = weight != 0
            edges = {int(s) >= 2 for s in step[scored]}
            if not edges:
                continue
            late = edges.pop()
            assert not edges
            assert torch.equal(scored, drawn & ((step >= 2) if late else (step < 2)))
            assert set(weight[scored].tolist()) == {2 / 3 if late else 1 / 3}  # two leaves share the upper one
            assert torch.equal(views.hidden[row, k, -8:], (step < 0) | (step >= (2 if late else 0)))
    assert int((views.weight != 0).sum()) == int(record["canvas_valid"].sum())


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_the_first_gradient(make_trainer: Any, distillation: float):
    """That of the means over edges, written out tree by tree; and of the divergence from what good branches wrote."""
    changes = {"beta": 0.0, "num_iterations": 1, "distillation": distillation, "distillation_steps": 1}
    trainer, gradients = one_step(make_trainer, TreeRPOTrainer, **SMALL, **changes, model=tiny_llada_that_ends())
    record = trainer.seen[0]
    objective = by_hand(trainer, record)
    strength, tau = rising(0, 1, distillation)
    assert strength == 0 and tau == 2  # the first step distils nothing
    parameters = dict(trainer.model.named_parameters())
    found = torch.autograd.grad(objective, [parameters[name] for name in gradients])
    for (name, gradient), expected in zip(gradients.items(), found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6, msg=name)
    if distillation:
        check_foreseen(trainer, record)


def by_hand(trainer: Any, record: dict[str, Tensor]) -> Tensor:
    """Over each tree: 2 edges from the root and 4 below, each the mean of its tokens' -A log p."""
    log_probs, views = plain_log_probs(trainer, record)
    each = (log_probs * views.scored).sum(1)
    rewards = trainer_rewards(trainer, record)
    total = each.new_zeros(())
    for tree in (record["row_ids"] // 4).unique().tolist():
        rows = [int((record["row_ids"] == 4 * tree + i).nonzero()) for i in range(4)]
        values = [[rewards[row] for row in rows], [sum(rewards[row] for row in rows[i : i + 2]) / 2 for i in (0, 2)]]
        for i, row in enumerate(rows):
            step, valid = record["commit_step"][row], record["canvas_valid"][row]
            for late, value, other, share in (
                (True, values[0][i], values[0][i ^ 1], 1.0),
                (False, values[1][i // 2], values[1][1 - i // 2], 0.5),
            ):
                edge = valid & ((step >= 2) == late)
                if edge.any():
                    total = total - share * (value - other) * each[row][edge].mean() / 12
    return total


def trainer_rewards(trainer: Any, record: dict[str, Tensor]) -> list[float]:
    texts = [
        trainer.processing_class.decode(canvas[valid], skip_special_tokens=True)
        for canvas, valid in zip(record["canvas_ids"], record["canvas_valid"], strict=True)
    ]
    found: list[float] = trainer.reward_funcs[0](completions=texts, prompts=[""] * 8)
    return found


def check_foreseen(trainer: Any, record: dict[str, Tensor]) -> None:
    """At full strength the loss is larger by the mean divergence from the tokens of good branches, slot by slot."""
    weight, slots = record["foreseen"], record["foreseen_slots"]
    rewards, log_probs = trainer_rewards(trainer, record), plain_log_probs(trainer, record)
    each = (log_probs[0] * log_probs[1].scored).sum(1).detach()
    total, cells = 0.0, 0
    for tree in (record["row_ids"] // 4).unique().tolist():
        rows = [int((record["row_ids"] == 4 * tree + i).nonzero()) for i in range(4)]
        means = [sum(rewards[row] for row in rows[i : i + 2]) / 2 for i in (0, 0, 2, 2)]
        states = [(rows, False, [m - other for m, other in zip(means, means[::-1], strict=True)])]
        states += [(rows[i : i + 2], True, [rewards[rows[i]] - rewards[rows[i + 1]]] * 2) for i in (0, 2)]
        for children, late, advantages in states:
            if late:
                advantages = [advantages[0], -advantages[1]]
            for slot in range(8):
                wrote = {
                    row: math.exp(a / 2)
                    for row, a in zip(children, advantages, strict=True)
                    if a > 0
                    and record["canvas_valid"][row, slot]
                    and (int(record["commit_step"][row, slot]) >= 2) == late
                }
                cells += bool(wrote)
                q: dict[int, float] = {}
                for row, share in wrote.items():
                    token = int(record["canvas_ids"][row, slot])
                    q[token] = q.get(token, 0.0) + share / sum(wrote.values())
                for row, share in wrote.items():
                    chance = q[int(record["canvas_ids"][row, slot])]
                    total += share / sum(wrote.values()) * (math.log(chance) - float(each[row, slot]))
    assert cells and slots.tolist() == [cells] * 8
    found = (weight * (record["foreseen_log_q"] - each)).sum() / slots[0]
    assert float(found) == pytest.approx(total / cells, abs=1e-6)


def test_completions_that_are_left_out_foresee_nothing(make_trainer: Any):
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(place % 4 == 0) for place in range(len(completions))]

    trainer, _ = one_step(
        make_trainer, TreeRPOTrainer, rewards=reward, branches=[2, 2], num_iterations=1, distillation=0.5,
        distillation_steps=1, mask_truncated_completions=True, max_completion_length=4, denoising_steps=4, beta=0.0,
        max_steps=2,
    )  # fmt: skip
    record = trainer.seen[1]
    out = ~record["completion_mask"].any(-1)
    assert out.any() and not out.all()
    assert not record["foreseen"][out].any()


def test_steps_may_be_more_than_the_canvas_has_tokens(make_trainer: Any):
    """Schedules may write nothing in a step, and edges are stretches of all steps."""
    trainer, _ = one_step(
        make_trainer, TreeRPOTrainer, branches=[2, 2], schedule="dream_entropy", schedule_args={"counts": "floor"},
        denoising_steps=16, max_completion_length=8, num_iterations=1, beta=0.0,
    )  # fmt: skip
    assert int(trainer.seen[0]["commit_step"].max()) >= 8


def test_an_adapter_and_several_passes(make_trainer: Any):
    trainer = adapter_step(make_trainer, TreeRPOTrainer, **SMALL, beta=0.04, num_iterations=2, distillation=0.1)
    logs = trainer.state.log_history[0]
    assert logs["kl"] == pytest.approx(0, abs=1e-7) and logs["clip_ratio/region_mean"] == 0


def test_micro_batches_change_nothing(make_trainer: Any):
    changes = {"beta": 0.04, "num_iterations": 2, "distillation": 0.1, "distillation_steps": 2}
    check_splits(make_trainer, TreeRPOTrainer, **SMALL, **changes)


def test_a_threshold_has_cuts_of_its_own(make_trainer: Any):
    """There rows have as many steps as they need."""
    changes = {"schedule": "threshold", "schedule_args": {"threshold": 0.9}, "denoising_steps": None, "cuts": [3]}
    model = tiny_llada_that_ends()
    trainer, _ = one_step(make_trainer, TreeRPOTrainer, **{**SMALL, **changes}, model=model, beta=0.0, num_iterations=1)
    record = trainer.seen[0]
    assert len(record["commit_step"].amax(-1).unique()) > 1
    with pytest.raises(ValueError, match="cuts=None is not allowed with schedule='threshold'"):
        config(**{**changes, "cuts": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": [1, 4]}, r"branches=\[1, 4\]"),
        ({"branches": [2, 4]}, "num_generations=4 is not allowed with branches=.*8 completions"),
        ({"cuts": [1, 2]}, r"cuts=\[1, 2\].*1 rising steps"),
        ({"cuts": [0]}, r"cuts=\[0\]"),
        ({"steps": "segments", "num_scored_steps": 2}, "steps='segments' is not allowed.*'all'"),
        ({"aggregation": "tokens"}, "aggregation='tokens'"),
        ({"old_policy": "recorded"}, "old_policy='recorded'"),
        ({"distillation": -1.0}, "distillation=-1.0"),
        ({"distillation_steps": 0}, "distillation_steps=0"),
    ],
)
def test_a_bad_setting_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_what_cannot_branch_is_refused(make_trainer: Any):
    build = {"trainer": TreeRPOTrainer, "config": TreeRPOConfig, **SMALL}
    with pytest.raises(ValueError, match="schedule='dream_origin'.*cannot go on"):
        make_trainer(**build, schedule="dream_origin")
    split = make_trainer(**build)
    split.args.per_device_train_batch_size = split.args.steps_per_generation = 1  # a group over several processes
    with pytest.raises(ValueError, match="gives a process 1 completions.*has 2"):
        split.build_estimator()
    with pytest.raises(ValueError, match="intervention=Inpainting is not allowed"):
        split.intervention = Inpainting(trace_column="solution")
        split._check_intervention()


def test_defaults_are_the_papers():
    found = TreeRPOConfig(output_dir="x", bf16=False, use_cpu=True, report_to="none")
    assert found.branches == [4, 4] and found.num_generations == 16 and found.stretches() == (64,)
    assert Edges((64,), (0.2, 0.8)) == found.selector(None)  # type: ignore[arg-type]
