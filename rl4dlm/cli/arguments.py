"""What the scripts in trainers/ and the command line share: where data and optional packages come from.

Owns their command-line settings and the checks that can be made before a model is loaded. Training is the trainers'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import ModelConfig, TrlParser

from rl4dlm._optional import require
from rl4dlm.tasks import load_task

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where a script takes its data from: one of the library's tasks, or a dataset.

    Args:
        task: name of a task. task_args: its options, a mapping in YAML or JSON on the command line.
        dataset_name: hub id, folder, or a .json, .jsonl, .csv or .parquet file; instead of a task.
        dataset_config: of a hub dataset.
        dataset_train_split: split to train on.
        dataset_test_split: split to evaluate on, where `eval_strategy` asks for it.

    Raises:
        ValueError: neither or both of `task` and `dataset_name`, or `task_args` that are no mapping.
    """

    task: str | None = field(default=None, metadata={"help": "Name of the task whose prompts to train on."})
    task_args: dict | str | None = field(
        default=None, metadata={"help": "Options of the task, as a mapping (JSON on the command line)."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder or .json, .jsonl, .csv or .parquet file; instead of a task."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, where eval_strategy asks for it."}
    )

    def __post_init__(self) -> None:
        if (self.task is None) == (self.dataset_name is None):
            raise ValueError(
                f"task={self.task!r} and dataset_name={self.dataset_name!r}: name either a task or a dataset"
            )
        if self.task is None and self.task_args:
            raise ValueError(f"task_args={self.task_args!r} is given without a task; set task or drop task_args")
        if self.task is not None and self.dataset_config is not None:
            raise ValueError(f"dataset_config={self.dataset_config!r} belongs to dataset_name, but task={self.task!r}")
        self.task_args = mapping("task_args", self.task_args)


@dataclass
class RewardArguments(DataArguments):
    """`DataArguments`, and the rewards of an RL script.

    Args:
        reward_funcs: names of reward plugins, `path/to/file.py:function` or `module:function`.
    """

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards: names of plugins, path/to/file.py:function or module:function."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward_funcs:
            raise ValueError("reward_funcs is empty; name at least one reward function")


@dataclass
class ExampleArguments(DataArguments):
    """`DataArguments`, and where a script that learns from examples finds the answers.

    Args:
        completion_column: column with the answer to `prompt`; the others are dropped. None: the dataset is in one of
            TRL's formats already, columns `prompt` and `completion` or `messages`.
    """

    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column with the answer to each prompt. Default: the dataset is in TRL's format already."},
    )


@dataclass
class AdaptationArguments:
    """What an autoregressive model is to become before it is trained as a denoiser; see `adapt_causal_lm`.

    Args:
        adapt_attention: kind of attention it gets. None: the model is a denoiser already.
        adapt_block_length, adapt_grid_origin, adapt_logit_shift, adapt_mask_token: as for `adapt_causal_lm`.

    Raises:
        ValueError: one of them is set and `adapt_attention` is not.
    """

    adapt_attention: str | None = field(
        default=None,
        metadata={
            "help": "Attention (full, block_causal, context_causal or causal) that an autoregressive model is given. "
            "Default: the model is a denoiser already."
        },
    )
    adapt_block_length: int | None = field(default=None, metadata={"help": "Length of its attention blocks."})
    adapt_grid_origin: str | None = field(
        default=None, metadata={"help": "Where its blocks start: position_zero (default) or response."}
    )
    adapt_logit_shift: int | None = field(
        default=None, metadata={"help": "1 (default): position i - 1 goes on predicting token i. 0: position i does."}
    )
    adapt_mask_token: str | None = field(
        default=None, metadata={"help": "Its mask token. Default: the tokenizer's own, else a new one."}
    )

    def __post_init__(self) -> None:
        if self.adapt_attention is None and self.options():
            given = ", ".join(f"adapt_{name}={value!r}" for name, value in self.options().items())
            raise ValueError(f"{given} has no meaning without adapt_attention; set it, or leave this out")

    def options(self) -> dict[str, Any]:
        """What `adapt_causal_lm` is to be told, as far as it is set."""
        names = ("attention", "block_length", "grid_origin", "logit_shift", "mask_token")
        values = {name: getattr(self, f"adapt_{name}") for name in names}
        return {name: value for name, value in values.items() if value is not None}


def parse(argv: Sequence[str] | None, *dataclass_types: type) -> tuple[Any, ...]:
    """Settings from flags over a `--config` YAML file over defaults. Raises ValueError for what no dataclass knows."""
    return TrlParser(dataclass_types).parse_args_and_config(argv)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping given as such, as JSON text, or not at all. Raises ValueError, with `name`, for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not JSON: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a mapping; give settings by name")
    return value


def load_splits(arguments: DataArguments, *, evaluating: bool) -> tuple[Dataset, Dataset | None]:
    """The training split and, if `evaluating`, the test split. Raises ValueError for an unknown task or split."""
    if arguments.task is not None:
        task = load_task(arguments.task, **mapping("task_args", arguments.task_args))
        read = task.dataset
    else:
        assert arguments.dataset_name is not None
        read = _reader(arguments.dataset_name, arguments.dataset_config)
    return read(arguments.dataset_train_split), read(arguments.dataset_test_split) if evaluating else None


def with_completions(dataset: Dataset, column: str | None) -> Dataset:
    """Examples as TRL's SFT reads them, `prompt` and `completion`, from a dataset whose answers are in `column`.

    Answers to chat messages become the assistant's message. Raises ValueError if a column is missing.
    """
    if column is None:
        return dataset
    missing = [name for name in ("prompt", column) if name not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset has no column {missing[0]!r}; its columns are {dataset.column_names}")

    def example(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = row["prompt"], row[column]
        if not isinstance(prompt, str) and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        return {"prompt": prompt, "completion": answer}

    return Dataset.from_list([example(row) for row in dataset])


def model_options(training: Any, model: ModelConfig) -> dict[str, Any]:
    """What the trainer's `model_init_kwargs` should be: `ModelConfig`'s settings under those given there."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }


def check_settings(training: Any, model: ModelConfig) -> None:
    """Checks what can be checked before data and weights are read.

    Raises:
        ValueError: no model is named.
        ImportError: the settings need a package that is not installed; says how to get it.
    """
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is not set; name a model folder, an adapter folder or a hub id")
    if model.load_in_4bit or model.load_in_8bit:
        setting = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        if find_spec("bitsandbytes") is None:
            raise ImportError(f"{setting}=True needs bitsandbytes, which is not installed: pip install bitsandbytes")
    for tracker in training.report_to:
        if tracker in ("wandb", "tensorboard", "trackio"):
            require(tracker, extra=tracker, purpose=f"report_to={tracker}")
    if training.deepspeed:
        require("deepspeed", extra="deepspeed", purpose="deepspeed")


def _reader(name: str, config: str | None) -> Any:
    path = Path(name).expanduser()
    if path.suffix not in FILE_FORMATS:
        return lambda split: load_dataset(name, config, split=split)
    if not path.is_file():
        raise FileNotFoundError(f"dataset_name={name!r}: there is no such file")
    if config is not None:
        raise ValueError(f"dataset_config={config!r} has no meaning for the file {name!r}; leave it out")

    def read(split: str) -> Dataset:
        if split != "train":
            raise ValueError(f"the file {name!r} has one split, 'train', and split {split!r} was asked for")
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")

    return read
