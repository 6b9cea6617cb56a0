"""RL for an unmasking policy beside a model that stays as it is: what is learnt is where to write, not what.

Rollouts are decoded by the model under the schedule that asks the policy; what the policy saw, what it could choose
from and what it chose is recorded (`record=("policy",)`), and an update shows it the same again. So an update makes no
forward of the model, and the log-probabilities of the old policy are those at which choices were drawn, exactly.

With f the forwards that a completion took (those of guidance not counted), L its slots and r its weighted reward,

    R = r ((L - f + 1) / L)^alpha        (`speed="product"`),
    R = r - alpha f / L                  (`speed="additive"`),           R = r        (`speed="none"`),

A = R less its group's mean, over a standard deviation if `scale_rewards` says so, and rho = pi(choice) / pi_old(choice)
of a step at which the policy was asked, the loss of a completion is the mean, or sum, over such steps of

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) - policy_entropy * entropy of the choice.

A product pays no answer that is wrong, however fast. Reward functions see how completions were decoded, too
(`rewards/speed.py`), but have no settings of their own; one of those beside `speed="none"` is as good.

The policy rides on the model, in no state dictionary of it, and is saved beside it (`rl4dlm.rollout.policies`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.policies.policy import UnmaskingPolicy, attach_policy
from rl4dlm.rollout.policies.saving import POLICY_FILE, load_policy, load_weights, policy_of
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.tasks.base import Task
from rl4dlm.training.advantages import scaled
from rl4dlm.training.config import OWN_LOSS, set_but_not_supported
from rl4dlm.training.credit.credit import Credit
from rl4dlm.training.loss_parts import PolicyScores
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer

SPEEDS = ("product", "additive", "none")
STEP_AVERAGES = ("mean", "sum")
NUMBERS_AT_ONCE = 2**22
"""What the policy is shown at once in an update, in numbers; more is shown in parts, which are computed twice."""

_NO_SCORES = "no token is scored: the model is frozen, and its policy's choices are what is learnt from"
_NOT_SUPPORTED = {
    **OWN_LOSS,
    **dict.fromkeys(
        (
            "beta", "kl_estimator", "kl_target", "score_temperature", "one_view", "views_keyed_by", "scope",
            "self_normalize", "sync_ref_model",
        ),
        _NO_SCORES,
    ),
    "rollout_backend": "the policy decides in this process, while the model decodes",
    "load_best_model_at_end": "transformers would load the model again, and not the policy",
}  # fmt: skip


@dataclass
class FrozenModelConfig(DiffusionPolicyConfig):
    """Settings of trainers of unmasking policies: those of `DiffusionPolicyConfig`, with these added.

    Args:
        policy_path: a saved policy to start from, the file or its folder; None: that of the model's folder, or else a
            new one.
        policy_temperature: T, which divides utilities in draws and in the loss.
        speed: how forwards count in the reward, see the module. speed_alpha: alpha.
        step_average: `"mean"` or `"sum"`, over the steps at which the policy was asked.
        policy_entropy: weight of the entropy of choices; 0: none.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    own_schedule: ClassVar[str] = ""
    """Name of the schedule that asks the policy."""
    own_arguments: ClassVar[tuple[str, ...]] = ("policy", "policy_temperature")
    """Those of its arguments that have settings of their own here."""

    policy_path: str | None = field(
        default=None, metadata={"help": "Saved unmasking policy to start from. Default: the model's, or a new one."}
    )
    policy_temperature: float = field(
        default=1.0, metadata={"help": "Divides the policy's utilities, in draws and in the loss."}
    )
    speed: str = field(
        default="product",
        metadata={"help": "How forwards count in the reward: product, additive or none.", "choices": list(SPEEDS)},
    )
    speed_alpha: float = field(default=1.0, metadata={"help": "Exponent, or weight, of speed in the reward."})
    step_average: str = field(
        default="mean",
        metadata={"help": "How losses of a completion's steps are put together.", "choices": list(STEP_AVERAGES)},
    )
    policy_entropy: float = field(default=0.0, metadata={"help": "Weight of the entropy of the policy's choices."})
    beta: float = field(default=0.0, metadata={"help": "Refused: no token is scored."})

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, _NOT_SUPPORTED)
        if refused:
            raise ValueError("; ".join(refused))
        check_choice("speed", self.speed, SPEEDS)
        check_choice("step_average", self.step_average, STEP_AVERAGES)
        for name in ("speed_alpha", "policy_entropy"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be 0 or larger")
        if self.speed == "none" and self.speed_alpha != type(self).speed_alpha:
            raise ValueError(f"speed_alpha={self.speed_alpha} has no effect with speed='none'; leave it out")
        if not 0 < self.policy_temperature < float("inf"):
            raise ValueError(
                f"policy_temperature={self.policy_temperature} is not allowed; it must be larger than 0: where nothing "
                "is drawn nothing is learnt"
            )
        if self.schedule != self.own_schedule:
            raise ValueError(
                f"schedule={self.schedule!r} is not allowed; it must be {self.own_schedule!r}, which asks the policy"
            )
        super().__post_init__()

    def recorded(self) -> tuple[str, ...]:
        """What the policy saw and chose."""
        return ("policy",)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the schedule that follow from settings of their own, for a policy that is not there yet."""
        return {"policy_temperature": self.policy_temperature}

    def decoding(self, spec: DiffusionSpec | None = None, **recorded: Any) -> DecodingConfig:
        """As everywhere, with what the schedule is told of the policy, but for the policy itself."""
        given = self.schedule_args if isinstance(self.schedule_args, dict) else {}
        taken = sorted(set(given) & set(self.own_arguments))
        if taken:
            raise ValueError(
                f"schedule_args has {', '.join(taken)}, for which there are settings of the trainer; leave "
                f"{'it' if len(taken) == 1 else 'them'} out"
            )
        return super().decoding(spec, **recorded).with_arguments(**self.arguments())


class FrozenModelTrainer(DiffusionPolicyTrainer):
    """RL for an unmasking policy beside a frozen model, in TRL's GRPO loop.

    An algorithm says what a new policy is (`build_policy`) and what its choices' log-probabilities are (`choices`).
    The model is frozen in place; `policy` is what is trained.
    """

    config_class: type[FrozenModelConfig] = FrozenModelConfig
    args: FrozenModelConfig
    policy: UnmaskingPolicy
    uses_old_policy = False
    advantages_read_scores = False
    needs_masks = "its tokens may change until the last step, so that there are no slots to be written for good"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("peft_config") is not None:
            raise TypeError("peft_config is not supported: the model is frozen, so that an adapter would learn nothing")
        if any(part is not None for part in kwargs.get("optimizers") or ()):
            raise ValueError("optimizers=... is not supported: they do not know the policy, which is made here")
        super().__init__(*args, **kwargs)
        if self.intervention is not None or self.credit is not None:
            raise TypeError(
                f"intervention and credit are not supported by {type(self).__name__}, which learns from choices"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{type(self).__name__} is not supported under FSDP and DeepSpeed: the policy's gradients are added up "
                "here; use DDP"
            )
        self.model.requires_grad_(False)
        attach_policy(self.model, self.policy).requires_grad_(True)

    # --- what an algorithm defines ------------------------------------------------------------------------------------

    @abstractmethod
    def build_policy(self) -> UnmaskingPolicy:
        """A new policy with its first weights, from `self.args`."""

    @abstractmethod
    def check_policy(self, policy: UnmaskingPolicy) -> None:
        """Raises ValueError for a saved policy that is another one than the settings say."""

    @property
    def first_policy(self) -> str:
        """Which saved policy it starts from, for errors about it."""
        path = self.args.policy_path
        return f"the unmasking policy of the model ({POLICY_FILE})" if path is None else f"policy_path={path!r}"

    def check_sizes(self, policy: UnmaskingPolicy, **named: str) -> None:
        """Raises ValueError for settings of a new policy that were set, and that a saved one does not have.

        Args:
            named: for each of the policy's settings the name that it has here.
        """
        for setting, name in named.items():
            value, own = getattr(self.args, name), policy.settings[setting]
            if value not in (own, getattr(type(self.args), name)):
                raise ValueError(
                    f"{name}={value!r} contradicts {self.first_policy}, which has {own!r}; leave it out, or start from "
                    "another policy"
                )

    @abstractmethod
    def choices(self, features: Tensor, allowed: Tensor, chosen: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies `[n]` of choices under the policy as it is.

        Args:
            features: `[n, ...]`, what it saw. allowed, chosen: bool `[n, A]`, what it could and did choose.
            time: `[n]`, steps made before over the slots of the canvas.
        """

    # --- decoding -----------------------------------------------------------------------------------------------------

    def _decoding_for(self, credit: Credit | None) -> DecodingConfig:
        found = super()._decoding_for(credit)
        path = self.args.policy_path
        first = policy_of(self.model) if path is None else load_policy(path)
        if first is None:
            self.policy = self.build_policy()
        else:
            self.check_policy(first)
            self.policy = first.to(torch.float64)
        return self._decided_by(found, self.policy)

    def _decided_by(self, decoding: DecodingConfig, policy: Any, **arguments: Any) -> DecodingConfig:
        """Settings with a policy, or None for the model's, in the place of what stands for it until it is there."""
        return decoding.with_arguments(policy=policy, **arguments)

    def _set_check(self, task: Task, split: str, limit: int | None, decodings: Any, spec: DiffusionSpec) -> None:
        # What is measured at temperature 0 is greedy in all that is chosen.
        chosen = {
            label: config if config.temperature else config.with_arguments(policy_temperature=0)
            for label, config in decodings.items()
        }
        super()._set_check(task, split, limit, chosen, spec)

    @property
    def shown_decoding(self) -> DecodingConfig:
        """As the model's card shows it: greedy, by the policy that is saved with the model."""
        return self._decided_by(self.decoding, None, policy_temperature=0)

    # --- learning -----------------------------------------------------------------------------------------------------

    def build_estimator(self) -> Estimator:
        """One that is never asked."""
        return MeanField(0.0, self.args.scope)

    def extend_batch(self, batch: dict[str, Any], rollout: Rollout, rewards_per_func: Tensor) -> None:
        """Adds the number of forwards of each completion, those of guidance not counted."""
        forwards = rollout.nfe.double() / (1 + (self.args.cfg_scale > 0))
        batch["forwards"] = forwards.to(batch["canvas_ids"].device)

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        """A of the module's docstring."""
        forwards = self.of_all_processes(batch["forwards"]).to(rewards.device)
        found = with_speed(rewards.double(), forwards, batch["canvas_ids"].shape[1], self.args)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["unmasking/reward"].append(found.nanmean().item())
        return scaled(found - found.nanmean(-1, keepdim=True), found, self.args.scale_rewards)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        features, allowed, chosen = (inputs[f"policy_{name}"] for name in ("features", "allowed", "chosen"))
        asked = allowed.any(-1) & inputs["completion_mask"].any(-1, keepdim=True)  # [B, S]
        rows, steps = asked.nonzero(as_tuple=True)
        time = steps.double() / inputs["canvas_ids"].shape[1]
        found = self._in_parts(features[rows, steps], allowed[rows, steps], chosen[rows, steps], time)
        log_probs, entropies = (torch.zeros_like(asked, dtype=v.dtype).index_put((rows, steps), v) for v in found)
        return self.loss(PolicyScores(log_probs, entropies), {**inputs, "asked": asked})

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch, of the module's docstring.

        Args:
            scores: log-probabilities and entropies of choices, `[B, S]` both, of the policy as it is.
            batch: with `asked`, bool `[B, S]`, steps at which there was something to choose.
        """
        log_probs, asked = scores.log_probs, batch["asked"]
        log_ratio = torch.where(asked, log_probs - batch["selection_log_probs"].to(log_probs), 0.0)
        advantages = batch["advantages"][:, None].to(log_probs)
        self.note({"advantage": advantages, "log-probability of a choice": log_probs}, batch["row_ids"])
        gain = self.args.policy_entropy * scores.entropies
        losses = self.surrogate(log_ratio, log_probs, advantages, asked, batch) - gain
        losses = torch.where(asked, losses, 0.0).sum(-1)
        if self.args.step_average == "mean":
            losses = losses / asked.sum(-1).clamp(min=1)
        self.log_clipped(log_ratio.detach(), advantages, asked)
        counted = asked.to(log_probs)
        self.log_mean("unmasking/entropy", scores.entropies, counted)
        self.log_mean("unmasking/chosen", batch["policy_chosen"].sum(-1), counted)
        if not self.model.training or self._step // self.args.steps_per_generation % self.num_iterations == 0:
            self.log_mean("unmasking/replay_gap", log_ratio.abs(), counted)
        return self.mean_over_rows(losses)

    def _in_parts(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        """`choices` of n states, a part at a time where they are many: of such parts only what goes in is kept."""
        size = max(1, NUMBERS_AT_ONCE // max(1, states[0][:1].numel() * self._width))
        if len(states[0]) <= size:
            return self.choices(*states)
        ask: Callable[..., tuple[Tensor, Tensor]] = self.choices
        each = zip(*(state.split(size) for state in states), strict=True)
        parts = [checkpoint(ask, *part, use_reentrant=False) for part in each]
        log_probs, entropies = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies)

    @property
    def _width(self) -> int:
        """Of the widest layer."""
        return max(weight.shape[0] for weight in self.policy.parameters())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As everywhere; processes add up the policy's gradients, which is not asked through the wrapped model."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for weight in self.policy.parameters():
                local = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(local, reduction="mean")
        return loss

    # --- saving and resuming ------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_weights(self.policy, checkpoint)


def with_speed(rewards: Tensor, forwards: Tensor, slots: int, args: FrozenModelConfig) -> Tensor:
    """R of the module's docstring, of the shape of `rewards`; NaN where there is no reward.

    Args:
        rewards, forwards: `[N, G]`. slots: L.
    """
    if args.speed == "none":
        return rewards
    if args.speed == "additive":
        return rewards - args.speed_alpha * forwards / slots
    return rewards * ((slots - forwards + 1) / slots).clamp(min=0) ** args.speed_alpha
