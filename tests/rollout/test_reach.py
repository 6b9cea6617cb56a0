"""Schedules that write ahead of the active block, or in a part of it: what caches feed for them, and audits."""

from __future__ import annotations

from typing import Any

import pytest

from rl4dlm.rollout.audit import audit
from rl4dlm.rollout.caches.policy import policies
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.models.block_denoisers import PROMPTS, block_denoiser
from tests.rollout.denoisers import assert_same_rows

HINTS = [{0: 9}, {}, {4: 5, 5: 6, 6: 7, 7: 8}, {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4}, {9: 3}]
REACHING: dict[str, dict[str, Any]] = {
    "d2f": {"threshold": 0.35, "add_threshold": 0.25, "active_threshold": 0.75},
    "multi_block": {"entropy_threshold": 1.0, "add_threshold": 0.25},
    "sub_blocks": {"sub_block_length": 2, "threshold": 0.4},
    "sliding_window": {"window": 5, "entropy_threshold": 1.6},
}
KINDS = [
    ("block_causal", "whole_prompt"),
    ("block_causal", "position_zero"),
    ("context_causal", "response"),
    ("causal", "response"),
    ("written_first", "response"),
]


def decoded(kind: str, origin: str, schedule: str, shift: int, **settings: Any) -> Rollout:
    hints = settings.pop("hints", None)
    blocks = {} if schedule == "sliding_window" else {"block_length": 4}
    config = DecodingConfig(
        canvas_length=16,
        schedule=schedule,
        schedule_args=REACHING[schedule],
        temperature=1.0,
        stop_at_eos=False,
        **blocks,
        **settings,
    )
    engine = RolloutEngine(block_denoiser(kind, origin, shift=shift))
    return engine.generate(PROMPTS, config, seed=4, hints=hints)


@pytest.mark.parametrize("schedule", REACHING)
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_policies_that_are_exact_for_a_kind_are_so_wherever_a_schedule_writes(kind: str, origin: str, schedule: str):
    if schedule == "sliding_window" and kind in ("block_causal", "context_causal"):
        with pytest.raises(ValueError, match="sliding_window.*chooses its own blocks"):
            decoded(kind, origin, schedule, 0)
        return
    exact = [name for name, policy in policies().items() if kind in policy.exact_for and policy.uses_store]
    assert "prefix" in exact
    for shift, hints in ((0, HINTS), (1, None)):
        plain = decoded(kind, origin, schedule, shift, hints=hints, cache="none")
        for name in exact:
            cached = decoded(kind, origin, schedule, shift, hints=hints, cache=name)
            assert_same_rows(cached, plain)
            assert cached.exact


@pytest.mark.parametrize("schedule", REACHING)
@pytest.mark.parametrize(("kind", "origin"), [("block_causal", "whole_prompt"), ("written_first", "response")])
def test_audits_of_exact_rollouts_find_nothing(kind: str, origin: str, schedule: str):
    if schedule == "sliding_window" and kind == "block_causal":
        return
    rollout = decoded(kind, origin, schedule, 1, hints=HINTS)
    assert rollout.cache == "prefix"
    found = audit(block_denoiser(kind, origin, shift=1), rollout, rows_per_forward=9)
    assert len(found.rows) == int((rollout.trace.commit_step >= 0).sum())
    assert float((found.exact - found.recorded).abs().max()) <= 1e-10
