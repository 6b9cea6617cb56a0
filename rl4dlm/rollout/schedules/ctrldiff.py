"""CtrlDiff: a learned policy chooses how long each block is (Huang and Tang, arXiv 2505.14455).

Blocks are written from left to right. The block's first forward, over as many slots as the longest block has, is what
the policy sees: how confident the candidates are, how uncertain the model is. It answers with probabilities of the
sizes, one is drawn, and the same forward writes the block's first tokens; within blocks a confidence threshold decides.
The log-probability of each draw is in `Trace.selection_log_prob`, which is what a policy gradient needs.

A policy is an object of its own; without one, all sizes are equally likely. `CtrlDiffTrainer` trains one beside a
frozen model, from what `record=("policy",)` keeps: what the policy saw, which sizes were on offer, and which was drawn.

Differences from the paper, which has no released code: it shows the policy the hidden states and entropies of the
blocks before, here it sees the block to come; its network, sizes and reward are not published in a form that could be
followed, so that those here are our own; no classifier guides the tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.noise import inverse_cdf
from rl4dlm.rollout.policies.block_sizes import BlockSizePolicy, LearnedSizes, UniformSizes, checked_sizes, offered
from rl4dlm.rollout.policies.saving import load_policy, policy_of
from rl4dlm.rollout.schedules.adablock import first_open, refuse_block_length
from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.parts import BlockStart, Schedule, Step, above, probability
from rl4dlm.rollout.schedules.registry import register

DEFAULT_SIZES = (4, 8, 16, 32)
"""Without a policy and without sizes."""


@dataclass(frozen=True)
class CtrlDiffArguments:
    """Settings of `ctrldiff`.

    Args:
        policy: a `BlockSizePolicy`, the path of a saved `LearnedSizes` or of the folder it is in, or None: that of the
            model, if it has one and `sizes` is None, else all of `sizes` are equally likely.
        sizes: block sizes to choose from where there is no policy, which brings its own; None: 4, 8, 16 and 32.
        threshold: a candidate is committed when its probability reaches it.
        policy_temperature: of the draw of a size; 0: the most probable size, the smaller among equals.
    """

    policy: Any = None
    sizes: tuple[int, ...] | None = None
    threshold: float = 0.9
    policy_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.policy is not None and self.sizes is not None:
            raise ValueError(
                f"sizes={self.sizes!r} has no meaning beside a policy, which brings its own; leave it None"
            )
        check_number(self, "threshold", 0)
        check_number(self, "policy_temperature", 0)
        checked_sizes(self.chosen.sizes)

    @cached_property
    def chosen(self) -> BlockSizePolicy:
        """The policy as an object."""
        if self.policy is None:
            return UniformSizes(checked_sizes(DEFAULT_SIZES if self.sizes is None else self.sizes))
        if isinstance(self.policy, str | os.PathLike):
            found = load_policy(self.policy)
            if not isinstance(found, LearnedSizes):
                raise ValueError(f"policy={str(self.policy)!r} is a policy of kind {found.kind!r}, not 'block_sizes'")
            return found
        if not isinstance(self.policy, BlockSizePolicy):
            raise ValueError(
                f"policy={self.policy!r} is not allowed; it must be a path, an object with sizes and log_probs, or None"
            )
        return self.policy


@register("ctrldiff", CtrlDiffArguments, takes_steps=False)
def ctrldiff(arguments: CtrlDiffArguments, config: Any) -> Schedule:
    """Draws each block's size from a policy, then commits candidates whose probability reaches the threshold."""
    refuse_block_length(config, "sizes")
    blocks = ChosenBlocks(arguments.chosen, arguments.policy_temperature)

    def find(model: Any) -> None:
        found = policy_of(model) if arguments.policy is None and arguments.sizes is None else None
        if isinstance(found, LearnedSizes):
            blocks.policy = found

    return Schedule(
        blocks,
        probability,
        above(arguments.threshold),
        draws_positions=True,
        reads_entropy=True,
        policy=arguments.chosen,
        check=find,
    )


@dataclass
class ChosenBlocks:
    """Blocks whose size is drawn from a policy. They are counted from their first open slot on.

    Sizes beyond the end of the canvas are not on offer, except that the smallest always is; it then ends there.
    """

    policy: BlockSizePolicy
    temperature: float = 1.0
    on_grid: bool = False

    def end(self, rows: BlockStart) -> Tensor:
        """The furthest that the block can reach."""
        return torch.minimum(first_open(rows.masked, rows.start) + max(self.policy.sizes), rows.length)

    def settle(self, step: Step) -> Tensor | None:
        rows = (step.step == 0).nonzero().squeeze(-1)
        if not len(rows):
            return None
        sizes = torch.tensor(self.policy.sizes, device=rows.device)
        start = first_open(step.eligible, step.start)
        features = block_features(step, start, max(self.policy.sizes))
        begins = (step.step == 0)[:, None]
        allowed = begins & (sizes <= (step.length - start)[:, None])
        allowed[:, 0] = begins.squeeze(-1)
        log_probs = offered(self.policy.log_probs(features[rows]), allowed[rows], self.temperature or 1.0)  # [r, K]
        if bool(log_probs.isnan().any()):
            raise ValueError("the policy's probabilities of block sizes are not numbers (NaN); decoding cannot go on")
        if self.temperature:
            uniform = step.noise.uniform("block_size", step.row_ids[rows], step.total_step[rows], start[rows])
            choice = inverse_cdf(log_probs.exp(), uniform)
            drawn = log_probs.gather(-1, choice[:, None]).squeeze(-1)
            step.selection_log_prob[rows] += drawn.to(step.selection_log_prob)
        else:
            choice = log_probs.argmax(-1)
        chosen = torch.zeros_like(allowed)
        chosen[rows, choice] = True
        seen = features.where(begins[..., None], 0.0)
        step.noted = {"policy_features": seen, "policy_allowed": allowed, "policy_chosen": chosen}
        end = step.stop.clone()
        end[rows] = torch.minimum(start[rows] + sizes[choice], step.length[rows])
        return end


def block_features(step: Step, start: Tensor, slots: int) -> Tensor:
    """What a policy sees of the next slots, `[R, slots, 3]`: the probability of the candidate, the entropy in nats, and
    1 where there is an open slot; all 0 where there is none."""
    at = start[:, None] + torch.arange(slots, device=start.device)
    inside = at.clamp(max=step.tokens.shape[1] - 1)
    is_open = step.eligible.gather(-1, inside) & (at < step.length[:, None])
    values = [value.gather(-1, inside) for value in (step.drawn.confidence, step.drawn.entropy)]
    seen = torch.stack([*values, torch.ones_like(values[0])], dim=-1)
    return seen.where(is_open[..., None], 0.0)
