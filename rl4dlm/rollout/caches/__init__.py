"""The key/value store, and cache policies: what a step feeds to the model and what it takes from the store.

A policy is a named object that holds settings and no state; the engine asks it, before each step, which columns of each
row are fed. Schedules know nothing of caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rl4dlm.rollout.caches import delayed_prefix, dkv, dual, frozen_prompt, none, prefix, sub_block, vicinity
from rl4dlm.rollout.caches.policy import CachePolicy, Now, Plan, policies

__all__ = [
    "CachePolicy",
    "Now",
    "Plan",
    "available_caches",
    "build_cache",
    "delayed_prefix",
    "dkv",
    "dual",
    "exact_cache",
    "frozen_prompt",
    "none",
    "prefix",
    "sub_block",
    "vicinity",
]


def available_caches() -> list[str]:
    """Names that `DecodingConfig.cache` allows besides `auto`."""
    return sorted(policies())


def build_cache(name: str, arguments: Mapping[str, Any] | None = None) -> CachePolicy:
    """The policy of a name with these settings.

    Raises:
        ValueError: an unknown name or setting, listing what exists, or a value that is not allowed.
    """
    if name not in policies():
        raise ValueError(f"cache={name!r} is unknown; choose one of {', '.join(['auto', *available_caches()])}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"cache_args={arguments!r} is not a mapping from setting to value")
    policy = policies()[name]
    allowed = [f.name for f in fields(policy)]
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        raise ValueError(
            f"cache_args has unknown settings {unknown} for cache={name!r}; allowed: {', '.join(allowed) or 'none'}"
        )
    return policy(**arguments)


def exact_cache(attention: str) -> str:
    """The policy that loses nothing for an attention kind: the exact block cache where there is one, else `none`."""
    return "prefix" if attention in policies()["prefix"].exact_for else "none"
