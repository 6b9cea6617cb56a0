"""Masks that are keyed by the prompt: what completions of a group then share, and where that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl4dlm import (
    BGPOConfig,
    BGPOTrainer,
    CoupledGRPOConfig,
    CoupledGRPOTrainer,
    DiffuGRPOTrainer,
    IGPOConfig,
    IGPOTrainer,
    JustGRPOConfig,
    JustGRPOTrainer,
    UniGRPOConfig,
    UniGRPOTrainer,
    WD1Config,
    WD1Trainer,
)
from rl4dlm.training.config import DiffusionPolicyConfig
from rl4dlm.training.trainer import rows_of
from tests.training.steps import recording

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SHARING = [(CoupledGRPOTrainer, CoupledGRPOConfig), (UniGRPOTrainer, UniGRPOConfig), (WD1Trainer, WD1Config)]


@pytest.mark.parametrize(("trainer", "config"), SHARING)
def test_completions_of_a_prompt_have_the_same_masks_and_those_of_others_do_not(
    make_trainer: Any, trainer: type, config: type
) -> None:
    made = make_trainer(
        trainer=recording(trainer), config=config, views_keyed_by="prompt", max_steps=1, scope="canvas",
        stop_at_eos=False,
    )  # fmt: skip
    made.train()
    rows = rows_of(made.seen[0])
    group = made.seen[0]["row_ids"] // 4
    hidden = torch.stack([made._draw(rows, iteration).hidden for iteration in range(5)], dim=1)
    real = rows.attention_mask[:, None, None]
    for i, j in torch.cartesian_prod(torch.arange(8), torch.arange(8)).tolist():
        assert torch.equal(hidden[i] & real[i], hidden[j] & real[j]) == (group[i] == group[j]).item()
    assert not torch.equal(hidden[:, 0], hidden[:, 1])


@pytest.mark.parametrize(("key", "fed"), [("row", 8), ("prompt", 2)])
def test_groups_with_one_prompt_mask_are_fed_once(make_trainer: Any, key: str, fed: int) -> None:
    made = make_trainer(
        trainer=DiffuGRPOTrainer, views_keyed_by=key, p_mask_prompt=0.5, max_steps=1, beta=0.0, num_iterations=1,
        dataset=long_prompts(),
    )  # fmt: skip
    shapes: list[int] = []

    def look(module: Any, inputs: Any) -> None:
        if torch.is_grad_enabled():
            shapes.append(len(inputs[0]))

    made.model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(look)
    made.train()
    assert shapes == [fed]


def long_prompts() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"{i} abcdefghijklmnop" for i in range(10, 22)]})


@pytest.mark.parametrize(
    ("trainer", "config", "changes", "estimator"),
    [
        (BGPOTrainer, BGPOConfig, {}, "ELBO"),
        (JustGRPOTrainer, JustGRPOConfig, {"denoising_steps": None}, "LeftToRight"),
        (IGPOTrainer, IGPOConfig, {"trace_column": "prompt"}, "MeanField"),
        (DiffuGRPOTrainer, None, {"p_mask_prompt": 0.0}, "MeanField"),
        (CoupledGRPOTrainer, CoupledGRPOConfig, {"pairs": 0}, "Coupled"),
    ],
)
def test_estimators_without_masks_to_share_refuse_it(
    make_trainer: Any, trainer: type, config: Any, changes: dict[str, Any], estimator: str
) -> None:
    more = {} if config is None else {"config": config}
    with pytest.raises(ValueError, match=rf"views_keyed_by='prompt' is not supported: {estimator}\(.*allowed.*'row'"):
        make_trainer(trainer=trainer, views_keyed_by="prompt", **changes, **more)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="views_keyed_by='group' is not allowed; choose one of row, prompt"):
        DiffusionPolicyConfig(output_dir="x", views_keyed_by="group", use_cpu=True, bf16=False)
