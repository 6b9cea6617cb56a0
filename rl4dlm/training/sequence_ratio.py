"""Clipped losses of one ratio per sequence, from estimates of its log-likelihood; what ESPO and GDPO share.

With B(y) the estimate for a completion y (the sum of its tokens' scores) and n the number of tokens that it is about,
the loss of a completion is

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta / n * KL estimate of B - B_ref,

    rho = exp((B - B_old) / n),

with B_old in the place of B_ref for `kl_target="old"`. `clip` offers others in the place of the first term.

The terms of a bound have no meaning as conditional log-probabilities of tokens, so nothing here is per token. A mean
over completions follows, in which those that count for nothing (`mask_truncated_completions`) are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from rl4dlm.training.config import OWN_LOSS, set_but_not_supported
from rl4dlm.training.losses import kl_estimate
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer, PolicyScores

RATIO_NORMS = ("length", "none")
"""What the exponent of a ratio of sequences may be divided by."""

_PER_TOKEN = "the loss here is one clipped ratio per sequence"
_NOT_SUPPORTED = {
    **dict.fromkeys(OWN_LOSS, _PER_TOKEN),
    "importance_sampling_level": f"{_PER_TOKEN} already",
    "use_bias_correction_kl": "it corrects a KL term per token",
}


@dataclass
class SequenceRatioConfig(DiffusionPolicyConfig):
    """What the settings of ESPO and GDPO have in common; TRL's settings of losses per token are refused.

    Args:
        kl_estimator: `"k2"` or `"k3"` of the difference of whole sequences; `"k1"` is refused, since its gradient
            does not depend on the reference. See `rl4dlm.training.losses`.
        scale_rewards: `"none"`: advantages are not divided by a standard deviation.
        delta: c > 1 + epsilon_high, bounds the loss by c |A| where A < 0 (dual clip); None: none.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    kl_per_token: ClassVar[bool] = False
    kl_estimator: str = field(
        default="k2",
        metadata={"help": "Estimator of the sequence's KL term: k2 or k3.", "choices": ["k2", "k3"]},
    )

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, _NOT_SUPPORTED)
        if refused:
            raise ValueError("; ".join(refused))
        super().__post_init__()


class SequenceRatioTrainer(DiffusionPolicyTrainer):
    """The loss of the module's docstring; an algorithm says how sequences are estimated."""

    config_class: type[SequenceRatioConfig] = SequenceRatioConfig
    args: SequenceRatioConfig

    def log_ratio(self, difference: Tensor, length: Tensor) -> tuple[Tensor, Tensor | float]:
        """log rho of completions from B - B_old, and what their surrogate is multiplied by; all `[B]`."""
        return difference / length, 1.0

    def kl_size(self, length: Tensor) -> Tensor | float:
        """What the KL term of a completion is divided by."""
        return length

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with an advantage, unless there is a KL term."""
        return None if self.args.beta else self.with_advantage(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """One clipped ratio per completion, and the KL term of whole sequences beside it."""
        mask, advantages = batch["completion_mask"], batch["advantages"]
        counts, length = mask.any(-1), mask.sum(-1).clamp(min=1)

        def difference(policy: str) -> Tensor:  # B - B of the other policy, [B]
            return (self.log_ratio_to(policy, scores.log_probs, batch) * mask).sum(-1)

        log_ratio, share = self.log_ratio(difference("old"), length)
        of_which, _ = self.log_ratio((scores.log_probs * mask).sum(-1), length)  # what rho is the ratio of
        per_sequence = self.surrogate(log_ratio, of_which, advantages, counts, batch) * share
        if self.args.beta:
            kl = kl_estimate(difference(self.args.kl_target), self.args.kl_estimator)
            kl = kl / self.kl_size(length)
            per_sequence = per_sequence + self.args.beta * kl
            self.log_mean("kl", kl, counts)
        self.log_clipped(log_ratio, advantages, counts)
        self.log_entropy(scores, mask)
        return self.mean_over_rows(per_sequence * counts)
