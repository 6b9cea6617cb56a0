"""Algorithms run with their papers' settings where nothing is set, and stay the method of their name (F3)."""

from __future__ import annotations

from typing import Any

import pytest

from rl4dlm import DiffuGRPOConfig, ESPOConfig, SPGConfig, SPGTrainer
from rl4dlm.models.spec import DiffusionSpec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def common(tmp_path: Any) -> dict[str, Any]:
    return {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}


@pytest.mark.parametrize("config", [DiffuGRPOConfig, ESPOConfig, SPGConfig])
def test_f3_defaults_are_the_papers(config: type, common: Any) -> None:
    args = config(**common)
    assert (args.max_completion_length, args.block_length, args.decoding().block_length) == (256, 32, 32)
    assert (args.num_generations, args.per_device_train_batch_size, args.learning_rate) == (6, 6, 3e-6)


@pytest.mark.parametrize("config", [DiffuGRPOConfig, ESPOConfig, SPGConfig])
def test_f3_a_model_with_blocks_keeps_its_own_where_none_are_given(config: type, common: Any) -> None:
    spec = DiffusionSpec(mask_token_id=3, eos_token_ids=(1,), attention="block_causal", block_length=4)
    assert config(**common).decoding(spec).block_length == 4
    with pytest.raises(ValueError, match=r"block_length=32 contradicts the model"):
        config(**common, block_length=32).decoding(spec)


@pytest.mark.parametrize("canvas", [8, 12, 32, 40, 96])
def test_f3_spg_has_several_blocks_on_every_canvas(make_trainer: Any, canvas: int) -> None:
    trainer = make_trainer(trainer=SPGTrainer, config=SPGConfig, max_completion_length=canvas, denoising_steps=canvas)
    block = trainer.estimator.block_length
    assert block == trainer.decoding.block_length and block <= 32 and canvas % block == 0 and canvas >= 2 * block


@pytest.mark.parametrize("masking", ["block_random", "block_all", "block_elbo"])
def test_f3_block_masking_of_one_block_is_refused(common: Any, masking: str) -> None:
    settings = {"masking": masking, "negatives": "elbo" if masking == "block_elbo" else "eubo"}
    with pytest.raises(ValueError, match=rf"block_length=64 is not allowed with masking='{masking}'"):
        SPGConfig(**common, **settings, max_completion_length=64, block_length=64)
    assert SPGConfig(**common, masking="random", max_completion_length=64, block_length=64).block_length == 64


def test_f3_a_canvas_that_no_block_divides_needs_a_choice(common: Any) -> None:
    with pytest.raises(ValueError, match=r"block_length=None is not allowed.*max_completion_length=7"):
        SPGConfig(**common, max_completion_length=7)
