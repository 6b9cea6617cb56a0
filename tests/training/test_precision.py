"""P3 and P9: a first run on a CPU needs no word about precision, and what a device cannot do is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl4dlm import DiffuGRPOConfig, DiffusionSFTConfig, SPGConfig
from rl4dlm.training import precision

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.mark.parametrize("config", [DiffuGRPOConfig, SPGConfig, DiffusionSFTConfig])
@pytest.mark.parametrize("use_cpu", [True, pytest.param(False, marks=cpu_only)])
def test_p3_bf16_is_off_on_a_cpu(config: Any, use_cpu: bool, tmp_path: Path) -> None:
    assert config(output_dir=str(tmp_path), use_cpu=use_cpu).bf16 is False


def test_p3_bf16_is_on_where_a_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Settings:
        bf16: bool | None = None
        fp16 = False
        use_cpu = False

    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: True)
    for changes, expected in (
        ({}, True),
        ({"fp16": True}, False),
        ({"use_cpu": True}, False),
        ({"bf16": False}, False),
    ):
        settings = Settings()
        for name, value in changes.items():
            setattr(settings, name, value)
        precision.settle_precision(settings)
        assert settings.bf16 is expected


@pytest.mark.parametrize("config", [DiffuGRPOConfig, DiffusionSFTConfig])
@pytest.mark.parametrize("name", ["fp16", "fp16_full_eval"])
def test_p9_fp16_on_a_cpu_is_refused(config: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}=True is not supported on a CPU"):
        config(output_dir=str(tmp_path), use_cpu=True, **{name: True})


def test_p9_data_seed_orders_the_prompts_and_nothing_else(build_trainer: Callable[..., Any], tmp_path: Path) -> None:
    def order(**settings: Any) -> list[int]:
        return list(build_trainer(tmp_path, num_iterations=1, **settings)._get_train_sampler())

    assert order(seed=1) == order(seed=2, data_seed=1)
    assert order(seed=1) != order(seed=1, data_seed=2)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential", "batch_rebalance"])
def test_p9_orders_that_rl_does_not_have_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_sampling_strategy=.*shuffle_dataset"):
        DiffuGRPOConfig(output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy=strategy)
