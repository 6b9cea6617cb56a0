"""The key/value store, and cache policies: what a step feeds to the model and what it takes from the store.

A policy is a named object without state; the engine asks it, before each step, from which position each row is fed.
Schedules know nothing of caches.
"""

from __future__ import annotations

from rl4dlm.rollout.caches.none import NoCache
from rl4dlm.rollout.caches.policy import CachePolicy
from rl4dlm.rollout.caches.prefix import PrefixCache

_policies: dict[str, type[CachePolicy]] = {policy.name: policy for policy in (NoCache, PrefixCache)}


def available_caches() -> list[str]:
    """Names that `DecodingConfig.cache` allows."""
    return sorted(_policies)


def build_cache(name: str) -> CachePolicy:
    """The policy of a name."""
    return _policies[name]()
