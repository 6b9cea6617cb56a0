"""Settings of algorithms that train an unmasking policy on the steps it chose, and what of them goes together.

Owns validation. The trainer is `rl4dlm.training.unmasking`'s, policies are `rl4dlm.rollout.policies`'.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.trajectory_settings import STEPS, TrajectoryConfig

KINDS = ("upm", "linear")
CHOSEN_STEPS = ("all", "sampled")
"""Choices of steps that are scored one by one, whatever comes of them."""


@dataclass
class UnmaskingConfig(TrajectoryConfig):
    """Settings of an unmasking policy that is trained, alone or with the model.

    Args:
        policy_path: a saved policy to start from, the file or its folder; None: that of the model's folder, or else a
            new one.
        policy_kind: of a new one: `"upm"`, LLaDOU's module, or `"linear"`. None: `"upm"`, or that of the policy there
            is, whose settings the others must be, too, if they are given.
        policy_layers: transformer blocks of the module; None: 1. policy_heads: of their attention; None: 8.
        policy_frequencies: of its time embedding; None: 256.
        policy_learning_rate: of the policy, which is a group of its own in the optimizer; None: `learning_rate`.
        train_denoiser: whether the model learns, too, or the policy alone.
        score_temperature: must be that of the rollout, or scores would not be what was drawn with; None: it is.
        scope: the whole `"canvas"`: what was drawn behind the end was drawn, too, and the trajectory's density has it.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    schedule: str = field(
        default="learned_order", metadata={"help": "Name of the decoding schedule; it must ask the policy."}
    )
    steps: str = field(default="all", metadata={"help": "Recorded steps that are scored.", "choices": list(STEPS)})
    policy_path: str | None = field(
        default=None, metadata={"help": "Saved unmasking policy to start from. Default: the model's, or a new one."}
    )
    policy_kind: str | None = field(
        default=None, metadata={"help": "Kind of a new policy: upm or linear.", "choices": list(KINDS)}
    )
    policy_layers: int | None = field(default=None, metadata={"help": "Transformer blocks of a new policy."})
    policy_heads: int | None = field(default=None, metadata={"help": "Heads of their attention."})
    policy_frequencies: int | None = field(default=None, metadata={"help": "Frequencies of its time embedding."})
    policy_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the policy. Default: that of the model."}
    )
    train_denoiser: bool = field(default=True, metadata={"help": "Train the model, too, and not the policy alone."})
    score_temperature: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Divides the logits that scores are computed from; the rollout's temperature."}
    )
    scope: str = field(
        default="canvas", metadata={"help": "Tokens that are scored: valid or canvas.", "choices": ["valid", "canvas"]}
    )
    stop_at_eos: bool = field(
        default=False, metadata={"help": "Stop a row once everything up to its first end-of-sequence token is written."}
    )

    def __post_init__(self) -> None:
        if self.score_temperature is None:
            self.score_temperature = self.temperature
        if self.score_temperature != self.temperature or not self.temperature > 0:
            raise ValueError(
                f"score_temperature={self.score_temperature} is not allowed with temperature={self.temperature}: steps "
                "are scored with the density that they were drawn with; temperature must be larger than 0, and "
                "score_temperature None or the same"
            )
        check_choice("steps", self.steps, CHOSEN_STEPS)
        for name, allowed in (("merge", 1), ("value_model", "none"), ("beta", 0), ("cfg_scale", 0)):
            if getattr(self, name) != allowed:
                reason = {
                    "merge": "merged steps made choices in other states than they are scored in",
                    "value_model": "there is no value head beside a policy",
                    "beta": "the reference has no policy to compare choices with",
                    "cfg_scale": "the policy has no states under guidance",
                }[name]
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {reason}; allowed: {allowed!r}")
        if self.old_policy == "recorded":
            raise ValueError(
                "old_policy='recorded' is not supported: recorded log-probabilities are those of tokens, without their "
                "places; allowed: rescored, none"
            )
        if self.rollout_backend != "in_process":
            raise ValueError(
                f"rollout_backend={self.rollout_backend!r} is not supported: the server does not get the policy that "
                "is trained; allowed: in_process"
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True is not supported: the policy would not be loaded; set it to False"
            )
        if self.defer_token_ids:
            raise ValueError(
                f"defer_token_ids={self.defer_token_ids} is not supported: slots would be chosen by what was drawn "
                "there; leave it out"
            )
        if isinstance(self.schedule_args, dict) and self.schedule_args.get("policy") is not None:
            raise ValueError(
                "schedule_args with a policy is not supported: the policy that is trained is the one that is asked; "
                "set policy_path"
            )
        if self.policy_kind is not None:
            check_choice("policy_kind", self.policy_kind, KINDS)
        if self.policy_kind == "linear":
            for name in ("policy_layers", "policy_heads", "policy_frequencies"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with policy_kind='linear'; leave it out"
                    )
        if self.policy_layers == 0 and self.policy_heads is not None:
            raise ValueError(f"policy_heads={self.policy_heads} has no effect with policy_layers=0; leave it out")
        rate = self.policy_learning_rate
        if rate is not None and not 0 <= rate < float("inf"):
            raise ValueError(f"policy_learning_rate={rate} is not allowed; it must be 0 or larger, or None")
        super().__post_init__()

    @property
    def policy_settings(self) -> dict[str, int]:
        """Settings of the module that are given, by its own names."""
        named = {"layers": self.policy_layers, "heads": self.policy_heads, "frequencies": self.policy_frequencies}
        return {name: value for name, value in named.items() if value is not None}
