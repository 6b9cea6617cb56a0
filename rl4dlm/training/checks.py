"""Refuses bad data before it costs compute: datasets, prompts and what reward functions return.

Owns the messages. Settings are checked by their configs, models and tokenizers by `rl4dlm.models`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn

logger = logging.getLogger(__name__)

PROMPTS_PER_PASS = 1000
LARGEST_REWARD = 1e6  # beyond it sums and squares of float32 rewards lose what tells completions apart


def check_columns(dataset: Any, name: str, needed: str) -> None:
    """Raises ValueError if a dataset (or one of a dict of them) lacks a column."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_columns(part, f"{name}[{key!r}]", needed)
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        return  # TRL says what it takes
    columns = dataset.column_names or sorted(next(iter(dataset), {}))
    if needed not in columns:
        raise ValueError(f"{name} has no column {needed!r}; its columns are {columns}")


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
    keep, longest = [], 0
    for start in range(0, len(dataset), PROMPTS_PER_PASS):
        prompts = dataset[start : start + PROMPTS_PER_PASS]["prompt"]
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


def check_prompt(ids: Sequence[int], name: str, mask_token_id: int) -> None:
    """Raises ValueError for a prompt that is empty or holds the mask token."""
    if not len(ids):
        raise ValueError(f"{name} is empty; a prompt has at least one token")
    if mask_token_id in ids:
        raise ValueError(f"{name} contains the mask token (id {mask_token_id}); prompts hold written text only")


def checked_rewards(reward_funcs: Any) -> list[Any] | None:
    """Reward functions that refuse to return anything but one number of at most 1e6 in size, or None, per completion.

    TRL files metrics and completions under a function's `__name__`, so each gets one that no other has.
    Reward models and names of reward models are left as they are. TRL alone reads NaN as "not scorable".
    """
    if reward_funcs is None:
        return None
    listed = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    wrapped = [not isinstance(f, str | nn.Module) and callable(f) for f in listed]
    names = iter(_distinct([f for f, own in zip(listed, wrapped, strict=True) if own]))
    return [_checked(f, next(names)) if own else f for f, own in zip(listed, wrapped, strict=True)]


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

    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004

        @functools.wraps(reward)
        async def checked_async(*args: Any, **kwargs: Any) -> list[float | None]:
            return check(await reward(*args, **kwargs), len(kwargs["completions"]))

        checked_async.__name__ = name
        return checked_async

    @functools.wraps(reward)
    def checked(*args: Any, **kwargs: Any) -> list[float | None]:
        return check(reward(*args, **kwargs), len(kwargs["completions"]))

    checked.__name__ = name
    return checked
