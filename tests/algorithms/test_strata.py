"""diffu-GRPO with the likelihood of strata: its first gradient, what it goes with, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from rl4dlm import DACA, DiffuGRPOTrainer
from rl4dlm.models.tiny import tiny_diffusion_gemma
from tests.training.steps import check_gradient, one_step, plain_log_probs, tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_the_first_gradient_of_diffu_grpo_with_strata(make_trainer: Any) -> None:
    made, gradients = one_step(
        make_trainer, DiffuGRPOTrainer, model=tiny_llada_that_ends(), num_strata=3, p_mask_prompt=0.5, beta=0.0
    )
    record = made.seen[0]
    log_probs, views = plain_log_probs(made, record)
    assert views.hidden.shape[1] == 3 and views.hidden[..., :2].any(), "prompt tokens are hidden, too"
    scores = (log_probs * views.weight).sum(1) * record["canvas_valid"]
    expected = -(record["advantages"][:, None] * scores).sum() / record["canvas_valid"].sum()
    check_gradient(made, expected.float(), gradients)


def test_it_goes_with_the_weights_of_the_same_paper_and_with_random_tokens(make_trainer: Any) -> None:
    for changes in (
        {"model": tiny_llada_that_ends(), "credit": DACA()},
        {"model": tiny_diffusion_gemma(), "schedule": "entropy_bound_canvas", "denoising_steps": None},
    ):
        trainer = make_trainer(num_strata=2, beta=0.0, max_steps=1, **changes)
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_strata": 0}, "num_strata=0 is not allowed"),
        ({"num_strata": 2, "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
    ],
)
def test_what_does_not_fit_is_refused(make_trainer: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_trainer(**settings)
