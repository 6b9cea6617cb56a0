"""Refuses bad data before it costs compute: datasets, prompts and what reward functions return.

Owns the messages. Settings are checked by their configs, models and tokenizers by `rl4dlm.models`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn

from rl4dlm.grading import load_reward
from rl4dlm.tasks.prompts import prompt_problem
from rl4dlm.training.rollout_columns import ROLLOUT_COLUMNS

logger = logging.getLogger(__name__)

PROMPTS_PER_PASS = 1000
LARGEST_REWARD = 1e6  # beyond it sums and squares of float32 rewards lose what tells completions apart

RESERVED_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    *ROLLOUT_COLUMNS,
)
"""What TRL and the trainer hand to reward functions under these names; such a column would collide, or never arrive."""


def check_columns(dataset: Any, name: str, needed: str, reserved: Sequence[str] = ()) -> None:
    """Raises ValueError if a dataset (or one of a dict of them) lacks a column, or has one of a reserved name."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_columns(part, f"{name}[{key!r}]", needed, reserved)
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        return  # TRL says what it takes
    columns = dataset.column_names or sorted(next(iter(dataset), {}))
    if needed not in columns:
        raise ValueError(f"{name} has no column {needed!r}; its columns are {columns}")
    taken = [column for column in columns if column in reserved]
    if taken:
        raise ValueError(
            f"{name} has a column {taken[0]!r}, which is the name of something that reward functions are given; rename "
            f"it: dataset.rename_column({taken[0]!r}, ...). Reserved names: {', '.join(reserved)}"
        )


def check_prompts(
    dataset: Any,
    name: str,
    tokenize: Callable[[list[Any]], list[list[int]]],
    *,
    mask_token_id: int,
    limit: int | None,
    overlong: str,
) -> Any:
    """Looks at every prompt of a dataset before training starts.

    Args:
        dataset: with a column `"prompt"`, or a dict of such, or None. A stream is only filtered; what it yields is
            looked at when it is decoded.
        name: for messages.
        tokenize: prompts -> token ids, as they will be decoded.
        mask_token_id: must not occur in a prompt.
        limit: longest prompt in tokens.
        overlong: `"error"` or `"filter"`.

    Returns:
        The dataset, without over-long prompts if they are filtered.

    Raises:
        ValueError: a prompt is empty, holds the mask token, or is too long; or none is left.
    """
    if isinstance(dataset, dict):
        options: dict[str, Any] = {"mask_token_id": mask_token_id, "limit": limit, "overlong": overlong}
        return {key: check_prompts(part, f"{name}[{key!r}]", tokenize, **options) for key, part in dataset.items()}
    if isinstance(dataset, IterableDataset):
        if overlong == "filter" and limit is not None:
            dataset = dataset.filter(lambda row: len(tokenize([row["prompt"]])[0]) <= limit)
        return dataset
    if dataset is None:
        return None
    if not len(dataset):
        raise ValueError(f"{name} is empty; give at least one prompt")
    keep, longest = [], 0
    for start in range(0, len(dataset), PROMPTS_PER_PASS):
        prompts = dataset[start : start + PROMPTS_PER_PASS]["prompt"]
        for row, prompt in enumerate(prompts, start):
            problem = prompt_problem(prompt)
            if problem is not None:
                raise ValueError(f"{name}[{row}]['prompt'] is {problem}")
        for row, ids in enumerate(tokenize(prompts), start):
            check_prompt(ids, f"{name}[{row}]['prompt']", mask_token_id)
            longest = max(longest, len(ids))
            if limit is None or len(ids) <= limit:
                keep.append(row)
    dropped = len(dataset) - len(keep)
    if dropped and overlong == "error":
        raise ValueError(
            f"{dropped} of {len(dataset)} prompts in {name} are longer than {limit} tokens (the longest has {longest});"
            " raise max_prompt_length if the model's positions allow it, or set overlong_prompts='filter'"
        )
    if not keep:
        raise ValueError(f"{name} has no prompt of at most {limit} tokens (the longest has {longest})")
    if dropped:
        logger.warning("left out %d of %d prompts in %s: longer than %d tokens", dropped, len(dataset), name, limit)
        dataset = dataset.select(keep)
    return dataset


def check_enough_prompts(dataset: Any, *, generation_batch_size: int, num_generations: int) -> None:
    """Looks at how many prompts a generation batch takes; says once how many an epoch leaves out.

    Args:
        dataset: to train on; a stream has no length and is not looked at.
        generation_batch_size: completions of a generation batch, of all processes.
        num_generations: completions of each prompt.

    Raises:
        ValueError: there are fewer prompts than one generation batch takes, so that nothing would be trained.
    """
    if dataset is None or isinstance(dataset, IterableDataset):
        return
    needed, count = generation_batch_size // num_generations, len(dataset)
    if count < needed:
        raise ValueError(
            f"train_dataset has {count} prompts, and one generation batch takes {needed} "
            f"(generation_batch_size={generation_batch_size} completions over num_generations={num_generations}), so "
            "that no step could be trained; give more prompts, or a smaller per_device_train_batch_size, "
            "steps_per_generation or gradient_accumulation_steps, or more num_generations"
        )
    if count % needed:
        logger.warning(
            "each epoch leaves out %d of %d prompts, others each time: a generation batch takes %d",
            count % needed,
            count,
            needed,
        )


def check_prompt(ids: Sequence[int], name: str, mask_token_id: int) -> None:
    """Raises ValueError for a prompt that is empty or holds the mask token."""
    if not len(ids):
        raise ValueError(f"{name} is empty; a prompt has at least one token")
    if mask_token_id in ids:
        raise ValueError(f"{name} contains the mask token (id {mask_token_id}); prompts hold written text only")


def checked_rewards(reward_funcs: Any) -> list[Any] | None:
    """Reward functions that refuse to return anything but one number of at most 1e6 in size, or None, per completion.

    TRL files metrics and completions under a function's `__name__`, so each gets one that no other has. Names of reward
    functions are looked up; reward models and their names are left as they are. TRL alone reads NaN as "not scorable".
    A function with an attribute `requires`, which is a function without arguments, has it called: it raises where the
    reward could not be computed, before anything is trained.
    """
    if reward_funcs is None:
        return None
    listed = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    found = [_named(f) if isinstance(f, str) else f for f in listed]
    for reward in found:
        if not isinstance(reward, str | nn.Module) and (requires := getattr(_plain(reward), "requires", None)):
            requires()
    wrapped = [not isinstance(f, str | nn.Module) and callable(f) for f in found]
    names = iter(_distinct([f for f, own in zip(found, wrapped, strict=True) if own]))
    return [_checked(f, next(names)) if own else f for f, own in zip(found, wrapped, strict=True)]


def _named(name: str) -> Any:
    """The reward function of this name, or the name itself where it is that of a reward model: a folder or a hub id.

    Raises ValueError for a name that is neither.
    """
    looks_like_plugin = ":" in name or name.endswith(".py") or "/" not in name
    if os.path.isdir(name) or not looks_like_plugin:
        return name
    try:
        return load_reward(name)
    except ValueError as error:
        raise ValueError(f"reward_funcs: {error}; a reward model is named by its folder or OWNER/NAME") from error


def _distinct(rewards: Sequence[Any]) -> list[str]:
    """A name for each function: its own, with its module where several share it, numbered where that is not enough."""
    plain = [_plain(reward) for reward in rewards]
    names = [getattr(f, "__name__", None) or type(f).__name__ for f in plain]
    names = ["lambda" if name == "<lambda>" else name for name in names]
    shared = {name for name in names if names.count(name) > 1}
    for row, name in enumerate(names):
        module = str(getattr(plain[row], "__module__", None) or "").rpartition(".")[2]
        module = re.sub(r"^rl4dlm_reward_(.+)_[0-9a-f]{8}$", r"\1", module)  # a plugin file's module
        if name in shared and module and module != "__main__":
            names[row] = f"{module}:{name}"
    seen = set(names)
    taken: set[str] = set()
    for row, name in enumerate(names):
        candidate, number = name, 1
        while candidate in taken or (number > 1 and candidate in seen):
            number += 1
            candidate = f"{name}_{number}"
        names[row] = candidate
        taken.add(candidate)
    return names


def _plain(reward: Any) -> Any:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def _checked(reward: Callable[..., Any], name: str) -> Callable[..., Any]:

    def check(rewards: Any, expected: int) -> list[float | None]:
        try:
            values = [None if r is None else float(r) for r in rewards]
        except OverflowError:
            raise ValueError(
                f"reward function {name!r} returned an integer beyond every float; a reward is at most "
                f"{LARGEST_REWARD:g} in size"
            ) from None
        except (TypeError, ValueError):
            raise ValueError(
                f"reward function {name!r} returned {type(rewards).__name__} {str(rewards)[:80]!r}; it must return a "
                "list with one number, or None, per completion"
            ) from None
        if len(values) != expected:
            raise ValueError(f"reward function {name!r} returned {len(values)} rewards for {expected} completions")
        bad = next((i for i, v in enumerate(values) if v is not None and not math.isfinite(v)), None)
        if bad is not None:
            raise ValueError(
                f"reward function {name!r} returned {values[bad]} for completion {bad}; rewards are finite, or None "
                "for a completion that cannot be scored"
            )
        large = next((i for i, v in enumerate(values) if v is not None and abs(v) > LARGEST_REWARD), None)
        if large is not None:
            raise ValueError(
                f"reward function {name!r} returned {values[large]} for completion {large}; rewards are computed with "
                f"in float32 and are at most {LARGEST_REWARD:g} in size"
            )
        return values

    names_rollout = "rollout" in inspect.signature(reward).parameters

    def given(kwargs: dict[str, Any]) -> dict[str, Any]:
        """One `rollout` for those that name it, in the place of a column of them."""
        each = kwargs.pop("rollout", None)
        return {**kwargs, "rollout": each[0]} if names_rollout and each else kwargs

    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004

        @functools.wraps(reward)
        async def checked_async(*args: Any, **kwargs: Any) -> list[float | None]:
            return check(await reward(*args, **given(kwargs)), len(kwargs["completions"]))

        checked_async.__name__ = name
        return checked_async

    @functools.wraps(reward)
    def checked(*args: Any, **kwargs: Any) -> list[float | None]:
        return check(reward(*args, **given(kwargs)), len(kwargs["completions"]))

    checked.__name__ = name
    return checked
