"""What may change groups of completions between rewards and advantages: the seam between trainers and interventions.

Of each group, once its completions have rewards, the trainer asks which to decode again and with which slots given;
decodes these attempts with the policy and settings of the rollout; asks each reward function for them; and lets the
intervention say which attempts take the place of which members. A group keeps its size, advantages come from the
rewards that are left, and no reward function sees a completion twice.

Tokens that were given are `hinted` in the batch and the rows that were replaced are `replaced`. A trainer leaves given
tokens out of its loss unless its `scores_hints` is true: the policy did not choose them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec


class Context(NamedTuple):
    """What a trainer knows when it is built."""

    tokenizer: Any
    spec: DiffusionSpec
    canvas_length: int
    num_generations: int
    """G."""

    reward_names: list[str]
    """Of the reward functions, in the order of the columns of `Group.rewards`."""

    seed: int
    """Of the run. Randomness is a function of it and of `Group.row_ids`."""


class Group(NamedTuple):
    """The completions of one prompt."""

    row: Mapping[str, Any]
    """The row of the dataset."""

    rewards: Tensor
    """`[G, F]`, one column per reward function; NaN where it could not tell."""

    row_ids: list[int]
    """Keys of the completions' randomness, `G` of them."""


class Intervention(ABC):
    """Decodes some completions of a group a second time, with hints, and says which of them take a place."""

    columns: Sequence[str] = ()
    """Columns that the training data must have."""

    def bind(self, context: Context) -> None:  # noqa: B027  (it need not do anything)
        """Called once by the trainer. Raises ValueError for settings that do not fit it."""

    @abstractmethod
    def attempts(self, group: Group) -> list[Mapping[int, int]]:
        """The hints (offset in the canvas -> token id) of each attempt, at most G; empty: the group stays as it is."""

    @abstractmethod
    def replacements(self, group: Group, rewards: Tensor) -> dict[int, int]:
        """Which attempt takes the place of which member of the group, given the attempts' rewards `[A, F]`.

        Keys are members, 0 to G - 1, values attempts, each at most once.
        """
