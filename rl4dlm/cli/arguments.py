"""What the scripts in trainers/ and the command line share: where data and optional packages come from.

Owns their command-line settings and the checks that can be made before a model is loaded. Training is the trainers'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from trl import ModelConfig

from rl4dlm import resources
from rl4dlm._optional import require
from rl4dlm.cli.flags import GroupedParser
from rl4dlm.plugins import did_you_mean
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.tasks import Task, load_task

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where a script takes its data from: one of the library's tasks, or a dataset.

    Args:
        task: name of a task, `path/to/file.py:Class` or `module:Class`.
        task_args: its options, a mapping in YAML or JSON on the command line.
        dataset_name: hub id, folder, or a .json, .jsonl, .csv or .parquet file; instead of a task.
        dataset_config: of a hub dataset.
        dataset_train_split: split to train on.
        dataset_test_split: split to evaluate on, where `eval_strategy` asks for it. None: of a task `"validation"`, so
            that a checkpoint is not chosen by what it is measured on later; of a dataset `"test"`.
        dataset_test_file: a file of those kinds to evaluate on, instead of a split of `dataset_name`.
        dataset_streaming: read what is trained on while training, not before. What is evaluated on has a length.

    Raises:
        ValueError: neither or both of `task` and `dataset_name`, settings of one with the other, or `task_args` that
            are no mapping.
    """

    task: str | None = field(
        default=None,
        metadata={"help": "Task to train on: a name, path/to/file.py:Class or module:Class."},
    )
    task_args: dict | str | None = field(
        default=None, metadata={"help": "Options of the task, as a mapping (JSON on the command line)."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder or .json, .jsonl, .csv or .parquet file; instead of a task."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on, where eval_strategy asks for it. Default: validation of a task, test of a "
            "dataset."
        },
    )
    dataset_test_file: str | None = field(
        default=None, metadata={"help": "File to evaluate on, instead of a split of dataset_name."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the training data of dataset_name while training, not before."}
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
        if self.task is not None and (self.dataset_test_file is not None or self.dataset_streaming):
            given = (
                "dataset_streaming=True" if self.dataset_streaming else f"dataset_test_file={self.dataset_test_file!r}"
            )
            raise ValueError(f"{given} belongs to dataset_name, but task={self.task!r}")
        if self.dataset_test_file is not None and self.dataset_test_split is not None:
            raise ValueError(
                f"dataset_test_file={self.dataset_test_file!r} and dataset_test_split={self.dataset_test_split!r}: "
                "name either a file or a split to evaluate on"
            )
        if self.dataset_test_split is None and self.dataset_test_file is None:
            self.dataset_test_split = "test" if self.task is None else "validation"
        self.task_args = mapping("task_args", self.task_args)


@dataclass
class CheckArguments(DataArguments):
    """`DataArguments`, and whether a script measures, while it trains, how often the task is solved.

    Args:
        exact_check: measure that at each evaluation; see `check_exactly` of a trainer.
        exact_check_steps: the numbers of denoising steps of that, which switches it on; None: that of training, or half
            the canvas.
        exact_check_split: of the task.
        exact_check_limit: so many rows of it at most.

    Raises:
        ValueError: an exact check of something that is no task, or settings of it without it.
    """

    exact_check: bool = field(
        default=False, metadata={"help": "Measure at each evaluation how often the task is solved."}
    )
    exact_check_steps: list[int] | None = field(
        default=None, metadata={"help": "Numbers of denoising steps of the exact check. Default: that of training."}
    )
    exact_check_split: str = field(default="validation", metadata={"help": "Split of the task that it is made on."})
    exact_check_limit: int | None = field(default=None, metadata={"help": "First rows of it, at most. Default: all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact_check_steps is not None:
            self.exact_check = True
        if self.exact_check and self.task is None:
            raise ValueError("exact_check needs a task, whose checker decides; set task")
        if not self.exact_check and (self.exact_check_split != "validation" or self.exact_check_limit is not None):
            raise ValueError("exact_check_split and exact_check_limit have no meaning without exact_check; set it")

    def checked_task(self, training: Any) -> Task | None:
        """The task of the exact check, if there is one. Raises ValueError where nothing is ever evaluated."""
        if not self.exact_check:
            return None
        if training.eval_strategy == "no":
            raise ValueError("exact_check belongs to evaluations, and eval_strategy is 'no'; set it to steps or epoch")
        assert self.task is not None
        return load_task(self.task, **mapping("task_args", self.task_args))

    def check_options(self) -> dict[str, Any]:
        """What `check_exactly` is told besides."""
        return {
            "split": self.exact_check_split,
            "steps": self.exact_check_steps,
            "limit": self.exact_check_limit,
        }


@dataclass
class RewardArguments(CheckArguments):
    """`CheckArguments`, and the rewards of an RL script.

    Args:
        reward_funcs: names of reward plugins, `path/to/file.py:function` or `module:function`.
        reward_model_name_or_path: a reward model with one output, as TRL takes it, beside these or instead of them;
            `reward_weights` has its weight last.

    Raises:
        ValueError: no rewards.
    """

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards: names of plugins, path/to/file.py:function or module:function."},
    )

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model, a folder or hub id; beside reward_funcs or instead of them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward_funcs and self.reward_model_name_or_path is None:
            raise ValueError(
                "reward_funcs is empty; name at least one reward function, or set reward_model_name_or_path"
            )


@dataclass
class TeachingArguments(RewardArguments):
    """`RewardArguments` of a script that can do without rewards, and with completions of a data set.

    Args:
        completion_column: column that becomes `completion`, beside the others. None: it has that name, or none is used.
    """

    completion_column: str | None = field(
        default=None, metadata={"help": "Column with completions to learn from. Default: completion, if any."}
    )

    def __post_init__(self) -> None:
        CheckArguments.__post_init__(self)


@dataclass
class ExampleArguments(CheckArguments):
    """`CheckArguments`, and where a script that learns from examples finds the answers.

    Args:
        completion_column: column with the answer to `prompt`; the others are dropped. None: the dataset is in one of
            TRL's formats already, columns `prompt` and `completion` or `messages`.
        exact_check_canvas_length: completion slots that the exact check decodes; None: `max_completion_length`.
        exact_check_block_length: blocks that it writes from left to right; None: the model's, or one.
    """

    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column with the answer to each prompt. Default: the dataset is in TRL's format already."},
    )
    exact_check_canvas_length: int | None = field(
        default=None, metadata={"help": "Completion slots of the exact check. Default: max_completion_length."}
    )
    exact_check_block_length: int | None = field(
        default=None, metadata={"help": "Blocks of the exact check. Default: the model's, or one."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.exact_check_canvas_length, self.exact_check_block_length)
        if not self.exact_check and any(value is not None for value in given):
            raise ValueError(
                "exact_check_canvas_length and exact_check_block_length have no meaning without exact_check; set it"
            )

    def check_decoding(self, training: Any) -> DecodingConfig:
        """How the exact check decodes. Raises ValueError where no canvas is named."""
        length = self.exact_check_canvas_length or training.max_completion_length
        if length is None:
            raise ValueError("exact_check needs a canvas; set exact_check_canvas_length or max_completion_length")
        return DecodingConfig(canvas_length=length, block_length=self.exact_check_block_length)


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
    parser = GroupedParser(dataclass_types, allow_abbrev=False)
    words = sys.argv[1:] if argv is None else list(argv)
    *found, unknown_in_file, unknown = parser.parse_args_and_config(
        words, return_remaining_strings=True, separate_remaining_strings=True
    )
    for source, strings in (("the configuration file", unknown_in_file), ("the command line", unknown)):
        names = [word.partition("=")[0] for word in strings if word.startswith("--")] or strings
        if names:
            known = [option for action in parser._actions for option in action.option_strings]
            offered = "".join(did_you_mean(name, known) for name in names[:1])
            raise ValueError(f"no setting is called {', '.join(names)}, in {source}{offered}")
    return tuple(found)


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


def load_splits(arguments: DataArguments, *, evaluating: bool) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """The training split and, if `evaluating`, what to evaluate on. Raises ValueError for an unknown task or split."""
    split = arguments.dataset_test_split
    if arguments.task is not None:
        assert split is not None
        task = load_task(arguments.task, **mapping("task_args", arguments.task_args))
        if evaluating and split not in task.splits:
            raise ValueError(
                f"dataset_test_split={split!r}: task {task.name!r} has no such split to evaluate on while training; "
                f"its splits: {', '.join(task.splits)}"
            )
        measured_on = task.dataset(split) if evaluating else None  # first: what it lacks is said before more is read
        return task.dataset(arguments.dataset_train_split), measured_on
    assert arguments.dataset_name is not None
    read = _reader("dataset_name", arguments.dataset_name, arguments.dataset_config)
    held_out = None
    if evaluating and arguments.dataset_test_file is not None:
        held_out = _reader("dataset_test_file", arguments.dataset_test_file, None)("train")
    elif evaluating:
        held_out = read(split)
    return read(arguments.dataset_train_split, streaming=arguments.dataset_streaming), held_out


def with_completions(dataset: Any, column: str | None, *, keep: bool = False) -> Any:
    """Examples as TRL's SFT reads them, `prompt` and `completion`, from a dataset whose answers are in `column`.

    Answers to chat messages become the assistant's message. Other columns stay if `keep`. Raises ValueError if a column
    is missing.
    """
    if column is None:
        return dataset
    columns = dataset.column_names or sorted(next(iter(dataset), {}))
    missing = [name for name in ("prompt", column) if name not in columns]
    if missing:
        raise ValueError(f"the dataset has no column {missing[0]!r}; its columns are {columns}")

    def example(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = row["prompt"], row[column]
        if not isinstance(prompt, str) and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        return {**(row if keep else {}), "prompt": prompt, "completion": answer}

    if isinstance(dataset, IterableDataset):
        return dataset.map(example, remove_columns=[] if keep else [name for name in columns if name != "prompt"])
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
    """Checks what can be checked before data and weights are read, and finds the demo checkpoint where it is named.

    Raises:
        ValueError: no model is named.
        ImportError: the settings need a package that is not installed; says how to get it.
    """
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is not set; name a model folder, an adapter folder or a hub id")
    model.model_name_or_path = resources.model_folder(model.model_name_or_path)
    if model.load_in_4bit or model.load_in_8bit:
        setting = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        if find_spec("bitsandbytes") is None:
            raise ImportError(f"{setting}=True needs bitsandbytes, which is not installed: pip install bitsandbytes")
    for tracker in training.report_to:
        if tracker in ("wandb", "tensorboard", "trackio"):
            require(tracker, extra=tracker, purpose=f"report_to={tracker}")
    if training.deepspeed:
        require("deepspeed", extra="deepspeed", purpose="deepspeed")


def _reader(setting: str, name: str, config: str | None) -> Callable[..., Any]:
    path = Path(name).expanduser()
    if path.suffix not in FILE_FORMATS:
        if setting != "dataset_name":
            raise ValueError(f"{setting}={name!r} is no file that can be read; those end in {', '.join(FILE_FORMATS)}")
        return lambda split, streaming=False: load_dataset(name, config, split=split, streaming=streaming)
    if not path.is_file():
        raise FileNotFoundError(f"{setting}={name!r}: there is no such file")
    if config is not None:
        raise ValueError(f"dataset_config={config!r} has no meaning for the file {name!r}; leave it out")

    def read(split: str, streaming: bool = False) -> Any:
        if split != "train":
            raise ValueError(
                f"the file {name!r} has one split, 'train', and split {split!r} was asked for; evaluate on a file of "
                "its own with dataset_test_file"
            )
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", streaming=streaming)

    return read
