"""What may say which tokens of a completion its reward is due to: the seam between trainers and plug-ins of credit.

Two things can be said, and any trainer listens to both. *Weights* of tokens: what the log-probability of each counts
for in the gradient, whatever the loss is made of; scores, ratios and what is clipped stay as they are. *Fillings*:
other completions of states that the rollout went through, which have rewards and a loss of their own beside the
trainer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout


class Fillings(NamedTuple):
    """K states of each row, and Z completions of each; all are whole canvases."""

    shown: Tensor
    """long `[B, K, L]`, the mask token where a slot is open; nothing is open where a row has no such state."""

    tokens: Tensor
    """long `[B, K, Z, L]`, the same with open slots filled."""


class Credit(ABC):
    """Says what tokens are worth, from what a rollout has recorded. In training only.

    Attributes:
        weighs_tokens: whether it has `token_weights`.
        weight: what the loss of fillings counts for beside the trainer's.
        epsilon: the clip range of their ratios.
    """

    weighs_tokens: ClassVar[bool] = False
    weight: float = 0.0
    epsilon: float = 0.2

    @abstractmethod
    def recorded(self, decoding: DecodingConfig) -> dict[str, Any]:
        """What must be recorded, as settings of `DecodingConfig`: `record`, `record_steps`, `num_fillings`.

        Args:
            decoding: how rollouts are decoded, with what the algorithm records for itself.

        Raises:
            ValueError: rollouts that it cannot learn from.
        """

    def token_weights(self, rollout: Rollout) -> Tensor | None:
        """float `[B, L]`, what each token of this process's rows counts for; None: all the same."""
        return None

    def fillings(self, rollout: Rollout) -> Fillings | None:
        """Other completions of this process's rows; None: there are none."""
        return None
