"""`learned_order`: what is drawn, what is recorded of it, and that the likelihood finds the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl4dlm.likelihood.choices import choices_of
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.step_selectors import AllSteps
from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.likelihood.views import Rows, StepFacts
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_dream, tiny_llada, tiny_sdar
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.policies.hidden_states import LinearPolicy, UnmaskingPolicyModule
from rl4dlm.rollout.policies.policy import UnmaskingPolicy, attach_policy, fresh
from rl4dlm.rollout.policies.saving import POLICY_FILE, save_policy
from rl4dlm.rollout.rollout import Rollout
from tests.models.float64 import exactly_float64

PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 7]]
LENGTH = 8


def with_policy(make: Any = tiny_llada, *, layers: int = 1, **sizes: Any) -> Any:
    """A float64 model, and a random policy on it."""
    made = make(dtype=torch.float64, **sizes)
    model = attach_scoring(exactly_float64(made) if make is tiny_llada else made)
    size = model.config.hidden_size
    policy = fresh(UnmaskingPolicyModule(size, frequencies=8, layers=layers, heads=2), seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    attach_policy(model, policy)
    return model


def decoded(model: Any, **settings: Any) -> Rollout:
    usual: dict[str, Any] = {"canvas_length": LENGTH, "schedule": "learned_order", "steps": 4, "temperature": 0.8}
    return RolloutEngine(model).generate(PROMPTS, DecodingConfig(**{**usual, **settings}), num_generations=3, seed=2)


def rows_of_rollout(rollout: Rollout) -> Rows:
    width = max(map(len, rollout.prompt_ids))
    prompts = torch.zeros(len(rollout), width, dtype=torch.long)
    mask = torch.zeros(len(rollout), width, dtype=torch.bool)
    for i, prompt in enumerate(rollout.prompt_ids):
        prompts[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), True
    return Rows(
        prompts,
        mask,
        rollout.canvas,
        rollout.valid,
        torch.tensor(rollout.row_ids),
        given=rollout.hinted,
        commit_step=rollout.trace.commit_step,
        facts=StepFacts(rank=rollout.trace.commit_rank),
    )


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("one_view", [False, True])
def test_the_likelihood_of_a_step_is_what_it_was_drawn_with(make: Any, block: int | None, one_view: bool) -> None:
    model = with_policy(make)
    rollout = decoded(model, block_length=block, stop_at_eos=False)
    rows = rows_of_rollout(rollout)
    views = RecordedSteps(AllSteps(), "canvas").draw(rows, seed=0, iteration=0)
    choices = choices_of(rows, views, block_length=block, steps=4)
    spec, trace = DiffusionSpec.of(model), rollout.trace
    found = score_views(
        model, spec, rows.ids, rows.attention_mask, views, temperature=0.8, one_view=one_view, choices=choices
    )
    assert found.choices is not None and trace.selection_log_prob is not None
    assert torch.allclose(found.choices.sum(-1), trace.selection_log_prob, atol=1e-6)
    last = [1, 3] if block else [3]
    assert not trace.selection_log_prob[:, last].any() and (trace.selection_log_prob < 0).sum() == 9 * (4 - len(last))
    # Drawn without the mask token, and scored with it: the difference is the mask token's share alone.
    raw = score_views(model, spec, rows.ids, rows.attention_mask, views, one_view=one_view, choices=choices)
    assert torch.allclose(raw.log_probs.sum(1), trace.raw_log_prob, atol=1e-6)
    assert trace.commit_rank is not None
    for row in range(len(rollout)):
        for step in range(4):
            assert sorted(trace.commit_rank[row][trace.commit_step[row] == step].tolist()) == [0, 1]


def test_gradients_reach_policy_and_model_the_same_way_view_by_view() -> None:
    grads = []
    for one_view in (False, True):
        model = with_policy()
        rollout = decoded(model, stop_at_eos=False)
        rows = rows_of_rollout(rollout)
        views = RecordedSteps(AllSteps(), "canvas").draw(rows, seed=0, iteration=0)
        choices = choices_of(rows, views, block_length=None, steps=4)
        model.train()
        spec = DiffusionSpec.of(model)
        found = score_views(model, spec, rows.ids, rows.attention_mask, views, one_view=one_view, choices=choices)
        assert found.choices is not None
        (found.choices.sum() + 0.3 * found.log_probs.sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and torch.allclose(grad, grads[1][name], atol=1e-9), name
    assert grads[0]["unmasking_policy.utility.weight"].any() and grads[0]["model.embed_tokens.weight"].any()


def test_at_temperature_0_the_best_slots_are_written() -> None:
    model = with_policy()
    rollout = decoded(model, temperature=0.0)
    assert rollout.trace.selection_log_prob is None and rollout.trace.commit_rank is not None
    drawn = decoded(model, temperature=0.0, schedule_args={"greedy": False})
    assert drawn.trace.selection_log_prob is not None
    # A policy that likes later slots better writes them first, whatever the model says.
    policy = LinearPolicy(model.config.hidden_size)
    fresh(policy, seed=0, dtype=torch.float64)
    policy.forward = lambda seen: torch.arange(LENGTH).expand(seen.masked.shape).double()  # type: ignore[method-assign]
    attach_policy(model, policy)
    late = decoded(model, temperature=0.0, stop_at_eos=False, steps=LENGTH)
    assert late.trace.commit_step.tolist() == [list(range(LENGTH))[::-1]] * 9


def test_a_saved_policy_is_found_in_the_models_folder(tmp_path: Path) -> None:
    from rl4dlm.models.loading import load_denoiser

    model = with_policy()
    expected = decoded(model)
    model.save_pretrained(tmp_path)
    save_policy(model.unmasking_policy, tmp_path)
    loaded = attach_scoring(exactly_float64(load_denoiser(tmp_path, dtype=torch.float64)))
    assert torch.equal(decoded(loaded).canvas, expected.canvas)
    other = attach_scoring(exactly_float64(tiny_llada(dtype=torch.float64)))
    found = decoded(other, schedule_args={"policy": str(tmp_path / POLICY_FILE)})
    assert torch.equal(found.canvas, expected.canvas) and not hasattr(other, "unmasking_policy")


def test_what_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    bare = attach_scoring(tiny_llada())
    with pytest.raises(ValueError, match="needs an unmasking policy"):
        decoded(bare)
    with pytest.raises(ValueError, match="have 32|those of the model"):
        decoded(bare, schedule_args={"policy": fresh(LinearPolicy(8), seed=0)})
    with pytest.raises(ValueError, match="is missing"):
        DecodingConfig(canvas_length=8, schedule="learned_order", schedule_args={"policy": str(tmp_path)})
    for name, value in (("policy", 3), ("greedy", "no")):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            DecodingConfig(canvas_length=8, schedule="learned_order", schedule_args={name: value})
    with pytest.raises(ValueError, match="cfg_scale"):
        DecodingConfig(canvas_length=8, schedule="learned_order", cfg_scale=0.5)

    class Other(UnmaskingPolicy):
        kind = "other"
        settings: dict[str, Any] = {}  # noqa: RUF012

        def initialise(self, generator: torch.Generator) -> None: ...

        def forward(self, seen: Any) -> Any: ...

    attach_policy(bare, Other())
    with pytest.raises(ValueError, match="of kind 'other'"):
        decoded(bare)
    with pytest.raises(ValueError, match="looks beyond the active block"):
        decoded(attach_scoring(tiny_sdar()), block_length=None, steps=None)


def test_choices_say_what_they_miss() -> None:
    model = with_policy()
    rows = rows_of_rollout(decoded(model, stop_at_eos=False))
    views = RecordedSteps(AllSteps(merge=2), "canvas").draw(rows, seed=0, iteration=0)
    with pytest.raises(ValueError, match="several steps"):
        choices_of(rows, views, block_length=None, steps=4)
    assert rows.facts is not None
    rows.facts.rank = None
    with pytest.raises(ValueError, match="commit_rank"):
        choices_of(rows, views, block_length=None, steps=4)
