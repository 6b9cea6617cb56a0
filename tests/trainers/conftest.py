"""The scripts as modules, a tiny model to train, and flags that keep a run small."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl4dlm import resources, save_denoiser, tiny_llada, tiny_tokenizer


def _script(name: str) -> Callable[[list[str]], Any]:
    spec = importlib.util.spec_from_file_location(f"script_{name}", resources.find("trainers") / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="session")
def run_diffu_grpo() -> Callable[[list[str]], Any]:
    return _script("diffu_grpo")


@pytest.fixture(scope="session")
def run_sft() -> Callable[[list[str]], Any]:
    return _script("sft")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_denoiser(tiny_llada(initializer_range=0.2), folder, tiny_tokenizer())
    return folder


SMALL = {"max_steps": 2, "bf16": False, "disable_tqdm": True, "activation_checkpointing": False, "logging_steps": 1}


@pytest.fixture
def rl_flags(model_folder, tmp_path) -> dict[str, Any]:
    return {
        "model_name_or_path": model_folder,
        "task": "few_clue_sudoku",
        "task_args": '{"size": 32}',
        "reward_funcs": "few_clue_sudoku",
        "output_dir": tmp_path / "out",
        "max_completion_length": 16,
        "denoising_steps": 4,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        **SMALL,
    }


@pytest.fixture
def sft_flags(model_folder, tmp_path) -> dict[str, Any]:
    return {
        "model_name_or_path": model_folder,
        "task": "few_clue_sudoku",
        "task_args": '{"size": 32}',
        "completion_column": "solution",
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 8,
        **SMALL,
    }


@pytest.fixture
def argv() -> Callable[[dict[str, Any]], list[str]]:
    """Flags as words; None leaves a flag out, a list gives it several values."""

    def words(flags: dict[str, Any]) -> list[str]:
        found: list[str] = []
        for name, value in flags.items():
            if value is not None:
                found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return found

    return words
