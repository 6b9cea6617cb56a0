"""MDPO (He et al., arXiv 2508.13148): every step's prediction of the whole answer is an action with a reward.

Step s predicts all open slots of the canvas x_{s-1}, of which it keeps some. Filled in, they are an answer xhat_s with
a reward r_s. With r_0 = 0 a step is worth what it gains and what comes after it,

    a_s = r_s - r_{s-1} + mean of r_u over u > s        (the last step: r_S in place of the mean),

and A_s is a_s above its mean in the group at the same step, over its standard deviation. With M_s the open slots, c_i
the probability that their tokens were drawn with and rho_i = p(xhat_i | x_{s-1}) / p_old(xhat_i | x_{s-1}), the loss is

    sum over K steps of  1/|M_s| sum over i in M_s of
        c_i [ -L/|M_s| min(rho_i A_s, clip(rho_i, 1 - epsilon, 1 + epsilon) A_s) + beta KL_i ],

KL_i = (s - s_ref)^2 / 2, all at the rollout's temperature. The K steps are those with the largest sum of |A_s| over the
group: where its answers part. Rollouts are decoded with `rcr`, which masks the least sure tokens again. Prompts that
teach most are those on which a right prediction is lost again on the way (`rl4dlm filter`).

Which steps are among the K depends on rewards, so that this is a choice that has seen the actions: not every expected
gradient is that of the reward. Advantages are centred in each step, which is what bounds it.

Different from the released code:
- The K steps are the same for all of a group; there each process chooses by its own completion.
- c is the probability of a drawn token. There it is what the schedule ranks by, which is 0 for slots that were never a
  candidate, and with its entropy rule negative, so that the loss of these changes its sign.
- A completion's mean is over its own open slots; there it is over those of a micro-batch.
- A batch may be used for several passes (`num_iterations`), with ratios to the policy that decoded it.
- Padding is hidden; dropout is off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import check_count
from rl4dlm.likelihood.predictions import PredictedSteps
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.config import KL_ESTIMATORS, OWN_LOSS, DiffusionPolicyConfig, set_but_not_supported
from rl4dlm.training.loss_parts import PolicyScores, resized
from rl4dlm.training.losses import kl_estimate
from rl4dlm.training.predictions import predicted_steps, recorded_predictions
from rl4dlm.training.trainer import DiffusionPolicyTrainer


@dataclass
class MDPOConfig(DiffusionPolicyConfig):
    """Settings of MDPO; the defaults are those of the paper's command.

    Args:
        num_trained_steps: K, the steps of a completion that are learnt from.
        confidence_weights: whether tokens weigh as much as they were probable when drawn (c).
        schedule, max_completion_length, denoising_steps: the paper's, in one block.
        temperature, score_temperature: of rollouts and scores, which are the same.
        epsilon: clip range, which acts from the second pass over a batch on.
        beta: weight of the KL term; `kl_estimator` k2 is the paper's.
        scale_rewards: `"group"`, since advantages are over a standard deviation.
        one_view: on, since there are K views.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    kl_per_token: ClassVar[bool] = False

    num_trained_steps: int = field(default=8, metadata={"help": "Steps of a completion that are learnt from (K)."})
    confidence_weights: bool = field(
        default=True, metadata={"help": "Weigh predicted tokens by the probability that they were drawn with."}
    )
    schedule: str = field(default="rcr", metadata={"help": "Name of the decoding schedule."})
    max_completion_length: int | None = field(default=512, metadata={"help": "Length of the canvas, in tokens."})
    temperature: float = field(default=0.4, metadata={"help": "Temperature of the rollout."})
    score_temperature: float = field(default=0.4, metadata={"help": "Temperature of scores: that of the rollout."})
    learning_rate: float = field(default=7e-7, metadata={"help": "Learning rate of AdamW, the paper's."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a batch of completions."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.02, metadata={"help": "Weight of the KL term; 0 needs no reference model."})
    kl_estimator: str = field(
        default="k2", metadata={"help": "Estimator of the KL term: k2 or k3.", "choices": list(KL_ESTIMATORS)}
    )
    one_view: bool = field(
        default=True,
        metadata={"help": "Score the views of a completion one after another: less memory, one forward more."},
    )

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, OWN_LOSS)
        if refused:
            raise ValueError("; ".join(refused))
        check_count("num_trained_steps", self.num_trained_steps)
        super().__post_init__()
        if not self.temperature or self.temperature != self.score_temperature:
            raise ValueError(
                f"temperature={self.temperature} is not allowed with score_temperature={self.score_temperature}: "
                "MDPO's scores are of the distribution that predictions are drawn from; set both to the same, above 0"
            )
        if self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not allowed, since the advantages of a step are over their "
                "standard deviation; allowed: group"
            )

    def recorded(self) -> tuple[str, ...]:
        """What each step draws for every open slot."""
        return ("entropy", "fillings", "filling_log_probs")


def step_values(rewards: Tensor) -> Tensor:
    """a_s of the module's docstring, from rewards `[..., S]` of predictions; the same shape."""
    gained = torch.diff(rewards, dim=-1, prepend=torch.zeros_like(rewards[..., :1]))
    after = rewards.flip(-1).cumsum(-1).flip(-1) - rewards
    left = torch.arange(rewards.shape[-1] - 1, -1, -1, device=rewards.device, dtype=rewards.dtype)
    return gained + torch.where(left > 0, after / left.clamp(min=1), rewards)


def step_advantages(rewards: Tensor) -> Tensor:
    """A_s from rewards `[N, G, S]`, NaN where a prediction could not be scored, and so are the row's values there.

    The standard deviation is the unbiased one, and 1e-4 is added to it; 0 where all of a group are worth the same.
    """
    values = step_values(rewards.double())
    above = values - values.nanmean(1, keepdim=True)
    known = ~values.isnan()
    count = known.sum(1, keepdim=True)
    variance = torch.where(known, above, 0.0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    highest = values.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    lowest = values.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    found = above / (variance.sqrt() + 1e-4)
    equal = (highest - lowest <= 1e-9) & known  # sums of rewards have rounding
    return torch.where(equal, torch.zeros_like(found), found)


def chosen_steps(advantages: Tensor, count: int) -> Tensor:
    """long `[N, K]`, the steps with the largest sum of |A| over a group, `[N, G, S]`; of equal ones the earlier."""
    weight = advantages.nan_to_num(nan=0.0).abs().sum(1)
    return weight.argsort(dim=-1, descending=True, stable=True)[:, :count]


class MDPOTrainer(DiffusionPolicyTrainer):
    """MDPO in TRL's GRPO loop; `MDPOConfig` has its settings, the module's docstring the algorithm.

    Reward functions are called once more, with what each step of the batch's completions has predicted.
    """

    config_class = MDPOConfig
    args: MDPOConfig
    estimator: PredictedSteps
    advantages_read_scores = False
    needs_masks = "its actions are predictions of open slots"
    _tag_names = ["trl", "rl4dlm", "mdpo"]  # noqa: RUF012  (TRL's own form)
    _name = "MDPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "MDPO: Overcoming the Training-Inference Divide of Masked Diffusion Language Models",
        "id": "2508.13148",
    }

    def build_estimator(self) -> PredictedSteps:
        """Views of predictions. ValueError for models and schedules whose predictions are not of whole canvases."""
        return predicted_steps(self.spec, self.decoding, "MDPO")

    def extend_batch(self, batch: dict[str, Any], rollout: Rollout, rewards_per_func: Tensor) -> None:
        """Rewards what each step predicted, and adds the chosen steps: what they saw and drew, and what it is worth."""
        trace, device = rollout.trace, self.accelerator.device
        assert trace.filling_log_probs is not None
        local, length = rollout.canvas.shape
        made = torch.tensor([int(trace.steps.max())], device=device)
        steps = int(self.accelerator.gather(made).max())
        found_here = recorded_predictions(rollout)  # of this process
        shown, fillings, log_probs = found_here.shown, found_here.drawn, trace.filling_log_probs[:, :, 0]
        ours = self.rewards_of_canvases(rollout, found_here.completed(rollout.canvas))  # [B, S]
        ours = torch.cat([ours, ours[:, -1:].expand(-1, steps - ours.shape[1])], dim=1)  # of rows that have ended
        size = self.num_generations if self.model.training else self.num_generations_eval
        found = self.accelerator.gather(ours.contiguous()).view(-1, size, steps)  # [N, G, S]
        best, last = found.nan_to_num(nan=-torch.inf).amax(-1), found[..., -1]
        self.log_mean("diffusion/lost_answer_share", best > last, torch.ones_like(last))
        advantages = step_advantages(found).nan_to_num(nan=0.0)
        chosen = chosen_steps(advantages, self.args.num_trained_steps)  # [N, K]
        first = self.accelerator.process_index * local
        own = (first + torch.arange(local, device=device)) // size
        at = chosen[own]  # [B, K]
        batch["prediction_advantages"] = advantages.flatten(0, 1)[first : first + local].gather(-1, at)
        place = at.clamp(max=shown.shape[1] - 1)[..., None].expand(-1, -1, length)
        ended = (trace.steps[:, None] <= at)[..., None]
        shown, predicted, drawn = (value.to(device).gather(1, place) for value in (shown, fillings, log_probs))
        mask = self.estimator.mask_token_id
        opened = (shown == mask) & ~ended
        batch["step_states"] = torch.where(opened | (shown != mask), shown, rollout.canvas[:, None])
        batch["step_predictions"] = torch.where(opened, predicted, batch["step_states"])
        batch["step_confidence"] = torch.where(opened, drawn.exp(), 0.0)
        # What `diffusion/rollout_gap` is of: the first of the chosen steps.
        batch["drawn_log_probs"], batch["drawn"] = drawn[:, 0], opened[:, 0]

    def compared(self, scores: PolicyScores) -> Tensor:
        """Log-probabilities `[B, K, L]` of predicted tokens."""
        assert scores.view_log_probs is not None
        return scores.view_log_probs

    def as_drawn(self, scores: PolicyScores, width: int) -> tuple[Tensor, Tensor | None]:
        """Those of the first chosen step."""
        assert scores.views is not None
        return resized(self.compared(scores)[:, 0], width), resized(scores.views.scored[:, 0], width)

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with an advantage at some step, unless there is a KL term."""
        if self.args.beta:
            return None
        return self.with_mates((batch["prediction_advantages"] != 0).any(-1) & batch["completion_mask"].any(-1), batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The loss of the module's docstring."""
        assert scores.views is not None
        log_probs, opened = self.compared(scores), scores.views.scored
        rows = batch["completion_mask"].any(-1)  # false: left out, because it was cut off
        opened = opened & rows[:, None, None]
        count = opened.sum(-1, keepdim=True).clamp(min=1)
        advantages = batch["prediction_advantages"][..., None].to(log_probs)
        log_ratio = self.log_ratio_to("old", log_probs, batch)
        length = log_probs.shape[-1]
        losses = self.surrogate(log_ratio, log_probs, advantages, opened, batch) * length / count
        if self.args.beta:
            other = self.log_ratio_to(self.args.kl_target, log_probs, batch)
            divergence = kl_estimate(other, self.args.kl_estimator)
            losses = losses + self.args.beta * divergence
            self.log_mean("kl", divergence, opened)
        if self.args.confidence_weights:
            losses = losses * batch["step_confidence"].to(losses)
        self.log_clipped(log_ratio, advantages, opened)
        self.log_mean("entropy", scores.entropies, resized(opened.any(1), scores.entropies.shape[1]))
        return self.mean_over_rows((torch.where(opened, losses, 0.0).sum(-1, keepdim=True) / count).flatten(1).sum(-1))
