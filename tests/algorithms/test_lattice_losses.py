"""How algorithms become one another: steps of their trainers on the same completions."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from rl4dlm import DiffuGRPOTrainer, UniGRPOTrainer
from tests.training.steps import one_step, tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SHARED: dict[str, Any] = {
    "beta": 0.04,
    "epsilon": 0.2,
    "temperature": 1.0,
    "top_p": 1.0,
    "scale_rewards": "none",
    "num_iterations": 1,
}


def step(make: Any, trainer: type, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    made, gradients = one_step(make, trainer, **{**SHARED, **settings})
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-4
    return made, gradients


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Between gradients, relative to the largest."""
    size = max(gradient.abs().max() for gradient in expected.values())
    return float(max((found[name] - expected[name]).abs().max() for name in expected) / size)


@pytest.mark.parametrize("ends", [False, True])
def test_unigrpo_with_everything_hidden_is_diffu_grpo_without_prompt_masking(make_trainer: Any, ends: bool) -> None:
    """With one average of tokens; their defaults, of sequences and of tokens, differ where lengths do."""

    def gradients(trainer: type, loss_type: str, **settings: Any) -> dict[str, Tensor]:
        model = tiny_llada_that_ends() if ends else None
        made, found = step(make_trainer, trainer, model=model, loss_type=loss_type, **settings)
        assert bool(made.seen[0]["canvas_valid"].all()) != ends
        return found

    full = {"level_range": [1.0, 1.0]}
    uni, plain = (
        gradients(UniGRPOTrainer, "grpo", **full),
        gradients(DiffuGRPOTrainer, "grpo", p_mask_prompt=0.0),
    )
    assert distance(uni, plain) < 1e-4
    tokens = gradients(DiffuGRPOTrainer, "dapo", p_mask_prompt=0.0)
    assert (distance(uni, tokens) < 1e-4) != ends
    assert distance(gradients(UniGRPOTrainer, "grpo", level_range=[0.3, 0.3]), plain) > 1e-2


@pytest.mark.parametrize("length", [1, 8])
def test_the_ratio_of_a_sequence_of_one_token_is_that_of_the_token(make_trainer: Any, length: int) -> None:
    """Several passes, so that ratios are not one."""
    found = []
    for level in ("token", "sequence"):
        settings = {
            "importance_sampling_level": level,
            "max_completion_length": length,
            "denoising_steps": length,
            "num_iterations": 3,
            "max_steps": 3,
            "p_mask_prompt": 0.0,
            "loss_type": "grpo",
        }
        made, total = step(make_trainer, DiffuGRPOTrainer, **settings)
        last = made.seen[-1]
        assert (last["scores"] - last["old_per_token_logps"]).abs().max() > 1e-2
        found.append(total)
    # With one token: what three steps have changed altogether is the same.
    assert (distance(found[1], found[0]) < 1e-4) == (length == 1)
