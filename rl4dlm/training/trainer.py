"""The trainer every RL algorithm extends: TRL's GRPO loop with rollouts and likelihoods of a denoiser.

TRL keeps its loop, buffers, advantages, losses and logs. This file replaces how completions come about (the rollout
engine) and how log-probabilities do (views, scored inside the wrapped model). It owns neither an estimator nor a loss:
those are an algorithm's. TRL's private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

import os
import time
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

import trl.trainer.grpo_trainer as grpo
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.models.adapters import base_model
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.loading import check_tokenizer, load_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.taught import warn_of_canvas
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.tasks.prompts import encode_prompt
from rl4dlm.tracking.training import TrainingReplays
from rl4dlm.training.auditing import AuditingTrainer
from rl4dlm.training.backends import BackendTrainer
from rl4dlm.training.batch import BatchTrainer
from rl4dlm.training.checks import (
    RESERVED_COLUMNS,
    check_columns,
    check_enough_prompts,
    check_prompt,
    check_prompts,
    checked_rewards,
)
from rl4dlm.training.config import DiffusionPolicyConfig, check_view_key
from rl4dlm.training.contract import check_contract
from rl4dlm.training.credit.credit import Credit
from rl4dlm.training.exact_check import ExactCheckTrainer
from rl4dlm.training.interventions.intervention import Intervention
from rl4dlm.training.interventions.trainer import SECOND_ATTEMPT
from rl4dlm.training.logs import LoggingTrainer
from rl4dlm.training.loss_parts import PolicyScores
from rl4dlm.training.metrics import rollout_metrics
from rl4dlm.training.model_card import base_name, model_card
from rl4dlm.training.scores import rows_of
from rl4dlm.training.setup import copy_of, prepared, swapped, tokenizer_for

__all__ = ["DiffusionPolicyConfig", "DiffusionPolicyTrainer", "PolicyScores", "rows_of"]

check_contract(
    GRPOTrainer,
    parameters={
        "__init__": [
            "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "rollout_func",
        ],
        "_tokenize_prompts": ["prompts"],
        "_get_train_sampler": ["dataset"],
        "create_model_card": ["model_name", "dataset_name", "tags"],
        "_log_metric": ["name", "value"],
        "_log_completion_extra": ["column", "values"],
    },
    attributes=["_entropy_bonus_enabled", "_step", "_tokenizer", "aux_loss_enabled", "beta", "chat_template",
        "chat_template_kwargs", "eos_token_ids", "num_iterations", "top_entropy_quantile",
    ],
    module=grpo,
    names=["create_model_from_path"],
)  # fmt: skip

_ROWS_PER_CYCLE = 2 * SECOND_ATTEMPT  # so that row ids of different generation batches never meet
_EVALUATION_ROWS = 2**62  # row ids of evaluation start here


class DiffusionPolicyTrainer(LoggingTrainer, ExactCheckTrainer, AuditingTrainer, BackendTrainer, BatchTrainer):
    """RL for a denoiser, in TRL's loop.

    An algorithm subclasses it, says which likelihood estimator it uses (`build_estimator`) and may define its own
    `advantages` and `loss`.

    Args:
        model: a model or `PeftModel` with a spec, or the path of one (a folder, a hub id, an adapter folder).
        reward_funcs: TRL's: functions `f(prompts, completions, **columns) -> list[float | None]`, or reward models.
        args: the algorithm's config; None: its defaults.
        train_dataset: with a column `"prompt"`, text or chat messages; other columns reach the reward functions.
        eval_dataset: the same, or a dict of such.
        processing_class: the tokenizer; None loads the one saved with the model.
        intervention: changes groups of completions before they are learnt from, such as `Inpainting`; None: the
            algorithm's own, if it has one.
        credit: says which tokens a reward is due to, such as `DiSPO` or `DACA`; None: all of a completion's.
        kwargs: TRL's further arguments: `reward_processing_classes`, `callbacks`, `optimizers`, `quantization_config`,
            `peft_config`.

    Raises:
        ValueError: a model without spec, a tokenizer without mask token, a dataset without prompts, a bad prompt.
        TypeError: an argument that has no meaning here.
    """

    config_class: type[DiffusionPolicyConfig] = DiffusionPolicyConfig
    _tag_names = ["trl", "rl4dlm"]  # noqa: RUF012  (TRL's own form)

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: DiffusionPolicyConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        intervention: Intervention | None = None,
        credit: Credit | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.config_class() if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(f"args is a {type(args).__name__}; a {self.config_class.__name__} is needed")
        for name in ("tools", "environment_factory", "rollout_func"):
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"{name} is not supported: completions come from the rollout engine")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_columns(dataset, name, "prompt", RESERVED_COLUMNS)
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        adapter = kwargs.get("peft_config")
        policy = None if isinstance(model, str) else prepared(model, adapter)
        if processing_class is None:
            processing_class = tokenizer_for(model, args.model_init_kwargs)
        if policy is not None:
            check_tokenizer(processing_class, DiffusionSpec.of(base_model(policy)))

        def load(path: str, architecture: Any = None, **options: Any) -> Any:
            # The reference of a policy given as an instance is a copy of it: the folder it came from may differ.
            return copy_of(policy) if policy is not None else prepared(load_denoiser(path, **options), adapter)

        self._current_rollout: Rollout | None = None
        self._current_scores: PolicyScores | None = None
        self._rewards_per_func: Tensor | None = None
        self._replaced_rows: list[int] = []
        self._eval_rows = 0
        self._replays = TrainingReplays(args.output_dir, args.log_replays, args.log_total_limit)
        # TRL's beta is that of a reference model, which a KL term to the old policy does without.
        beta = self.reference_weight(args)
        loading = swapped(grpo, "create_model_from_path", load)
        with loading, swapped(args, "beta", beta), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model,
                checked_rewards(reward_funcs),
                args,
                train_dataset,
                eval_dataset,
                processing_class,
                rollout_func=_roll_out,
                **kwargs,
            )
        base = base_model(self.model)
        self.spec = DiffusionSpec.of(base)
        if self.spec.noise != "mask" and self.needs_masks:
            raise ValueError(
                f"{type(self).__name__} is not offered for models with noise={self.spec.noise!r}: {self.needs_masks}"
            )
        self.decoding = self._decoding_for(credit)
        warn_of_canvas(base, self.decoding.canvas_length)
        self.estimator = self.build_estimator()
        self._check_credit()
        if self.estimator.noise != self.spec.noise:
            raise ValueError(
                f"{type(self).__name__} estimates likelihoods of models with noise={self.estimator.noise!r}, but this "
                f"one has noise={self.spec.noise!r}"
            )
        self._check_correction()
        if args.beta and args.kl_target == "old" and not self.uses_old_policy:
            raise ValueError(f"kl_target='old' is not supported: {type(self).__name__} does not score the old policy")
        if args.scope not in ("valid", self.estimator.scope):
            raise ValueError(
                f"scope={args.scope!r} is not supported: {type(self).__name__} builds an estimator of "
                f"{self.estimator.scope!r} tokens"
            )
        check_view_key(args, self.estimator)
        schedule = self.decoding.build_schedule()
        if self.spec.attention in BLOCK_KINDS and getattr(schedule, "ahead", False):
            raise ValueError(
                f"schedule={self.decoding.schedule!r} writes blocks whose predecessors are unfinished, but models with "
                f"attention={self.spec.attention!r} are scored with finished ones: the scores would be those of "
                "another distribution than the one drawn from; choose another schedule"
            )
        if self.estimator.scope == "canvas" and getattr(schedule, "resize", None) is not None:
            raise ValueError(
                f"{type(self).__name__} scores the whole canvas, of which schedule={self.decoding.schedule!r} uses "
                "another part in each row; choose another schedule, or score valid tokens only"
            )
        self.eos_token_ids = list(self.spec.eos_token_ids)
        check_tokenizer(self._tokenizer, self.spec)
        if not args.draw_unknown_tokens:
            known = 1 + max(self._tokenizer.get_vocab().values())
            if known < base.config.get_text_config().vocab_size:  # embeddings are often larger than the tokenizer
                self.decoding = self.decoding.knowing(known)
        if self.aux_loss_enabled:
            raise ValueError("the model adds a router loss, which is not supported; set router_aux_loss_coef=0.0")
        if args.disable_dropout:
            for module in [*self.model.modules(), *(self.ref_model.modules() if self.ref_model is not None else ())]:
                if isinstance(getattr(module, "attention_dropout", None), float):  # not an nn.Dropout, so TRL misses it
                    module.attention_dropout = 0.0
        self._check_sharded()
        reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        self._backward_per_view = bool(args.one_view and reentrant)
        if self._backward_per_view and not args.disable_dropout:
            raise ValueError(
                "disable_dropout=False is not supported with one_view=True and re-entrant gradient checkpointing, "
                "TRL's for adapters under ZeRO-3: views are scored twice there, and must score the same"
            )
        self.intervention = self.build_intervention() if intervention is None else intervention
        if self.intervention is not None:
            self._bind_intervention()
        self.backend = self._build_backend()
        positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        limits = [args.max_prompt_length, positions and positions - self.decoding.canvas_length]
        self._prompt_limit = min((limit for limit in limits if limit is not None), default=None)
        for name in ("train_dataset", "eval_dataset"):
            checked = check_prompts(
                getattr(self, name),
                name,
                lambda prompts: self._tokenize_prompts(prompts)[0],
                mask_token_id=self.spec.mask_token_id,
                limit=self._prompt_limit,
                overlong=args.overlong_prompts,
            )
            setattr(self, name, checked)
        check_enough_prompts(
            self.train_dataset,
            generation_batch_size=args.generation_batch_size,
            num_generations=args.num_generations,
        )

    # --- what an algorithm defines ------------------------------------------------------------------------------------

    @abstractmethod
    def build_estimator(self) -> Estimator:
        """The likelihood estimator, from `self.args`."""

    def reference_weight(self, args: DiffusionPolicyConfig) -> float:
        """What is not 0 where there is a reference model, for these settings."""
        return args.beta if args.kl_target == "reference" else 0.0

    needs_masks: str = ""
    """Why the algorithm has no meaning for models whose noise is random tokens; empty: it may have one."""

    scores_hints: bool = False
    """Whether tokens that an intervention has given are scored and in `completion_mask`. They are nobody's choice."""

    def build_intervention(self) -> Intervention | None:
        """What changes groups of completions between rewards and advantages, in training; None: nothing."""
        return None

    def prepare_batch(self, batch: dict[str, Any], rewards: Tensor) -> None:
        """Changes a finished batch in place, before it is shuffled and split into micro-batches.

        Args:
            batch: of this process: tensors whose first dimension is its completions, and `num_items_in_batch`.
            rewards: `[N, G]` of all processes; NaN where a completion could not be scored.
        """

    advantages_read_scores = False

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """Advantages, or weights, of completions; None: TRL's own.

        Args:
            rewards: `[N, G]` of all processes; NaN where a completion could not be scored.
            batch: TRL's, of this process alone, with old and reference scores `[B, n, C]` where they are needed, unless
                `advantages_read_scores` is False. See `of_all_processes`.

        Returns:
            `[N, G]`.
        """
        return None

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those with an advantage: every one of TRL's losses is linear in it, but for KL and entropy terms."""
        others = self.args.beta or self._entropy_bonus_enabled or self.top_entropy_quantile < 1
        return None if others else self.with_advantage(batch)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch, scaled for gradient accumulation; TRL's by default, with all of its settings.

        One of its own has its KL term, if any, from `token_kl` or from `log_ratio_to(self.args.kl_target, ...)`, times
        `self.args.beta`; `self.beta` is TRL's, and 0 where there is no reference.

        Args:
            scores: of the current policy, with gradients.
            batch: TRL's: `advantages` `[B]`; `completion_ids`, `completion_mask`, and where they are needed
                `old_per_token_logps` and `ref_per_token_logps`, all `[B, C]`; `num_items_in_batch`, the tokens of the
                whole generation batch.
        """
        self._current_scores = scores
        try:
            if not self.args.beta or self.kl_is_trls:
                return self.trl_loss(batch)
            with swapped(self, "beta", 0.0):
                loss: Tensor = self.trl_loss(batch)
        finally:
            self._current_scores = None
        estimates, mask = self.token_kl(scores.log_probs, batch), batch["completion_mask"]
        self.log_mean("kl", estimates, mask)
        return loss + self.args.beta * self.averaged(estimates, mask, batch)

    # --- rollout ------------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        # TRL's own closes a prefilled assistant turn and opens another one.
        options = {"chat_template": self.chat_template, "chat_template_kwargs": self.chat_template_kwargs}
        return [encode_prompt(self._tokenizer, prompt, **options) for prompt in prompts], None, {}

    def rollout(self, prompts: list[Any]) -> Rollout:
        """Decodes one completion for each of this process's prompts (already repeated `num_generations` times)."""
        training = self.model.training
        self._fall_back_if_told()
        ids = self._tokenize_prompts(prompts)[0]
        for i, prompt in enumerate(ids):
            check_prompt(prompt, f"prompt {i}", self.spec.mask_token_id)
            if self._prompt_limit is not None and len(prompt) > self._prompt_limit:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; at most {self._prompt_limit} are allowed")
        started = time.perf_counter()
        rollout = self._decode(ids, self._row_ids(len(ids), training))
        seconds = time.perf_counter() - started
        if training:
            self._audit(rollout)
        for name, value in rollout_metrics(rollout, seconds, self.accelerator.num_processes).items():
            self._log_metric(name, value)
        if self.args.log_completions:
            if rollout.recorded:
                self._log_completion_extra("nfe", rollout.nfe.tolist())
            self._log_completion_extra("stop_reason", rollout.stop_reason)
        if self.args.log_replays:
            shown = training and self.accelerator.is_main_process
            links = self._replays.links(len(rollout), self.state.global_step + 1)
            self._log_completion_extra("replay", links if shown else [None] * len(rollout))
        return rollout

    def _row_ids(self, rows: int, training: bool) -> list[int]:
        """Ids of this process's rows: unique in the run, and the same however rows are shared out over processes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if training:
            first = self._step // (self.args.steps_per_generation * self.num_iterations) * _ROWS_PER_CYCLE + rank * rows
        else:  # counted from the start of each evaluation: all evaluations of a run decode with the same noise
            first = _EVALUATION_ROWS + self._eval_rows + rank * rows
            self._eval_rows += world * rows
        return list(range(first, first + rows))

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's, which orders prompts by `seed` alone."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        with swapped(self.args, "seed", seed):
            return super()._get_train_sampler(dataset)

    @property
    def shown_decoding(self) -> DecodingConfig:
        """How the model's card says that its completions were decoded."""
        return self.decoding

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Writes README.md into the output folder; see `rl4dlm.training.model_card`."""
        if not self.is_world_process_zero():
            return
        text = model_card(
            name=self.hub_model_id or model_name or os.path.basename(os.path.abspath(self.args.output_dir)),
            path=self.hub_model_id or self.args.output_dir,
            base=base_name(base_model(self.model)),
            algorithm=self._name,
            paper=self._paper,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())],
            decoding=self.shown_decoding,
            rewards=list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)),
            facts={"completions per prompt": self.num_generations, "learning rate": self.args.learning_rate},
            dataset=dataset_name,
        )
        Path(self.args.output_dir, "README.md").write_text(text, encoding="utf-8")

    def _check_sharded(self) -> None:
        if self._sharded and self.spec.noise == "uniform":
            raise ValueError(
                "rollouts of models with noise='uniform' deadlock under FSDP, and under ZeRO-3 with "
                "ds3_gather_for_generation=False, since processes make different numbers of forwards; use DDP, ZeRO-2, "
                "or ds3_gather_for_generation=True"
            )


def _roll_out(prompts: list[Any], trainer: DiffusionPolicyTrainer) -> dict[str, Any]:
    """TRL's rollout hook. A function, since a bound method would tie the trainer to itself."""
    rollout = trainer.rollout(prompts)
    trainer._current_rollout = rollout
    trainer._table_is_new = True
    return {"prompt_ids": rollout.prompt_ids, "completion_ids": rollout.completion_ids, "logprobs": None}
