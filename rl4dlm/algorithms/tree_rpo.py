"""d-TreeRPO (arXiv 2512.09675): completions of a prompt are the leaves of a tree, and the edges are learnt from.

The canvas is decoded in stretches of steps; after each, every partly written canvas goes on in several branches. With
V(leaf) its reward, V(node) the mean of its children's, an edge to child c has the advantage

    A(c) = V(c) - mean of V over the siblings of c,

and the score of an edge is that of the tokens written on it, all predicted from the state before it, in one view. With
rho = p(y_i | state) / p_old(y_i | state), the loss is

    mean over edges of the mean over their tokens of  [-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta KL_i]
    + lambda mean over states and slots of  KL(q || p(. | state)).

In the second line q, at a slot that a child of the state has filled, are the tokens of the children with A > 0,
weighted by softmax(A / tau) of those that filled it: the model learns to foresee at once what good branches wrote in
many steps, which makes the scores of edges truer. Over a share p of `distillation_steps` the weight rises and tau
falls,

    lambda = distillation (exp(2 p) - 1) / (exp(2) - 1),        tau = 2 (1 - p)^0.7.

The batch holds leaves, each with the edges above it, so that an edge is scored once for every leaf below it, and counts
for one in all. The first branch of a state is the completion that the state is of; the others start from it with keys
of their own. A tree of four branches twice costs as many forwards as 10 completions.

Different from the released code:
- Tokens are scored up to the end of the leaf; there, up to the first end of sequence in the state behind the edge.
- Siblings need not be in one process; a state and all that starts from it must be.
- A token whose log-probability is exactly 0 counts.
- The distillation's mean is over all states of a generation batch; there, over those of one pass.
- In q a child counts by its advantage, however many of its leaves have ended before a slot.
- Padding is hidden; dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import RowNoise
from rl4dlm.likelihood.steps import StepSelector, Trail
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules import registry
from rl4dlm.rollout.schedules.parts import Schedule
from rl4dlm.rollout.state import State
from rl4dlm.training.advantages import leave_one_out
from rl4dlm.training.loss_parts import PolicyScores, resized
from rl4dlm.training.scores import rows_of
from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.trajectory_settings import AGGREGATIONS, TrajectoryConfig

GROWTH, WARMEST, COOLING = 2.0, 2.0, 0.7
"""Of lambda and tau: the paper's constants."""


@dataclass
class TreeRPOConfig(TrajectoryConfig):
    """Settings of d-TreeRPO; the defaults are those of the released code.

    Args:
        branches: of each state of the tree, level by level, 2 or more each; their product is `num_generations`.
        cuts: the steps of a row after which it branches, one fewer than there are levels. None: as many steps in each
            stretch, where the schedule has a number of them.
        distillation: largest weight of the second line of the module's docstring; 0 switches it off.
        distillation_steps: optimizer steps over which it rises.
        learning_rate: of AdamW. num_iterations: passes over a batch of trees.
        epsilon: clip range. beta: weight of the KL term.
        aggregation: `"step_sums"`, the mean over edges.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    paper_block_length: ClassVar[int | None] = 32

    branches: list[int] = field(
        default_factory=lambda: [4, 4], metadata={"help": "Branches of each state of the tree, level by level."}
    )
    cuts: list[int] | None = field(
        default=None, metadata={"help": "Steps after which rows branch. Default: stretches of equal length."}
    )
    distillation: float = field(
        default=3e-3, metadata={"help": "Largest weight of learning to foresee what good branches wrote; 0 is off."}
    )
    distillation_steps: int = field(
        default=30_000, metadata={"help": "Optimizer steps over which that weight rises to its largest."}
    )
    num_generations: int | None = field(
        default=None, metadata={"help": "Completions of a prompt: the product of branches, which is the default."}
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Completions per process and pass; one tree."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of AdamW, the paper's."})
    num_iterations: int = field(default=12, metadata={"help": "Passes over a batch of completions."})
    epsilon: float = field(default=0.4, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    aggregation: str = field(
        default="step_sums",
        metadata={"help": "How losses of tokens become one number: step_sums.", "choices": list(AGGREGATIONS)},
    )

    def __post_init__(self) -> None:
        if not self.branches or any(isinstance(b, bool) or not isinstance(b, int) or b < 2 for b in self.branches):
            raise ValueError(f"branches={self.branches!r} is not allowed; a list of integers, 2 or larger, is needed")
        leaves = math.prod(self.branches)
        self.num_generations = leaves if self.num_generations is None else self.num_generations
        if self.num_generations != leaves:
            raise ValueError(
                f"num_generations={self.num_generations} is not allowed with branches={self.branches}; they make "
                f"{leaves} completions of a prompt"
            )
        fixed = (("steps", "all"), ("merge", 1), ("aggregation", "step_sums"), ("value_model", "none"))
        for name, needed in fixed:
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed: the edges of the tree are scored, compared and "
                    f"averaged as they are; allowed: {needed!r}"
                )
        if self.old_policy == "recorded":
            raise ValueError(
                "old_policy='recorded' is not allowed: the tokens of an edge are scored in another state than those "
                "that they were drawn in; allowed: rescored, none"
            )
        if not 0 <= self.distillation < math.inf:
            raise ValueError(f"distillation={self.distillation} is not allowed; it must be 0 or larger")
        if self.distillation_steps < 1:
            raise ValueError(f"distillation_steps={self.distillation_steps} is not allowed; it must be 1 or larger")
        super().__post_init__()
        self.stretches()

    def stretches(self) -> tuple[int, ...]:
        """The steps after which rows branch. ValueError for settings that describe none."""
        needed = len(self.branches) - 1
        if self.cuts is None:
            decoding = self.decoding()
            steps = decoding.steps_per_block * decoding.num_blocks
            if needed and not registry.lookup(self.schedule).takes_steps:
                raise ValueError(
                    f"cuts=None is not allowed with schedule={self.schedule!r}, which takes as many steps as it needs; "
                    f"give {needed} of them"
                )
            found = tuple(steps * (level + 1) // len(self.branches) for level in range(needed))
        else:
            found = tuple(self.cuts)
        rising = all(a < b for a, b in zip((0, *found), found, strict=False))
        if len(found) != needed or not rising:
            raise ValueError(
                f"cuts={list(found)} is not allowed with branches={self.branches}; {needed} rising steps, 1 or larger, "
                "are needed"
            )
        return found

    def leaves(self) -> list[int]:
        """How many completions are behind an edge of each level; 1 at last."""
        return [math.prod(self.branches[level + 1 :]) for level in range(len(self.branches))]

    def selector(self, spec: DiffusionSpec) -> StepSelector:
        """The edges above a leaf; those of a tree weigh as much as each other."""
        shares = [1 / leaves for leaves in self.leaves()]
        return Edges(self.stretches(), tuple(share / sum(shares) for share in shares))


@dataclass(frozen=True)
class Edges(StepSelector):
    """Stretches of a row's own steps: before the first cut, from there to the second, and so on.

    Args:
        cuts: rising steps. weights: one more; 0 leaves the stretch out.
    """

    cuts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def complete(self) -> bool:  # type: ignore[override]
        return all(self.weights)

    @property
    def exact(self) -> bool:
        return False

    def numbered(self, rows: Rows) -> Tensor:
        """The row's own steps, those that wrote nothing included: cuts are of these."""
        assert rows.commit_step is not None
        return rows.commit_step

    def merged(self, step: Tensor, counted: Tensor) -> Tensor:
        """How many cuts are behind a step."""
        return torch.bucketize(step, torch.tensor(self.cuts, dtype=step.dtype, device=step.device), right=True)

    def weigh(self, trail: Trail, noise: RowNoise) -> Tensor:
        """That of the stretch."""
        weights = torch.zeros_like(trail.tokens, dtype=torch.float64)
        given = torch.tensor(self.weights, dtype=torch.float64, device=weights.device)
        weights[:, : len(given)] = given[: weights.shape[1]]
        return weights


def edge_advantages(rewards: Tensor, branches: Sequence[int]) -> Tensor:
    """V(c) minus the mean of its siblings, for the edges above each leaf, level by level.

    Args:
        rewards: `[N, G]`, of leaves, NaN where one could not be scored. branches: of each level; their product is G.

    Returns:
        `[N, G, H]`; NaN where no leaf behind the edge could be scored, 0 where no sibling has another value.
    """
    values, found, leaves = rewards, [], 1
    for count in reversed(branches):
        siblings = values.unflatten(-1, (-1, count))  # [N, nodes, count]
        above = leave_one_out(siblings)
        level = torch.where(siblings.isnan(), torch.nan, above)
        first = siblings.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
        equal = ((siblings == first) | siblings.isnan()).all(-1, keepdim=True)
        level = torch.where(equal & ~siblings.isnan(), 0.0, level)
        found.append(level.flatten(1).repeat_interleave(leaves, dim=-1))
        values, leaves = siblings.nanmean(-1), leaves * count
    return torch.stack(found[::-1], dim=-1)


def foreseen(
    tokens: Tensor, scored: Tensor, advantages: Tensor, temperature: float, leaves: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """What the children of a state with positive advantages have written, as a distribution at each slot.

    Args:
        tokens: long `[..., n, L]`, of n leaves behind the state, those of a child next to each other. scored: bool, the
            same, where the child wrote and the leaf has not ended. advantages: `[..., n]`, the child's.
        temperature: tau.
        leaves: of each child; those that have not ended share its weight, so that ends of some change no other's.

    Returns:
        weight: `[..., n, L]`, of each leaf's token, adding up to 1 where any was written; log_q: the same, the
        logarithm of the probability of that token, of equal ones together; there: bool `[..., L]`, where any was.
    """
    good = advantages > 0
    share = torch.where(good, advantages.double() / temperature, -torch.inf).softmax(-1).nan_to_num(nan=0.0)
    of_child = scored.unflatten(-2, (-1, leaves))
    each = (of_child / of_child.sum(-2, keepdim=True).clamp(min=1)).flatten(-3, -2)
    mass = share[..., None] * each
    total = mass.sum(-2, keepdim=True)
    weight = torch.where(total > 0, mass / total, 0.0)
    equal = tokens[..., :, None, :] == tokens[..., None, :, :]
    chance = (equal * weight[..., None, :, :]).sum(-2)
    log_q = torch.where(weight > 0, chance, 1.0).log()
    return weight, log_q, (total > 0).squeeze(-2)


def rising(step: int, steps: int, largest: float) -> tuple[float, float]:
    """lambda and tau after so many optimizer steps of `steps`."""
    share = min(1.0, step / steps)
    return largest * math.expm1(GROWTH * share) / math.expm1(GROWTH), max(1e-6, WARMEST * (1 - share) ** COOLING)


class TreeRPOTrainer(TrajectoryTrainer):
    """d-TreeRPO in TRL's GRPO loop; `TreeRPOConfig` has its settings, the module's docstring the algorithm.

    Raises:
        ValueError: a schedule whose rows cannot go on from a state, an intervention, or processes that would hold a
            part of a branch.
    """

    config_class = TreeRPOConfig
    args: TreeRPOConfig
    needs_masks = "its branches start from canvases whose written tokens stay"
    _tag_names = ["trl", "rl4dlm", "tree-rpo"]  # noqa: RUF012  (TRL's own form)
    _name = "d-TreeRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "d-TreeRPO: Towards More Reliable Policy Optimization for Diffusion Language Models",
        "id": "2512.09675",
    }

    def build_estimator(self) -> Any:
        """Views of edges. ValueError for rollouts that cannot branch."""
        schedule = self.decoding.build_schedule()
        if isinstance(schedule, Schedule) and not schedule.memoryless:
            raise ValueError(
                f"schedule={self.decoding.schedule!r} is not allowed: its rows cannot go on from a state; choose one "
                "whose steps follow from what is written, such as low_confidence, random or threshold"
            )
        assert self.args.steps_per_generation is not None
        local, branch = self.args.per_device_train_batch_size * self.args.steps_per_generation, self.args.leaves()[0]
        if local % branch:
            raise ValueError(
                f"per_device_train_batch_size={self.args.per_device_train_batch_size} with steps_per_generation="
                f"{self.args.steps_per_generation} gives a process {local} completions, and a branch of the tree has "
                f"{branch}; their product must be a multiple of that"
            )
        return super().build_estimator()

    def _check_intervention(self) -> None:
        raise ValueError(
            f"intervention={type(self.intervention).__name__} is not allowed: what it replaces is a branch of a tree; "
            "needed: None"
        )

    def _check_credit(self) -> None:
        if self.credit is not None:
            raise ValueError(
                f"credit={type(self.credit).__name__} is not allowed: branches go on from states, so that their "
                "records do not have every step; needed: None"
            )

    def _decode(
        self,
        ids: list[list[int]],
        row_ids: list[int],
        hints: Sequence[Mapping[int, int]] | None = None,
        start: State | None = None,
    ) -> Rollout:
        """In training level by level: the first branch of a state is there already, the others go on from it."""
        if not self.model.training:
            return super()._decode(ids, row_ids, hints, start)
        known: list[int] = []
        tree: Rollout | None = None
        behind = len(ids) + 1  # completions behind a state of the level before
        for level, leaves in enumerate(self.args.leaves()):
            new = [row for row in range(len(ids)) if row % leaves == 0 and (level == 0 or row % behind)]
            if tree is not None:
                place = {row: i for i, row in enumerate(known)}
                states = tree.state_at(self.args.stretches()[level - 1])
                start = states.take([place[row // behind * behind] for row in new])
            part = super()._decode([ids[row] for row in new], [row_ids[row] for row in new], None, start)
            tree = part if tree is None else tree.picked(part, range(len(tree) + len(part)))
            known, behind = known + new, leaves
        assert tree is not None
        return tree.picked(tree, sorted(range(len(known)), key=known.__getitem__))

    def extend_batch(self, batch: dict[str, Any], rollout: Rollout, rewards_per_func: Tensor) -> None:
        """Adds the advantages of edges, and what the distillation is to foresee."""
        super().extend_batch(batch, rollout, rewards_per_func)
        if not self.model.training:
            return
        rewards = self._summed(rewards_per_func).view(-1, self._group_size)
        everyone = edge_advantages(rewards, self.args.branches).nan_to_num(nan=0.0)  # [N, G, H]
        rows = rows_of(batch)
        first = self.accelerator.process_index * len(rows)
        own = everyone.flatten(0, 1)[first : first + len(rows)]
        steps = self.estimator.steps(rows, seed=self.args.seed, iteration=0)
        level = self.estimator.selector.merged(steps.first, steps.first >= 0)  # an edge without tokens has no view
        found = own.gather(-1, level)
        weight = self.args.negative_advantage_weight
        batch["step_advantages"] = torch.where(found < 0, weight * found, found)[:, None]
        if self.args.distillation:
            self._add_foreseen(batch, rows, everyone, first)

    def _add_foreseen(self, batch: dict[str, Any], rows: Rows, advantages: Tensor, first: int) -> None:
        tau = rising(self.state.global_step, self.args.distillation_steps, self.args.distillation)[1]
        trail = self.estimator.selector.trail(rows, self.args.scope)
        # Completions that are left out, since they were cut off, foresee nothing, and nobody foresees them.
        counted = trail.counted & batch["completion_mask"].any(-1, keepdim=True)
        parts = (rows.canvas_ids, trail.group, counted.long())
        tokens, edge, counted = (self.accelerator.gather(part.contiguous()) for part in parts)
        weights, log_q = torch.zeros_like(tokens, dtype=torch.float64), torch.zeros_like(tokens, dtype=torch.float64)
        cells, behind = 0, self._group_size
        for level, leaves in enumerate(self.args.leaves()):
            scored = (counted > 0) & (edge == level)
            shape = (-1, behind, tokens.shape[-1])
            good = advantages[..., level].reshape(-1, behind)
            weight, log, there = foreseen(tokens.view(shape), scored.view(shape), good, tau, leaves)
            weights, log_q = weights + weight.view_as(weights), log_q + log.view_as(log_q)
            cells, behind = cells + int(there.sum()), leaves
        own = slice(first, first + len(rows))
        batch["foreseen"], batch["foreseen_log_q"] = weights[own], log_q[own]
        batch["foreseen_slots"] = torch.full((len(rows),), float(cells), device=tokens.device)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The loss of the module's docstring."""
        found = super().loss(scores, batch)
        if batch.get("foreseen") is None:
            return found
        log_probs = self.compared(scores)
        weight, log_q = (
            resized(batch[name], log_probs.shape[1]).to(log_probs) for name in ("foreseen", "foreseen_log_q")
        )
        divergence, slots = weight * (log_q - log_probs), batch["foreseen_slots"][:1].squeeze(0).clamp(min=1.0)
        strength = rising(self.state.global_step, self.args.distillation_steps, self.args.distillation)[0]
        # Each micro-batch's part of the mean over slots, so that those without a good branch do not count as zeros.
        share = self.args.steps_per_generation / slots
        part = self.accelerator.reduce(divergence.detach().sum(), reduction="sum") * share
        self._metrics["train" if self.model.training else "eval"]["diffusion/foreseen_divergence"].append(float(part))
        return found + strength * self.mean_over_tokens(divergence, torch.ones_like(divergence), batch, total=slots)
