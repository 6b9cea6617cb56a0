"""Settings of algorithms that learn from the recorded denoising, and what of them goes together.

Owns validation. The trainer is `rl4dlm.training.trajectory`'s, the views are `rl4dlm.likelihood.steps`'.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.likelihood.masks import check_choice, check_count
from rl4dlm.likelihood.step_selectors import (
    PROPOSALS,
    STEP_SCALES,
    AllSteps,
    BlockSlices,
    EntropyThreshold,
    Flagged,
    SampledSteps,
    Segments,
    TopEntropy,
)
from rl4dlm.likelihood.steps import StepSelector
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.config import OWN_LOSS, set_but_not_supported
from rl4dlm.training.value_settings import ValueConfig, check_value

STEPS = ("all", "block_slices", "segments", "sampled", "top_entropy", "entropy_threshold", "flagged")
COUNTED = ("segments", "sampled", "top_entropy", "entropy_threshold")
"""Choices of steps that say how many there are."""
RATIO_UNITS = ("token", "step", "sequence")
RATIO_NORMS = ("sum", "mean")
KL_UNITS = ("token", "step")
OLD_POLICIES = ("rescored", "recorded", "none")
AGGREGATIONS = ("tokens", "rows", "row_sums", "canvas", "steps", "step_sums")

_NOT_SUPPORTED = {
    **{name: reason for name, reason in OWN_LOSS.items() if name != "use_bias_correction_kl"},
    "loss_type": "aggregation says how the losses of tokens become one number",
    "importance_sampling_level": "ratio_unit says what a policy ratio is of",
}
_CHANGES_DRAWS = {
    "top_p": 1.0,
    "top_k": 0,
    "min_new_tokens": 0,
    "eos_penalty": 0.0,
    "suppress_token_ids": None,
}
"""Settings that what was really drawn from depends on, and tempered scores do not."""


@dataclass
class TrajectoryConfig(ValueConfig):
    """Settings of a `TrajectoryTrainer`, and of its value model if it has one; those of TRL's losses are refused.

    Args:
        steps: which recorded steps are scored, each in the state that it was written in. `"all"` of them, which for
            a model that denoises block by block are scored as `"block_slices"`, the k-th step of every block at once;
            `num_scored_steps` `"segments"` of equal length; so many `"sampled"` ones; those of largest entropy
            (`"top_entropy"`), or those above a running quantile that keeps so many on average
            (`"entropy_threshold"`); or those at which schedule `threshold` found nothing sure enough (`"flagged"`).
        num_scored_steps: K; None where `steps` does not ask for a number.
        merge: so many consecutive steps are scored as one, in the state before the first; with `"all"` and
            `"block_slices"`, there within each block.
        step_proposal: what steps are sampled by, `"uniform"` or in proportion to their `"entropy"`.
        step_scale: whether sampled steps estimate the `"sum"` over a row's steps, or their `"mean"`.
        ratio_unit: what has a ratio of its own: a `"token"`, a `"step"`, or all scored tokens of a `"sequence"`, which
            must have equal weights: not with averages over steps, nor with sampled ones.
        ratio_norm: whether the ratio of a step or sequence is that of the `"sum"` of its tokens' log-probabilities, or
            of their `"mean"`. With either, and any unit, the gradient is the same as long as all ratios are 1.
        aggregation: how losses of tokens, times the weights of their steps, become one number. `"tokens"`: over the
            tokens of the generation batch. The others are means over completions: of the mean over `"rows"`' tokens, of
            their sum (`"row_sums"`), of that over the length of the `"canvas"`; of the mean over a step's tokens, and
            then over a row's `"steps"`, or of the sum of those means (`"step_sums"`).
        old_policy: the policy in the denominator of ratios: `"rescored"` in the same views, so that ratios are exactly
            1 before the first update; the log-probabilities `"recorded"` while decoding, which cost nothing and are
            those of inexact caches, too; or `"none"`: ratios are 1.
        kl_unit: whether the KL term is of each `"token"`, or of each `"step"`'s sum.
        one_view: on, since there are as many views as steps.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    steps: str = field(default="all", metadata={"help": "Recorded steps that are scored.", "choices": list(STEPS)})
    num_scored_steps: int | None = field(
        default=None,
        metadata={"help": "How many steps or segments of a completion are scored, where steps ask for it."},
    )
    merge: int = field(default=1, metadata={"help": "So many consecutive steps are scored as one; 1 is exact."})
    step_proposal: str = field(
        default="uniform", metadata={"help": "What sampled steps are drawn by.", "choices": list(PROPOSALS)}
    )
    step_scale: str = field(
        default="sum",
        metadata={
            "help": "What sampled steps estimate, over a row's steps: sum or mean.",
            "choices": list(STEP_SCALES),
        },
    )
    ratio_unit: str = field(
        default="token", metadata={"help": "What has a policy ratio of its own.", "choices": list(RATIO_UNITS)}
    )
    ratio_norm: str = field(
        default="sum",
        metadata={"help": "Ratio of the sum or the mean of a unit's log-probabilities.", "choices": list(RATIO_NORMS)},
    )
    aggregation: str = field(
        default="tokens",
        metadata={"help": "How losses of tokens become one number.", "choices": list(AGGREGATIONS)},
    )
    old_policy: str = field(
        default="rescored",
        metadata={"help": "Policy in the denominator of ratios.", "choices": list(OLD_POLICIES)},
    )
    kl_unit: str = field(
        default="token", metadata={"help": "Whether the KL term is of tokens or steps.", "choices": list(KL_UNITS)}
    )
    one_view: bool = field(
        default=True,
        metadata={"help": "Score the views of a completion one after another: less memory, one forward more."},
    )

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, _NOT_SUPPORTED)
        if refused:
            raise ValueError("; ".join(refused))
        check_choice("steps", self.steps, STEPS)
        check_choice("ratio_unit", self.ratio_unit, RATIO_UNITS)
        check_choice("ratio_norm", self.ratio_norm, RATIO_NORMS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("old_policy", self.old_policy, OLD_POLICIES)
        check_choice("kl_unit", self.kl_unit, KL_UNITS)
        self._check_steps()
        super().__post_init__()
        self._check_units()
        check_value(self)
        if self.old_policy == "recorded":
            self._check_recorded()
        if self.old_policy == "none":
            idle = dict.fromkeys(
                ("clip", "delta", "epsilon", "epsilon_high", "self_normalize"), "ratios are 1 with old_policy='none'"
            )
            refused = set_but_not_supported(self, idle)
            if refused:
                raise ValueError("; ".join(refused))
        if self.steps == "flagged" and self.schedule != "threshold":
            raise ValueError(
                f"steps='flagged' is not allowed with schedule={self.schedule!r}; allowed: threshold, which says when "
                "nothing was sure enough"
            )

    def selector(self, spec: DiffusionSpec) -> StepSelector:
        """The steps that these settings choose, of a model's rollouts."""
        count = 1 if self.num_scored_steps is None else self.num_scored_steps
        if self.steps == "all" and spec.attention not in BLOCK_KINDS:
            return AllSteps(self.merge)
        if self.steps in ("all", "block_slices"):
            return BlockSlices(spec, self.merge)
        if self.steps == "segments":
            return Segments(count)
        if self.steps == "sampled":
            return SampledSteps(count, self.step_proposal, self.step_scale)
        if self.steps == "top_entropy":
            return TopEntropy(count)
        if self.steps == "entropy_threshold":
            return EntropyThreshold()
        return Flagged(self.decoding(spec).arguments().threshold)

    def _check_steps(self) -> None:
        if (self.steps in COUNTED) != (self.num_scored_steps is not None):
            asked = "a number, 1 or larger" if self.steps in COUNTED else "None"
            raise ValueError(
                f"num_scored_steps={self.num_scored_steps} is not allowed with steps={self.steps!r}; allowed: {asked}"
            )
        if self.num_scored_steps is not None:
            check_count("num_scored_steps", self.num_scored_steps)
        check_count("merge", self.merge)
        if self.merge != 1 and self.steps not in ("all", "block_slices"):
            raise ValueError(f"merge={self.merge} is not allowed with steps={self.steps!r}; allowed: 1")
        check_choice("step_proposal", self.step_proposal, PROPOSALS)
        check_choice("step_scale", self.step_scale, STEP_SCALES)
        for name, default in (("step_proposal", "uniform"), ("step_scale", "sum")):
            if self.steps != "sampled" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with steps={self.steps!r}; set steps to sampled, or "
                    f"{name} to {default}"
                )

    def _check_units(self) -> None:
        if self.ratio_unit == "token" and self.ratio_norm != "sum":
            raise ValueError(
                f"ratio_norm={self.ratio_norm!r} has no effect with ratio_unit='token'; set it to sum, or ratio_unit "
                "to step or sequence"
            )
        uneven = {
            f"aggregation={self.aggregation!r}": self.aggregation in ("steps", "step_sums"),
            f"steps={self.steps!r}": self.steps == "sampled",
        }
        for setting, is_uneven in uneven.items():
            if self.ratio_unit == "sequence" and is_uneven:
                raise ValueError(
                    f"ratio_unit='sequence' is not allowed with {setting}, by which tokens of a completion differ in "
                    "weight, while one ratio gives all of them the same; choose ratio_unit token or step, or "
                    "another of these"
                )
        if self.kl_unit == "step" and (not self.beta or self.use_bias_correction_kl):
            raise ValueError(
                f"kl_unit='step' is not allowed with beta={self.beta} and use_bias_correction_kl="
                f"{self.use_bias_correction_kl}; it needs a KL term, and none that is multiplied by ratios of tokens"
            )
        if self.kl_unit == "step" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator='k1' is not allowed with kl_unit='step'; choose k2 or k3")

    def _check_recorded(self) -> None:
        """Recorded log-probabilities are those of scores in the same state, at the same temperature."""
        if self.merge != 1 or self.steps == "segments":
            what = f"merge={self.merge}" if self.merge != 1 else "steps='segments'"
            raise ValueError(
                f"old_policy='recorded' is not allowed with {what}: merged steps are scored in other states than those "
                "that their tokens were drawn in; allowed: rescored, none"
            )
        if not self.disable_dropout:
            raise ValueError("old_policy='recorded' is not allowed with disable_dropout=False, which changes scores")
        if self.score_temperature not in (1, self.temperature):
            raise ValueError(
                f"old_policy='recorded' is not allowed with score_temperature={self.score_temperature} and "
                f"temperature={self.temperature}; recorded are log-probabilities at temperature 1 and at that of the "
                "rollout"
            )
        # At temperature 1 they are the model's own, and with guidance those that schedules look at.
        untouched = (*_CHANGES_DRAWS,) if not self.cfg_scale else ("top_p", "top_k")
        names = [name for name in _CHANGES_DRAWS if self.score_temperature != 1 or name not in untouched]
        changed = [name for name in names if getattr(self, name) and getattr(self, name) != _CHANGES_DRAWS[name]]
        if changed:
            raise ValueError(
                f"old_policy='recorded' is not allowed with score_temperature={self.score_temperature}, cfg_scale="
                f"{self.cfg_scale} and {', '.join(f'{name}={getattr(self, name)!r}' for name in changed)}: what is "
                "recorded then is of a distribution that they have changed, and scores are not; leave them out, or set "
                "old_policy to rescored"
            )
