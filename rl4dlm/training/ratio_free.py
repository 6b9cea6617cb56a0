"""Settings of the algorithms whose losses compare with no other policy: which of TRL's have no meaning there.

Owns the refusal; the losses are the algorithms'.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.training.config import OWN_LOSS, DiffusionPolicyConfig, set_but_not_supported

_NO_RATIO = "the loss has no policy ratio"
_NO_REFERENCE = "the loss has no KL term"
RATIO_SETTINGS = {
    **OWN_LOSS,
    "epsilon": _NO_RATIO,
    "epsilon_high": _NO_RATIO,
    "delta": _NO_RATIO,
    "clip": _NO_RATIO,
    "self_normalize": _NO_RATIO,
    "importance_sampling_level": _NO_RATIO,
    "off_policy_mask_threshold": _NO_RATIO,
    "kl_estimator": _NO_REFERENCE,
    "kl_target": _NO_REFERENCE,
    "use_bias_correction_kl": _NO_REFERENCE,
    "top_entropy_quantile": "the loss is one of whole sequences",
}
"""Settings of TRL's loss, and why a loss of another kind has no use for them."""


@dataclass
class RatioFreeConfig(DiffusionPolicyConfig):
    """Settings of a `DiffusionPolicyTrainer` without policy ratios; those of TRL's loss are refused when set.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    beta: float = field(default=0.0, metadata={"help": "Weight of a KL term, which this algorithm does not have: 0."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Divide advantages by a standard deviation of rewards: none, group or batch."},
    )
    temperature: float = field(default=0.9, metadata={"help": "Temperature of the rollout."})

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, self.refused_settings())
        if refused:
            raise ValueError("; ".join(refused))
        super().__post_init__()

    def refused_settings(self) -> dict[str, str]:
        """Settings that are refused unless they have their default, and why."""
        return {
            **RATIO_SETTINGS,
            "beta": _NO_REFERENCE,
            "sync_ref_model": "there is no reference model",
        }
