"""RL of an unmasking policy on the steps that it chose: the policy on the model, its scores, optimizer and file.

A step of `learned_order` first draws slots in an order, then tokens at all open slots, of which it writes those at the
slots. With h the policy's utilities, C the open slots of the block, and u_1..u_K what was drawn, its log-probability is

    sum over k of  [h_{u_k} - log sum over j in C without u_1..u_{k-1} of exp h_j]  +  log p(y_{u_k} | state),

an exact density, since tokens that are not written leave no trace. Each written token thus has a score of its own, that
of its place and that of itself, and everything that trajectory algorithms do with scores of tokens (ratios of tokens or
steps, clips, averages) is done with these. In the last step of a block nothing is chosen, and the first part is 0.

The policy sees the hidden states of the model's own forward, so that gradients reach the model through it, too, unless
`train_denoiser` is off. It is part of the wrapped model; under FSDP and ZeRO-3, which would shard it, it is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from rl4dlm.likelihood.choices import Choices, choices_of
from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.rollout.policies.hidden_states import HiddenStatePolicy
from rl4dlm.rollout.policies.policy import attach_policy, fresh
from rl4dlm.rollout.policies.saving import build_policy, load_policy, load_weights, policy_of
from rl4dlm.rollout.schedules.parts import Schedule
from rl4dlm.training.contract import check_contract
from rl4dlm.training.interventions.intervention import Intervention
from rl4dlm.training.loss_parts import PolicyScores, resized
from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.unmasking_settings import UnmaskingConfig

check_contract(
    Trainer,
    parameters={"_load_optimizer_and_scheduler": ["checkpoint"], "create_optimizer": ["model"]},
)


class UnmaskingTrainer(TrajectoryTrainer):
    """RL on recorded steps whose slots a policy has drawn, which is trained with them, saved and resumed."""

    config_class: type[UnmaskingConfig] = UnmaskingConfig
    args: UnmaskingConfig
    advantages_read_scores = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: UnmaskingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        intervention: Intervention | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if kwargs.get("credit") is not None:
            raise ValueError(f"credit={type(kwargs['credit']).__name__} is not supported by {name}")
        if kwargs.get("peft_config") is not None and args is not None and not args.train_denoiser:
            raise ValueError(
                "peft_config is not supported with train_denoiser=False: the model stays as it is, so that an adapter "
                "would learn nothing"
            )
        given = model, reward_funcs, args, train_dataset, eval_dataset, processing_class, intervention
        super().__init__(*given, **kwargs)
        if self.is_fsdp_enabled or self._dist.is_zero3:
            raise ValueError(
                f"{name} is not supported under FSDP and ZeRO-3, which shard the policy; use DDP or ZeRO-2"
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise ValueError(f"{name} is not supported with an optimizer in DeepSpeed's configuration; remove it there")
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(f"{name} is not supported with optimizers=..., which do not know the policy")
        self.unmasking_policy = attach_policy(self.model, self._first_policy())
        if not self.args.train_denoiser:
            self.model.requires_grad_(False)
        self.unmasking_policy.requires_grad_(True)

    def build_estimator(self) -> RecordedSteps:
        """Views of the chosen steps. ValueError for rollouts whose steps no policy chooses."""
        schedule = self.decoding.build_schedule()
        if not (isinstance(schedule, Schedule) and schedule.reads_states and schedule.draws_positions):
            raise ValueError(
                f"schedule={self.decoding.schedule!r} is not allowed with schedule_args={self.args.schedule_args}: "
                f"{type(self).__name__} trains a policy that reads hidden states and draws slots; allowed: "
                "learned_order, without greedy=true"
            )
        if self.spec.attention in BLOCK_KINDS:
            raise ValueError(
                f"{type(self).__name__} is not supported for models with attention={self.spec.attention!r}, whose "
                "views hold steps of several blocks"
            )
        return super().build_estimator()

    def _first_policy(self) -> HiddenStatePolicy:
        """The policy to start from. ValueError where settings ask for another one than there is."""
        args, asked = self.args, self.args.policy_settings
        size = self.model.config.get_text_config().hidden_size
        found = policy_of(self.model) if args.policy_path is None else load_policy(args.policy_path)
        if found is None:
            kind = args.policy_kind or "upm"
            policy = build_policy(kind, {"hidden_size": size, **asked})
            wide = torch.promote_types(self.model.get_input_embeddings().weight.dtype, torch.float32)
            found = fresh(policy, seed=args.seed, dtype=wide)
        if not isinstance(found, HiddenStatePolicy) or found.hidden_size != size:
            raise ValueError(
                f"the unmasking policy to start from is of kind {found.kind!r} with settings={found.settings}; needed "
                f"is one that reads hidden states of {size} numbers"
            )
        wanted = {**asked, **({} if args.policy_kind is None else {"kind": args.policy_kind})}
        there = {"kind": found.kind, **found.settings}
        other = [name for name, value in wanted.items() if there.get(name) != value]
        if other:
            raise ValueError(
                f"policy_{other[0]}={wanted[other[0]]!r} contradicts the unmasking policy to start from, which has "
                f"{there.get(other[0])!r}; leave it out, or start from another policy"
            )
        return found

    # --- scores -------------------------------------------------------------------------------------------------------

    def view_choices(self, rows: Rows, views: Views) -> Choices:
        """Which slots each view's step chose."""
        steps = self.decoding.steps_per_block * self.decoding.num_blocks
        return choices_of(rows, views, block_length=self.decoding.block_length, steps=steps)

    def compared(self, scores: PolicyScores) -> Tensor:
        """Log-probabilities `[B, C]` of scored tokens and of their places."""
        assert scores.choices is not None
        return super().compared(scores) + resized(scores.choices.sum(1), scores.log_probs.shape[1])

    def as_drawn(self, scores: PolicyScores, width: int) -> tuple[Tensor, Tensor | None]:
        """Those of the tokens alone."""
        assert scores.views is not None
        return super().compared(scores), resized(scores.views.scored.any(1), width)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """`TrajectoryTrainer`'s, of these scores."""
        assert scores.choices is not None and scores.views is not None
        of_places = resized(scores.choices.sum(1), scores.log_probs.shape[1])
        scored = resized(scores.views.scored.any(1), of_places.shape[1]) * batch["completion_mask"]
        self.log_mean("diffusion/place_log_prob", of_places, scored)
        return super().loss(scores, batch)

    # --- learning, saving and resuming --------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """Transformers', with one group more."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        policy, args = self.unmasking_policy, self.args
        policy.requires_grad_(False)  # or its weights would be among the others
        optimizer = super().create_optimizer(model)
        policy.requires_grad_(True)
        rate = args.learning_rate if args.policy_learning_rate is None else args.policy_learning_rate
        optimizer.add_param_group({"params": list(policy.parameters()), "lr": rate, "weight_decay": args.weight_decay})
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # After DeepSpeed has read its own files, where each process has a part of the policy.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_weights(self.unmasking_policy, checkpoint)
