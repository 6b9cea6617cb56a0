"""Settings of how rollouts of inexact caches are watched and corrected. What they do is in `auditing.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rl4dlm.likelihood.masks import check_choice

AUDIT_SHARE = 1 / 64
"""Share of rows that is audited where rollouts are not exact and nothing else is said."""

AUDIT_ACTIONS = ("warn", "exact", "both")
CORRECTIONS = ("none", "token_truncate", "sequence_truncate")


@dataclass
class AuditSettings:
    """What every RL config has besides.

    Args:
        audit_share: share of each generation batch's rows, rounded up, that is scored again without a cache; None: 1/64
            where rollouts are not exact, else 0. See `rl4dlm.rollout.audit`; metrics are `diffusion/audit_*`.
        audit_bound: nats per token; above it, something is done about `diffusion/audit_delta`. None: never.
        audit_action: `"warn"` says so in the log; `"exact"` decodes with an exact cache, or none, from the next
            generation batch on to the end of the run, resumed or not; `"both"`.
        rollout_correction: multiplies the loss of each token by the probability of its draw under the policy that is
            trained over the recorded one, at most `rollout_correction_clip_max`: `"token_truncate"`, or
            `"sequence_truncate"` by the product over the tokens of a completion. As TRL's
            `vllm_importance_sampling_mode`. For losses of TRL's and scores that tokens were drawn with only.
        rollout_correction_clip_max: C of the truncation, as TRL's `vllm_importance_sampling_clip_max`.
    """

    audit_share: float | None = field(
        default=None,
        metadata={"help": "Share of rollouts that is scored again without a cache. Default: 1/64 of inexact ones."},
    )
    audit_bound: float | None = field(
        default=0.05, metadata={"help": "Mean error of log-probabilities, in nats per token, above which to act."}
    )
    audit_action: str = field(
        default="warn",
        metadata={"help": "What to do then: warn, decode exactly from there on, or both.", "choices": [*AUDIT_ACTIONS]},
    )
    rollout_correction: str = field(
        default="none",
        metadata={
            "help": "Truncated importance weights for completions that an inexact cache has drawn.",
            "choices": [*CORRECTIONS],
        },
    )
    rollout_correction_clip_max: float = field(
        default=3.0, metadata={"help": "Largest weight that rollout_correction gives."}
    )


def check_audit(config: Any) -> None:
    """Raises ValueError for settings that are not allowed, or that would do nothing."""
    share, bound, clip = config.audit_share, config.audit_bound, config.rollout_correction_clip_max
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"audit_share={share} is not allowed; it must be between 0 (off) and 1, or None")
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"audit_bound={bound} is not allowed; it must be larger than 0, or None")
    check_choice("audit_action", config.audit_action, AUDIT_ACTIONS)
    if config.audit_action != "warn" and (share == 0 or bound is None):
        raise ValueError(
            f"audit_action={config.audit_action!r} has no effect with audit_share={share} and audit_bound={bound}; "
            "audit some rows against a bound, or set it to 'warn'"
        )
    check_choice("rollout_correction", config.rollout_correction, CORRECTIONS)
    if not 0 < clip < math.inf:
        raise ValueError(f"rollout_correction_clip_max={clip} is not allowed; it must be larger than 0, and finite")
    if config.rollout_correction == "none" and clip != 3.0:
        raise ValueError(
            f"rollout_correction_clip_max={clip} has no effect with rollout_correction='none'; choose one of "
            f"{', '.join(CORRECTIONS[1:])}, or leave it out"
        )
    if config.rollout_correction == "sequence_truncate" and config.loss_type == "vespo":
        raise ValueError(
            "rollout_correction='sequence_truncate' is not allowed with loss_type='vespo', which multiplies ratios of "
            "tokens itself; choose 'token_truncate'"
        )
