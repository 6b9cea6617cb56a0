"""Latent refinement decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import coarse_divergence
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.latent_refinement import feedback_weight
from tests.rollout.denoisers import MASK, PROMPTS, VOCAB, assert_same_rows, denoiser
from tests.rollout.schedules.one_row import Row, assert_decodes, decode

LENGTH, BLOCK = 12, 6
NEVER = {"refine_divergence": 0.0, "settle_divergence": 0.0}


def generate(schedule: str = "latent_refinement", temperature: float = 0.0, **arguments: Any) -> Rollout:
    config = DecodingConfig(
        canvas_length=LENGTH,
        block_length=BLOCK,
        schedule=schedule,
        temperature=temperature,
        stop_at_eos=False,
        schedule_args=arguments,
    )
    return RolloutEngine(denoiser()).generate(PROMPTS, config, seed=3)


# --- by definition ----------------------------------------------------------------------------------------------------


def nucleus(probabilities: Tensor, total: float) -> Tensor:
    """The most probable tokens of one distribution `[V]` that together reach `total`, renormalised."""
    kept, mass = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True, stable=True).tolist():
        if mass >= total:
            break
        kept[token] = probabilities[token]
        mass += probabilities[token].item()
    return kept / kept.sum()


def mean_change(row: Row, slots: list[int]) -> float:
    """Mean divergence of a row's predictions from those before, over some slots."""
    if "before" not in row.memory:
        return math.inf
    new, old = row.memory["now"], row.memory["before"]
    return sum((new[i] * (new[i] / old[i]).log()).sum().item() for i in slots) / len(slots)


@pytest.mark.parametrize(
    "arguments",
    [
        {"refine_steps": 3, "refine_divergence": 0.0, "settle_divergence": 0.0},
        {"refine_steps": 20, "refine_divergence": 0.04, "settle_divergence": 0.2, "settle_steps": 1},
        {"refine_steps": 1, "refine_divergence": 0.5, "settle_divergence": 0.6, "settle_steps": 2, "nucleus": 1.0},
    ],
    ids=["refined for a while", "refined until stable", "nearly unrefined"],
)
def test_it_follows_its_definition(arguments: dict[str, Any]):
    settings = {"threshold": 0.6, "feedback": 0.4, "nucleus": 0.8, "settle_steps": 2, **arguments}
    rollout = generate(**settings)
    model = denoiser()
    table = model.get_input_embeddings().weight.detach()
    refined, settled_early = [], 0
    for index, prompt in enumerate(PROMPTS):

        def look(row: Row, prompt: list[int] = prompt) -> Tensor:
            embeddings = table[[*prompt, *row.canvas]]
            for i in row.masked if row.step else []:
                p = row.memory["now"][i]
                a = settings["feedback"] * (1 + (p * p.log()).sum() / math.log(VOCAB))
                mixed = (1 - a) * table[MASK] + a * nucleus(p, settings["nucleus"]) @ table
                embeddings[len(prompt) + i] = mixed
            with torch.no_grad():
                logits = model(inputs_embeds=embeddings[None]).logits[0, len(prompt) :]
            if "now" in row.memory:
                row.memory["before"] = row.memory["now"]
            row.memory["now"] = logits.softmax(-1)
            return logits

        def rule(row: Row, logits: Tensor) -> set[int]:
            nonlocal settled_early
            if not row.memory.get("refined"):
                stable = mean_change(row, row.masked) < settings["refine_divergence"]
                if row.step < settings["refine_steps"] and not stable:
                    return set()
                row.memory["refined"] = True
                refined.append(row.step)
            calm = mean_change(row, row.open) < settings["settle_divergence"]
            earlier = row.memory.get("calm", 0) if row.block_step else 0
            row.memory["calm"] = earlier + 1 if calm else 0
            if row.memory["calm"] >= settings["settle_steps"]:
                settled_early += len(row.open) > 1
                return set(row.open)
            return {i for i in row.open if row.p[i] >= settings["threshold"]} or {row.best(row.open)}

        assert_decodes(rollout, index, decode(LENGTH, BLOCK, look, rule))
    assert max(refined) > 0
    assert (settled_early > 0) == (settings["settle_divergence"] > 0)
    assert not rollout.exact


# --- its invariants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_without_feedback_it_is_the_threshold(temperature: float):
    plain = generate("threshold", temperature, threshold=0.6)
    for arguments in ({}, {"refine_steps": 0}):
        assert_same_rows(generate(temperature=temperature, threshold=0.6, feedback=0, **arguments), plain)


def test_next_to_no_feedback_and_no_refinement_is_the_threshold_too():
    nearly = generate(threshold=0.6, feedback=1e-12, refine_steps=0, **NEVER)
    plain = generate("threshold", threshold=0.6)
    assert torch.equal(nearly.canvas, plain.canvas)
    assert torch.equal(nearly.trace.commit_step, plain.trace.commit_step)


def test_refinement_changes_no_token():
    rollout = generate(threshold=0.6, refine_steps=4, **NEVER)
    assert rollout.trace.commit_step.amin(-1).tolist() == [4] * len(PROMPTS)
    for step, state in enumerate(rollout.states()):
        assert bool((state == MASK).all()) == (step <= 4)


def test_refinement_ends_when_predictions_are_stable():
    """Any change is small enough, and the second forward is the first that can tell."""
    rollout = generate(threshold=0.6, refine_steps=9, refine_divergence=1e9, settle_divergence=0.0)
    assert rollout.trace.commit_step.amin(-1).tolist() == [1] * len(PROMPTS)


def test_a_settled_block_is_written_at_once():
    rollout = generate(threshold=2.0, refine_steps=0, settle_divergence=1e9, settle_steps=3)
    # Block 0 knows no change at its first step, so it takes one step more than block 1.
    assert rollout.trace.steps.tolist() == [4 + 3] * len(PROMPTS)
    assert (rollout.trace.commit_step == 3).sum(-1).tolist() == [BLOCK - 3] * len(PROMPTS)
    assert (rollout.trace.commit_step == 6).sum(-1).tolist() == [BLOCK - 2] * len(PROMPTS)


def test_deferred_tokens_are_not_written_with_the_rest_of_a_settled_block():
    arguments = {"threshold": 2.0, "refine_steps": 0, "settle_divergence": 1e9, "settle_steps": 1}
    settings = {"canvas_length": LENGTH, "stop_at_eos": False, "schedule_args": arguments}
    several = alone = 0
    for token in range(3, 10):
        config = DecodingConfig(**settings, schedule="latent_refinement", defer_token_ids=(token,))
        rollout = RolloutEngine(denoiser()).generate(PROMPTS, config)
        steps = rollout.trace.commit_step
        for row, slot in (rollout.canvas == token).nonzero().tolist():
            assert (steps[row] == steps[row, slot]).sum() == 1
            alone += 1
        several += int((steps == 1).sum()) > len(PROMPTS)
    assert several and alone


def test_steps_of_refinement_do_not_count_as_settled():
    rollout = generate(threshold=2.0, refine_steps=3, refine_divergence=0.0, settle_divergence=1e9, settle_steps=3)
    assert rollout.trace.steps.tolist() == [3 + 3 + 3] * len(PROMPTS)
    assert (rollout.trace.commit_step == 5).sum(-1).tolist() == [BLOCK - 2] * len(PROMPTS)


probabilities = st.lists(st.floats(1e-6, 1.0), min_size=6, max_size=6).map(
    lambda values: torch.tensor([values], dtype=torch.float64) / sum(values)
)


@given(p=probabilities, largest=st.floats(0, 1))
def test_predictions_weigh_between_nothing_and_the_largest_weight(p: Tensor, largest: float):
    weight = feedback_weight(-(p * p.log()).sum(-1), 6, largest)
    assert 0 <= weight.item() <= largest


def test_sure_predictions_weigh_most_and_uniform_ones_nothing():
    entropies = torch.tensor([0.0, 0.5 * math.log(6), math.log(6), math.log(6) + 1e-9], dtype=torch.float64)
    torch.testing.assert_close(
        feedback_weight(entropies, 6, 0.2), torch.tensor([0.2, 0.1, 0.0, 0.0], dtype=torch.float64)
    )


@given(new=probabilities, old=probabilities, k=st.integers(1, 6))
def test_divergences_of_what_is_kept_are_no_larger_than_the_whole(new: Tensor, old: Tensor, k: int):
    before, tokens = old.log().topk(k)
    found = coarse_divergence(new.log(), tokens, before).item()
    true = (new * (new / old).log()).sum().item()
    assert -1e-12 <= found <= true + 1e-9
    if k >= 5:  # the rest is a single token, or none
        assert found == pytest.approx(true, abs=1e-9)


def test_a_token_that_has_become_impossible_adds_nothing():
    new = torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64).log()
    old = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    before, tokens = old.topk(3)
    assert coarse_divergence(new, tokens, before).item() == pytest.approx(0.75 * math.log(3))


@pytest.mark.parametrize(
    "arguments",
    [
        {"feedback": 1.5}, {"nucleus": 0}, {"refine_steps": -1}, {"refine_steps": 2.0}, {"settle_steps": 0},
        {"threshold": float("nan")}, {"settle_divergence": -1e-3},
    ],
)  # fmt: skip
def test_settings_outside_of_what_is_allowed(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}=.* is not allowed"):
        DecodingConfig(schedule="latent_refinement", schedule_args=arguments)


def test_whole_forwards_are_needed_only_for_feedback():
    with pytest.raises(ValueError, match="cache='prefix' cannot be used with schedule='latent_refinement'"):
        DecodingConfig(schedule="latent_refinement", cache="prefix")
    DecodingConfig(schedule="latent_refinement", cache="prefix", schedule_args={"feedback": 0.0})
