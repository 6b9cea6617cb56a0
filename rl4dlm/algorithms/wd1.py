"""wd1: weighted log-likelihoods of good and bad completions, without policy ratios (arXiv 2507.08838).

With r_i - mean the reward of completion i less its group's mean, softmax over the group, and S(y) the mean-field
score of a completion (all of it hidden, prompt tokens with probability p; summed over the tokens in `scope`),

    w+_i = softmax_i(psi (r_i - mean)),    w-_i = softmax_i(-psi (r_i - mean))
    loss = -sum_i (w+_i - s w-_i) S(y_i)             over a group; the mean over groups.

Only the current policy is scored. The paper derives psi = 1 / (lambda + beta) from penalties towards the old policy and
a reference, and runs with psi = 1 and without a reference, as here. s = 0 leaves the positive part, advantage-weighted
regression (the paper's ablation wd1-P, which learns little).

Decided differently from the released code: the softmax is over complete groups, wherever their completions are, where
the code takes the rows of a device, which are one group with its settings; `weights_over="batch"` is the sum over all
groups of its section 3.2. The loss is the mean over groups, as there; equation 9 divides by the group size, too. Scores
have no dropout, and each pass over a batch its own prompt masks, also when gradients are accumulated.

wd1++ (`num_predicted_steps` K > 0) learns from what the steps on the way predicted, too. Step l of S sees the canvas
x_l, of which the share t_l is open, and draws an answer for all of it at once, xhat_l; that of the last step is the
completion. All G S answers of a group are rewarded, and weighed by the same two softmaxes; with K steps l of each
completion, drawn uniformly and evenly spread,

    loss = -sum_i S/K sum_l (w+_il - s w-_il) / t_l  log p(xhat_il | x_il),

log p the sum over slots that were open, up to the first end in `scope="valid"`, each predicted from x_il, which hides
no prompt token. With one step it is wd1. No code was released, and what the paper leaves open is decided here: its
factor L_s / l is 1 / t_l, so that what counts is how much was open and not how many steps there were; the sum over l is
estimated, so that weights add up to 1 in it (the paper's mean, S times less, is `learning_rate`'s business); the K
steps are drawn once for a batch, and its passes share them. It costs S calls of the reward functions per completion.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise, check_choice, check_count
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.predictions import PredictedSteps
from rl4dlm.rollout.rollout import Rollout, valid_mask
from rl4dlm.training.advantages import softmax_weights
from rl4dlm.training.loss_parts import resized
from rl4dlm.training.losses import weighted_likelihood
from rl4dlm.training.predictions import predicted_steps, recorded_predictions
from rl4dlm.training.ratio_free import RatioFreeConfig
from rl4dlm.training.scores import rows_of
from rl4dlm.training.setup import mean_field
from rl4dlm.training.trainer import DiffusionPolicyTrainer, PolicyScores

__all__ = ["WD1Config", "WD1Trainer"]


@dataclass
class WD1Config(RatioFreeConfig):
    """Settings of `WD1Trainer`: those of `DiffusionPolicyConfig`, with wd1's own.

    Args:
        psi: factor of advantages in the exponents; larger than 0.
        negative_weight: s, what bad completions count for; 0: nothing.
        weights_over: `"group"`, weights add up to 1 in each group; `"batch"`, on average over groups.
        p_mask_prompt: probability with which a prompt token is hidden.
        num_iterations: passes over a batch of completions (mu), each with prompt masks of its own.
        num_predicted_steps: K, steps of a completion whose predictions are learnt from (wd1++), where `p_mask_prompt`
            is 0; 0 is wd1.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    psi: float = field(default=1.0, metadata={"help": "Factor of advantages in the exponents of weights."})
    negative_weight: float = field(default=1.0, metadata={"help": "What bad completions count for."})
    weights_over: str = field(
        default="group",
        metadata={"help": "Completions that share a softmax: group or batch.", "choices": ["group", "batch"]},
    )
    p_mask_prompt: float = field(
        default=0.15, metadata={"help": "Probability with which a prompt token is hidden when completions are scored."}
    )
    num_iterations: int = field(default=8, metadata={"help": "Passes over a batch of completions (mu)."})
    num_predicted_steps: int = field(
        default=0, metadata={"help": "Steps of a completion whose predictions are learnt from (wd1++); 0 is wd1."}
    )

    def __post_init__(self) -> None:
        if self.num_predicted_steps:
            check_count("num_predicted_steps", self.num_predicted_steps)
            masked = type(self).__dataclass_fields__["p_mask_prompt"].default
            if self.p_mask_prompt not in (0, masked):
                raise ValueError(
                    f"p_mask_prompt={self.p_mask_prompt} is not allowed with num_predicted_steps="
                    f"{self.num_predicted_steps}, which scores canvases as they were seen; allowed: 0"
                )
            self.p_mask_prompt = 0.0
        super().__post_init__()
        check_choice("weights_over", self.weights_over, ("group", "batch"))
        if not self.psi > 0:
            raise ValueError(f"psi={self.psi} is not allowed; it must be larger than 0")
        if self.negative_weight < 0:
            raise ValueError(f"negative_weight={self.negative_weight} is not allowed; it must be 0 or larger")
        MeanField(self.p_mask_prompt, self.scope)

    def recorded(self) -> tuple[str, ...]:
        """What steps draw for every open slot, where that is learnt from."""
        return (*super().recorded(), "fillings") if self.num_predicted_steps else super().recorded()

    def refused_settings(self) -> dict[str, str]:
        """Those of policy ratios, KL terms and, since weights are a softmax, scales and normalisations of rewards."""
        return {
            **super().refused_settings(),
            "negative_advantage_weight": "negative_weight says what becomes of completions below the baseline",
            "scale_rewards": "weights are a softmax of rewards; set psi",
            "multi_objective_aggregation": "weights are a softmax of the weighted sum of rewards; set reward_weights",
        }


class WD1Trainer(DiffusionPolicyTrainer):
    """wd1 in TRL's GRPO loop; `WD1Config` has its settings, the module's docstring the algorithm."""

    config_class = WD1Config
    args: WD1Config
    advantages_read_scores = False
    uses_old_policy = False
    _tag_names = ["trl", "rl4dlm", "wd1"]  # noqa: RUF012  (TRL's own form)
    _name = "wd1"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "wd1: Weighted Policy Optimization for Reasoning in Diffusion Language Models",
        "id": "2507.08838",
    }

    def build_estimator(self) -> Estimator:
        """The mean-field estimator of the model's noise, with this run's prompt masking; or views of predictions.

        Raises:
            ValueError: models, schedules and interventions that wd1++ is not for.
        """
        if not self.args.num_predicted_steps:
            return mean_field(self.model, self.args.p_mask_prompt, self.args.scope)
        setting = f"num_predicted_steps={self.args.num_predicted_steps}"
        if self.spec.noise != "mask":
            raise ValueError(f"{setting} is not supported for noise={self.spec.noise!r}: it learns from open slots")
        return replace(predicted_steps(self.spec, self.decoding, "wd1++"), scope=self.args.scope)

    def _check_intervention(self) -> None:
        if self.args.num_predicted_steps:
            raise ValueError(
                f"intervention={type(self.intervention).__name__} is not allowed with num_predicted_steps="
                f"{self.args.num_predicted_steps}: predictions of completions that take another's place are not "
                "rewarded; needed: None"
            )
        super()._check_intervention()

    def extend_batch(self, batch: dict[str, Any], rollout: Rollout, rewards_per_func: Tensor) -> None:
        """With wd1++: rewards what each step predicted, and adds the chosen steps, what they saw and their weights."""
        if not self.args.num_predicted_steps:
            return
        found, device = recorded_predictions(rollout), self.accelerator.device
        predicted, steps = found.completed(rollout.canvas), rollout.trace.steps
        ours = self.rewards_of_canvases(rollout, predicted).masked_fill(~found.there.to(device), torch.nan)  # [B, S]
        width = int(self.accelerator.gather(torch.tensor([ours.shape[1]], device=device)).max())
        ours = torch.nn.functional.pad(ours, (0, width - ours.shape[1]), value=torch.nan)
        size = self.num_generations if self.model.training else self.num_generations_eval
        everyone = self.accelerator.gather(ours.contiguous()).view(-1, size * width)  # all answers of a group
        weights = signed_weights(everyone, self.args.psi, self.args.negative_weight, self.args.weights_over)
        local = len(ours)
        first = self.accelerator.process_index * local
        own = weights.view(-1, width)[first : first + local]

        count = self.args.num_predicted_steps
        noise = RowNoise(rows_of(batch), self.args.seed, 0)
        steps = steps.to(device)[:, None]
        at = (noise.spread("predicted steps", count, "rows") * steps).long().clamp(max=width - 1)  # [B, K]
        place = at[..., None].expand(-1, -1, predicted.shape[-1])
        shown, answers = (value.to(device).gather(1, place) for value in (found.shown, predicted))
        assert isinstance(self.estimator, PredictedSteps)
        opened = shown == self.estimator.mask_token_id
        share = opened.double().mean(-1)
        weight = own.gather(-1, at) * steps / count / share.clamp(min=1 / opened.shape[-1])
        ends = valid_mask(answers.flatten(0, 1), self.spec.eos_token_ids).view_as(opened)
        batch["step_states"], batch["step_predictions"] = shown, answers
        batch["step_weights"] = torch.where(opened.any(-1), weight, 0.0)
        batch["step_scored"] = opened & ends if self.args.scope == "valid" else opened
        # What `diffusion/rollout_gap` is of: what the first of the chosen steps has written.
        batch["drawn"] = batch["commit_step"] == at[:, :1]

    def as_drawn(self, scores: PolicyScores, width: int) -> tuple[Tensor, Tensor | None]:
        """As everywhere; with wd1++ those of the first chosen step."""
        return super().as_drawn(scores, width) if self._of_tokens else (resized(_by_step(scores)[:, 0], width), None)

    @property
    def _of_tokens(self) -> bool:
        return not self.args.num_predicted_steps

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        """`w+ - s w-` of completions among completions, also with wd1++, where the loss has those of all answers."""
        return signed_weights(rewards, self.args.psi, self.args.negative_weight, self.args.weights_over)

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor:
        """Those with a weight: where all rewards of a group are equal and s is 1, none has."""
        if self._of_tokens:
            return self.with_advantage(batch)
        return (batch["step_weights"] != 0).any(-1) & batch["completion_mask"].any(-1)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """Of the completions of a micro-batch, as a mean over groups."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        if self._of_tokens:
            self.log_entropy(scores, batch["completion_mask"])
            sequence = (scores.log_probs * batch["completion_mask"]).sum(-1)
            return self.mean_over_rows(weighted_likelihood(sequence, batch["advantages"])) * group
        rows = batch["completion_mask"].any(-1)  # false: left out, because it was cut off
        counted = batch["step_scored"] & rows[:, None, None]
        answers = torch.where(counted, _by_step(scores), 0.0).sum(-1)  # [B, K]
        self.log_mean("entropy", scores.entropies, resized(counted.any(1), scores.entropies.shape[1]))
        weighted = weighted_likelihood(answers, batch["step_weights"].to(answers))
        return self.mean_over_rows(weighted.sum(-1)) * group


def _by_step(scores: PolicyScores) -> Tensor:
    assert scores.view_log_probs is not None
    return scores.view_log_probs


def signed_weights(rewards: Tensor, psi: float, negative_weight: float = 1.0, over: str = "group") -> Tensor:
    """`softmax(psi A) - s softmax(-psi A)`, float64 `[N, G]`, for A the rewards less their group's mean.

    Args:
        rewards: `[N, G]`; completions with NaN have weight 0.
        psi, negative_weight, over: as in `WD1Config`.
    """
    exponents = psi * (rewards.double() - rewards.double().nanmean(-1, keepdim=True))
    return softmax_weights(exponents, over) - negative_weight * softmax_weights(-exponents, over)
