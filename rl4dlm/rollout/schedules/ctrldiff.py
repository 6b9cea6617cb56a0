"""CtrlDiff: a learned policy chooses how long each block is (Huang and Tang, arXiv 2505.14455).

Blocks are written from left to right. The block's first forward, over as many slots as the longest block has, is what
the policy sees: how confident the candidates are, how uncertain the model is. It answers with probabilities of the
sizes, one is drawn, and the same forward writes the block's first tokens; within blocks a confidence threshold decides.
The log-probability of each draw is in `Trace.selection_log_prob`, which is what a policy gradient needs.

A policy is an object of its own, and this version does not train it: without one, all sizes are equally likely.
`LearnedSizes` can be trained by whatever gives its `log_probs` a gradient.

Differences from the paper, which has no released code: it shows the policy the hidden states and entropies of the
blocks before, here it sees the block to come; its network, sizes and reward are not published in a form that could be
followed, so that those here are our own; no classifier guides the tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rl4dlm.rollout.noise import inverse_cdf
from rl4dlm.rollout.schedules.adablock import first_open, refuse_block_length
from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.parts import BlockStart, Schedule, Step, above, probability
from rl4dlm.rollout.schedules.registry import register

FEATURES = ("confidence", "entropy", "open")
"""What a policy sees of each slot, see `block_features`."""

DEFAULT_SIZES = (4, 8, 16, 32)
"""Without a policy and without sizes."""


@runtime_checkable
class BlockSizePolicy(Protocol):
    """Chooses among block sizes.

    Attributes:
        sizes: the sizes, ascending.
    """

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def log_probs(self, features: Tensor) -> Tensor:
        """Log-probabilities of the sizes, float `[R, K]`, from features of the next slots, `[R, max(sizes), 3]`.

        A row's result must not depend on the other rows.
        """
        ...


@dataclass(frozen=True)
class UniformSizes:
    """All sizes are equally likely; with a single one, blocks have a fixed length."""

    sizes: tuple[int, ...]

    def log_probs(self, features: Tensor) -> Tensor:
        return features.new_zeros(len(features), len(self.sizes)).log_softmax(-1)


class LearnedSizes(nn.Module):
    """A network of one hidden layer over the features of all slots; before any training all sizes are equally likely.

    Args:
        sizes: block sizes to choose from. hidden: units of the hidden layer. seed: of the initial weights.
    """

    def __init__(self, sizes: tuple[int, ...], *, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.sizes = checked_sizes(sizes)
        # In float64 a row's result does not change with the rows beside it by more than what could never tip a draw.
        inputs, generator = max(self.sizes) * len(FEATURES), torch.Generator().manual_seed(seed)
        self.hidden = nn.utils.skip_init(nn.Linear, inputs, hidden, dtype=torch.float64)
        self.choice = nn.utils.skip_init(nn.Linear, hidden, len(self.sizes), dtype=torch.float64)
        with torch.no_grad():
            self.hidden.weight.normal_(std=inputs**-0.5, generator=generator)
            for zeros in (self.hidden.bias, self.choice.weight, self.choice.bias):
                zeros.zero_()

    def log_probs(self, features: Tensor) -> Tensor:
        weights = self.hidden.weight
        inputs = features.to(weights.device, weights.dtype).flatten(1)
        return self.choice(torch.tanh(self.hidden(inputs))).log_softmax(-1).to(features.device)

    def save(self, path: str | Path) -> None:
        """Writes sizes and weights into a safetensors file."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path, metadata={"sizes": json.dumps(self.sizes)})

    @classmethod
    def load(cls, path: str | Path) -> LearnedSizes:
        """Reads such a file; nothing in it is executed.

        Raises:
            ValueError: the file is missing or is not one that `save` wrote.
        """
        try:
            with safe_open(path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                sizes = checked_sizes(json.loads((file.metadata() or {}).get("sizes", "null")))
            inputs, hidden = max(sizes) * len(FEATURES), len(weights["hidden.bias"])
            if weights["hidden.weight"].shape != (hidden, inputs):  # before anything is made of that size
                raise ValueError(f"hidden.weight is not {hidden} x {inputs}")
            policy = cls(sizes, hidden=hidden)
            policy.load_state_dict(weights)
            if not all(bool(value.isfinite().all()) for value in weights.values()):
                raise ValueError("weights are not finite")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"policy={str(path)!r} is not a saved block size policy: {error}") from error
        return policy


@dataclass(frozen=True)
class CtrlDiffArguments:
    """Settings of `ctrldiff`.

    Args:
        policy: a `BlockSizePolicy`, the path of a saved `LearnedSizes`, or None: all of `sizes` are equally likely.
        sizes: block sizes to choose from where there is no policy, which brings its own; None: 4, 8, 16 and 32.
        threshold: a candidate is committed when its probability reaches it.
    """

    policy: Any = None
    sizes: tuple[int, ...] | None = None
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if self.policy is not None and self.sizes is not None:
            raise ValueError(
                f"sizes={self.sizes!r} has no meaning beside a policy, which brings its own; leave it None"
            )
        check_number(self, "threshold", 0)
        checked_sizes(self.chosen.sizes)

    @cached_property
    def chosen(self) -> BlockSizePolicy:
        """The policy as an object."""
        if self.policy is None:
            return UniformSizes(checked_sizes(DEFAULT_SIZES if self.sizes is None else self.sizes))
        if isinstance(self.policy, str | Path):
            return LearnedSizes.load(self.policy)
        if not isinstance(self.policy, BlockSizePolicy):
            raise ValueError(
                f"policy={self.policy!r} is not allowed; it must be a path, an object with sizes and log_probs, or None"
            )
        return self.policy


@register("ctrldiff", CtrlDiffArguments, takes_steps=False)
def ctrldiff(arguments: CtrlDiffArguments, config: Any) -> Schedule:
    """Draws each block's size from a policy, then commits candidates whose probability reaches the threshold."""
    refuse_block_length(config, "sizes")
    blocks = ChosenBlocks(arguments.chosen)
    return Schedule(blocks, probability, above(arguments.threshold), draws_positions=True, reads_entropy=True)


@dataclass(frozen=True)
class ChosenBlocks:
    """Blocks whose size is drawn from a policy. They are counted from their first open slot on.

    Sizes beyond the end of the canvas are not on offer, except that the smallest always is; it then ends there.
    """

    policy: BlockSizePolicy
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
        features = block_features(step, start, max(self.policy.sizes))[rows]
        beyond = sizes > (step.length - start)[rows, None]
        beyond[:, 0] = False
        log_probs = self.policy.log_probs(features).double().masked_fill(beyond, -torch.inf).log_softmax(-1)  # [r, K]
        uniform = step.noise.uniform("block_size", step.row_ids[rows], step.total_step[rows], start[rows])
        choice = inverse_cdf(log_probs.exp(), uniform)
        chosen = log_probs.gather(-1, choice[:, None]).squeeze(-1)
        step.selection_log_prob[rows] += chosen.to(step.selection_log_prob)
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


def checked_sizes(sizes: Any) -> tuple[int, ...]:
    """Sizes as an ascending tuple. Raises ValueError for what is not a list of different positive integers."""
    good = isinstance(sizes, tuple | list) and bool(sizes) and all(isinstance(s, int) and s >= 1 for s in sizes)
    if not good or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes={sizes!r} is not allowed; it must be a list of ascending integers, 1 or larger")
    return tuple(sizes)
