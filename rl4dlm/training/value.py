"""Value models for trajectory algorithms: advantages of steps or blocks, the value loss, and a head that is trained.

Values are those of states that the policy is scored in, from the same forward (`rl4dlm.models.value_head`). With V_j
what the head makes of the state that token j is predicted from, r_t what step t earns, V*_t the mean of V_j over the
tokens of step t by the policy that wrote the completion, and nothing behind the last step, TraceRL (arXiv 2509.06949)
has for step t, and for its tokens j,

    R*_t = r_t + gamma R*_{t+1},             A*_t = r_t - V*_t + gamma V*_{t+1} + gamma lambda A*_{t+1},
    R_j  = R*_t,                             A_j  = A*_t + V*_t - V_j,
    loss = mean over tokens of  max((V_j - R_j)^2, (V_j^old + clip(V_j - V_j^old, -eps, eps) - R_j)^2) / 2.

Every state that has a value is one before the step that its advantage is of, never one after: with lambda = gamma = 1,
where A_j = R - V_j, the policy gradient is the plain one whatever the head says (enumerated in the tests). Means over
the tokens of a step leave out those behind the end, and so know a little of where it will be; with these settings only
the values of blocks are such means.

`value_model="blocks"` has blocks for steps. The state of a block is that before its first step; the tokens written then
carry its value and its loss, which counts as much as the block has tokens, and all of its tokens have its advantage.
CAPR (arXiv 2606.04396) has such a head, and spreads the reward over blocks by the tokens revealed in each
(`value_rewards="revealed"`); its formulas were not to be read, and these are ours. What earlier blocks have earned is
no advantage of later ones, so that spreading favours early blocks.

Different from TraceRL's code: its value model is a second network as large as the policy; here the head reads the
policy's own states, and costs no forward. Its loss is a sum over tokens, divided by the canvas, here it is the mean
over the tokens of a batch. Where a reward could not be told, nothing is learnt from the completion.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer

from rl4dlm.likelihood.steps import dense
from rl4dlm.models.value_head import ValueHead, attach_value_head
from rl4dlm.training.contract import check_contract
from rl4dlm.training.interventions.intervention import Intervention
from rl4dlm.training.loss_parts import PolicyScores
from rl4dlm.training.trainer import DiffusionPolicyTrainer
from rl4dlm.training.value_settings import ValueConfig

check_contract(
    Trainer,
    parameters={
        "_clip_grad_norm": ["model"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_save": ["output_dir", "state_dict"],
        "create_optimizer": ["model"],
    },
)


class Valued(NamedTuple):
    """What values make of tokens, all `[B, C]`, without gradients."""

    advantages: Tensor
    returns: Tensor  # what V_j should be
    weight: Tensor  # what the value loss of a token counts for; 0 where it has none


def advantage_estimates(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A*_t and R*_t of the module's docstring (GAE, arXiv 1506.02438).

    Args:
        rewards, values: `[B, K]` of K steps, 0 behind a row's last.

    Returns:
        Advantages and returns, `[B, K]`.
    """
    nothing = torch.zeros_like(values[:, 0]) if values.shape[1] else values.new_zeros(len(values))
    advantage, earned, following = nothing, nothing, nothing
    advantages, returns = [], []
    for step in reversed(range(values.shape[1])):
        earned = rewards[:, step] + gamma * earned
        advantage = rewards[:, step] - values[:, step] + gamma * following + gamma * lam * advantage
        following = values[:, step]
        advantages.append(advantage)
        returns.append(earned)
    if not advantages:
        return torch.zeros_like(values), torch.zeros_like(values)
    return torch.stack(advantages[::-1], dim=1), torch.stack(returns[::-1], dim=1)


def earned_at(reward: Tensor, tokens: Tensor, kind: str) -> Tensor:
    """r_t `[B, K]` from rewards `[B]` and the numbers `[B, K]` of tokens of each step, none of them before the last 0.

    Args:
        kind: `"end"`, all of it by the last step, or `"revealed"`, by tokens.
    """
    if kind == "revealed":
        return reward[:, None] * tokens / tokens.sum(-1, keepdim=True).clamp(min=1)
    last = (tokens > 0).sum(-1, keepdim=True) - 1
    return torch.where(torch.arange(tokens.shape[1], device=tokens.device) == last, reward[:, None], 0.0)


def step_gains(step_rewards: Tensor, reward: Tensor, steps: int) -> Tensor:
    """r_t `[B, K]`, what the state behind each step is worth more than the one before it; they add up to R - r_1.

    Args:
        step_rewards: `[B, K']`, what the state before each step is worth; NaN, or not there, behind a row's last. What
            could not be told is worth as much as the next that could.
        reward: R `[B]`, what the completion is worth. steps: K.
    """
    given = torch.nn.functional.pad(step_rewards, (0, max(0, steps - step_rewards.shape[1])), value=torch.nan)
    behind, gains = reward, []
    for step in reversed(range(given.shape[1])):
        before = torch.where(given[:, step].isnan(), behind, given[:, step])
        gains.append(behind - before)
        behind = before
    return torch.stack(gains[::-1], dim=1)[:, :steps]


def valued_tokens(
    values: Tensor, unit: Tensor, rewards: Tensor, *, gamma: float, lam: float, lead: Tensor | None = None
) -> Valued:
    """Advantages and returns of tokens, from the values of the states that they are predicted from.

    Args:
        values: `[B, C]`. unit: long `[B, C]`, the number of the step or block of a token, without gaps; -1 where it has
            none. rewards: `[B, K]`, what each of them earns.
        lead: bool `[B, C]`, the tokens whose values are that of their unit, all of whose tokens then have its
            advantage. None: a token has a value of its own, and the unit their mean.
    """
    there = unit >= 0
    own = there if lead is None else there & lead
    place, counted = unit.clamp(min=0), own.to(values.dtype)
    empty = values.new_zeros(len(values), rewards.shape[1])
    tokens = empty.scatter_add(-1, place, there.to(values.dtype))
    leads = empty.scatter_add(-1, place, counted)
    mean = empty.scatter_add(-1, place, values * counted) / leads.clamp(min=1)
    advantages, returns = advantage_estimates(rewards.to(values), mean, gamma=gamma, lam=lam)
    found = advantages.gather(-1, place)
    if lead is None:
        found = found + mean.gather(-1, place) - values
    weight = (tokens / leads.clamp(min=1)).gather(-1, place) * counted
    return Valued(torch.where(there, found, 0.0), returns.gather(-1, place) * there, weight)


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """The loss of each value, in the shape of all of them; `clip` is eps of the module's docstring."""
    losses = (values - returns) ** 2
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        losses = torch.maximum(losses, (near - returns) ** 2)
    return losses / 2


def variance_sums(values: Tensor, returns: Tensor, weight: Tensor) -> Tensor:
    """What `variance_share` needs of values and returns, float64 `[5]`; those of several processes may be added."""
    error = returns - values
    parts = [torch.ones_like(weight), returns, returns**2, error, error**2]
    return torch.stack([(weight * part).sum() for part in parts]).double()


def variance_share(sums: Tensor) -> float | None:
    """1 - Var(R - V) / Var(R) from `variance_sums`; None where the returns are all the same."""
    count, first, second, error, squared = (float(value) for value in sums)
    if count <= 0:
        return None
    variance = second / count - (first / count) ** 2
    if variance <= 1e-12 * max(1.0, second / count):
        return None
    return 1 - (squared / count - (error / count) ** 2) / variance


class ValuedTrainer(DiffusionPolicyTrainer):
    """A trainer whose policy may have a value head, trained with it, saved and resumed."""

    config_class: type[ValueConfig] = ValueConfig
    args: ValueConfig
    value_head: ValueHead | None = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ValueConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        intervention: Intervention | None = None,
        **kwargs: Any,
    ) -> None:
        given = model, reward_funcs, args, train_dataset, eval_dataset, processing_class, intervention
        super().__init__(*given, **kwargs)
        if self.args.value_model == "none":
            return
        setting = f"value_model={self.args.value_model!r}"
        if self.is_fsdp_enabled or self._dist.is_zero3:
            raise ValueError(
                f"{setting} is not supported under FSDP and ZeRO-3, which shard the head; use DDP or ZeRO-2"
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise ValueError(
                f"{setting} is not supported with an optimizer in DeepSpeed's configuration; remove it there"
            )
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(f"{setting} is not supported with optimizers=..., which do not know the value head")
        if self.args.load_best_model_at_end:
            raise ValueError(f"{setting} is not supported with load_best_model_at_end=True; set it to False")
        self.value_head = attach_value_head(self.model, trains_trunk=self.args.value_trains_trunk)

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        """With a value model."""
        return self.args.value_model != "none"

    # --- learning -----------------------------------------------------------------------------------------------------

    def valued(
        self, scores: PolicyScores, unit: Tensor, blocks: Tensor | None, batch: dict[str, Any]
    ) -> tuple[Valued, Tensor]:
        """Advantages of tokens, and the weighted value loss.

        Args:
            scores: with values. unit: long `[B, C]`, the number of the step of each token that counts, -1 elsewhere.
            blocks: long `[B, C]`, its block in the canvas, where blocks have values.
            batch: with `value_rewards` `[B]`, NaN where one could not be told, and `step_rewards` if there are any.
        """
        assert scores.values is not None
        args, counted = self.args, unit >= 0
        kept = batch.get("old_values")
        old = scores.values.detach() if kept is None else kept.to(scores.values)
        reward = batch["value_rewards" if args.value_target == "reward" else "advantages"].to(old)
        known = ~reward.isnan() & ~batch["value_rewards"].isnan()
        reward = torch.where(known, reward, 0.0)
        unit, lead = dense(unit, counted), None
        if blocks is not None:
            earliest = torch.full_like(unit, torch.iinfo(unit.dtype).max)
            within = dense(blocks, counted)
            first = earliest.scatter_reduce(-1, within.clamp(min=0), torch.where(counted, unit, earliest), "amin")
            lead, unit = unit == first.gather(-1, within.clamp(min=0)), within
        count = max(int(unit.amax()) + 1, 1) if unit.numel() else 1
        tokens = old.new_zeros(len(unit), count).scatter_add(-1, unit.clamp(min=0), counted.to(old))
        if batch.get("step_rewards") is not None:
            rewards = step_gains(batch["step_rewards"].to(old), reward, count)
        else:
            rewards = earned_at(reward, tokens, args.value_rewards)
        found = valued_tokens(old, unit, rewards, gamma=args.gae_gamma, lam=args.gae_lambda, lead=lead)
        advantages = torch.where(found.advantages < 0, args.negative_advantage_weight, 1.0) * found.advantages
        known = known[:, None].to(old)
        found = Valued(advantages * known, found.returns, found.weight * known)
        losses = value_losses(scores.values, old, found.returns, args.value_clip)
        self.log_mean("diffusion/value_loss", losses, found.weight)
        sums = variance_sums(old, found.returns, found.weight)
        share = variance_share(self.accelerator.reduce(sums, reduction="sum"))
        if share is not None:
            self._metrics["train" if self.model.training else "eval"]["diffusion/explained_variance"].append(share)
        return found, args.value_loss_weight * self.mean_over_tokens(losses, found.weight, batch)

    def create_optimizer(self, model: Any = None) -> Any:
        """Transformers', with one group more."""
        if self.value_head is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self.value_head.requires_grad_(False)  # or its weights would be among the others
        optimizer = super().create_optimizer(model)
        self.value_head.requires_grad_(True)
        optimizer.add_param_group(
            {"params": [self.value_head.weight], "lr": self.args.value_learning_rate, "weight_decay": 0.0}
        )
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        # Errors of values would otherwise shrink the policy's gradient. DeepSpeed clips all of them together.
        head = self.value_head
        if head is None or self.is_deepspeed_enabled or head.weight.grad is None:
            return super()._clip_grad_norm(model)
        gradient, head.weight.grad = head.weight.grad, None
        norm = super()._clip_grad_norm(model)
        head.weight.grad = gradient
        own = torch.nn.utils.clip_grad_norm_(head.parameters(), self.args.max_grad_norm)
        self.note({"gradient of the value head": own})
        return norm

    # --- saving and resuming ------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.value_head is not None and self.args.should_save:
            self.value_head.save(self.args.output_dir if output_dir is None else output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # After DeepSpeed has read its own files, where each process has a part of the head.
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.value_head is not None and checkpoint is not None:
            self.value_head.load(checkpoint)
