"""S2D2: a block model checks its own drafts from left to right, one token after another (self-speculation).

Each step drafts all open slots of the block. Where it seems worth a second forward, the first run of open slots is
checked by the model as it predicts one token after another (`rl4dlm.rollout.verifying`): drafts are kept while they
pass, and the first that does not is replaced. Then, or without a check, what is missing of the step's share is written
as `sdar_dynamic` does. Whether to check:

    policy        a check is made where
    span          the run has `min_span` slots or more
    score         s >= score_threshold
    hysteresis    s > threshold_on, or s >= threshold_off where the row's last step was checked

s = sum_k prod_{i <= k} a_i - penalty, the number of drafts that are expected to pass, with a_i = exp(-c H_i / log V)
from the entropy of a slot's distribution; the penalty is `penalty`, times the number of candidates above `threshold`
if `penalty_per_sure`.

At a temperature above 0 drafts are drawn, and tokens that pass or replace others are distributed as the model predicts
them one after another: with `policy: span`, `min_span: 1`, no `ratio_threshold` and a step for every slot all of the
completion is, whatever the drafts are worth. At temperature 0 drafts are the most probable tokens, and still pass by
chance, as in the released code, which knows no other: no such thing holds then.

Differences from it (phymhan/S2D2): any number of rows and given slots; rows that start inside a block share out what is
open there, and the mask token is no candidate, as with `sdar_dynamic`. Not offered: its other estimates of a_i, the
bandit, and attention that is causal in finished blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Scored
from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.dream import candidate_probability, certainty
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import (
    KEPT_BY_CHECK,
    RATIO,
    CommitRule,
    RowRule,
    Schedule,
    Step,
    even_counts,
    first_run,
    top,
)
from rl4dlm.rollout.schedules.registry import register

POLICIES = ("span", "score", "hysteresis")
CHECKED = "s2d2_checked"


@dataclass(frozen=True)
class S2D2Arguments:
    """Settings of `s2d2`; the defaults check at every step.

    Args:
        policy: when drafts are checked, one of `POLICIES`.
        min_span: of `"span"`.
        score_threshold: of `"score"`. threshold_on, threshold_off: of `"hysteresis"`.
        penalty, penalty_per_sure: what a check must be worth, see above.
        entropy_factor: c.
        ratio_threshold: drafts of the run behind the first that is refused are kept, too, where q / p is this or more;
            None: none is.
        threshold: of what is written without a check, as with `sdar_dynamic`.
    """

    policy: str = "span"
    min_span: int = 1
    score_threshold: float = 0.0
    threshold_on: float = 0.0
    threshold_off: float = -1.0
    penalty: float = 2.0
    penalty_per_sure: bool = True
    entropy_factor: float = 1.0
    ratio_threshold: float | None = None
    threshold: float = 0.85

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} is not allowed; choose one of {', '.join(POLICIES)}")
        check_count(self, "min_span", 1)
        check_number(self, "penalty", 0)
        check_number(self, "entropy_factor", 0)
        check_number(self, "threshold", 0)
        if self.ratio_threshold is not None:
            check_number(self, "ratio_threshold", 0, 1)
        if not self.threshold_on > self.threshold_off:
            raise ValueError(
                f"threshold_on={self.threshold_on} is not allowed; it must be larger than threshold_off="
                f"{self.threshold_off}"
            )


@register("s2d2", S2D2Arguments)
def s2d2(arguments: S2D2Arguments, config: Any) -> Schedule:
    """Drafts of a block, checked from left to right."""
    return Schedule(
        fixed_blocks(config),
        certainty,
        _written(arguments, config.steps_per_block),
        verify=_worth(arguments),
        reads={"certainty": candidate_probability, "evenness": _evenness},
    )


def _evenness(scored: Scored) -> Tensor:
    """`[n]`, entropy over the largest there is."""
    return scored.entropy / math.log(scored.logits.shape[-1])


def _worth(arguments: S2D2Arguments) -> RowRule:
    def rule(step: Step) -> Tensor:
        run = first_run(step.eligible)
        if arguments.policy == "span":
            return run.sum(-1) >= arguments.min_span
        passing = (-arguments.entropy_factor * step.read["evenness"]).exp()
        expected = (torch.where(run, passing, 1.0).cumprod(-1) * run).sum(-1)
        sure = (step.eligible & (certainty(step) > arguments.threshold)).sum(-1)
        score = expected - arguments.penalty * (sure if arguments.penalty_per_sure else 1)
        if arguments.policy == "score":
            return score >= arguments.score_threshold
        before = step.memory.rows.get(CHECKED, torch.zeros_like(sure)).bool()
        checked = torch.where(before, score >= arguments.threshold_off, score > arguments.threshold_on)
        step.memory.rows[CHECKED] = checked.long()
        return checked

    return rule


def _written(arguments: S2D2Arguments, steps: int) -> CommitRule:
    def rule(step: Step, scores: Tensor) -> Tensor:
        taken = step.read[KEPT_BY_CHECK]
        if arguments.ratio_threshold is not None:
            taken = taken | (step.eligible & (step.read[RATIO] >= arguments.ratio_threshold))
        waits = (first_run(step.eligible) & scores.isneginf()).cumsum(-1) > 0  # behind a token that comes last
        taken = taken & ~waits
        left = step.eligible & ~taken
        due = even_counts(step.masked_at_start, steps, step.step) - taken.sum(-1)
        sure = ((scores > arguments.threshold) & left).sum(-1)
        return taken | top(scores, left, torch.where(due > 0, torch.maximum(sure, due), 0))

    return rule
