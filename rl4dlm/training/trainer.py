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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.scoring import ViewScores, score_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.loading import check_tokenizer, load_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules import registry
from rl4dlm.tasks.prompts import encode_prompt
from rl4dlm.tracking.training import TrainingReplays
from rl4dlm.training.backward_per_view import loss_per_view
from rl4dlm.training.checks import RESERVED_COLUMNS, check_columns, check_prompt, check_prompts, checked_rewards
from rl4dlm.training.config import DiffusionPolicyConfig
from rl4dlm.training.contract import check_contract
from rl4dlm.training.interventions.intervention import Intervention
from rl4dlm.training.interventions.trainer import SECOND_ATTEMPT, InterveningTrainer
from rl4dlm.training.loss_parts import PolicyScores, resized
from rl4dlm.training.metrics import identical_groups, rollout_gap, rollout_metrics
from rl4dlm.training.setup import base_model, copy_of, prepared, swapped, tokenizer_for

__all__ = ["DiffusionPolicyConfig", "DiffusionPolicyTrainer", "PolicyScores"]

check_contract(
    GRPOTrainer,
    parameters={
        "__init__": [
            "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "rollout_func",
        ],
        "_generate_and_score_completions": ["inputs"],
        "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep"],
        "_compute_loss": ["model", "inputs"],
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_tokenize_prompts": ["prompts"],
        "_get_train_sampler": ["dataset"],
        "_log_metric": ["name", "value"],
        "_log_completion_extra": ["column", "values"],
        "log": ["logs", "start_time"],
    },
    attributes=[
        "_step", "_metrics", "_logs", "_dist", "_tokenizer", "aux_loss_enabled", "beta", "eos_token_ids",
        "num_generations", "num_generations_eval", "num_iterations", "ref_model", "reward_weights", "chat_template",
        "chat_template_kwargs",
    ],
    keys={
        "_generate_and_score_completions": [
            "completion_ids", "completion_mask", "advantages", "num_items_in_batch", "prompt_ids", "prompt_mask",
            "old_per_token_logps", "ref_per_token_logps",
        ],
        "_compute_loss": ["old_per_token_logps", "ref_per_token_logps", "num_items_in_batch"],
    },
    module=grpo,
    names=[
        "create_model_from_path", "disable_gradient_checkpointing", "unwrap_model_for_generation", "use_adapter",
    ],
)  # fmt: skip

_ROWS_PER_CYCLE = 2 * SECOND_ATTEMPT  # so that row ids of different generation batches never meet
_EVALUATION_ROWS = 2**62  # row ids of evaluation start here


class DiffusionPolicyTrainer(InterveningTrainer):
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
        self._replays = TrainingReplays(args.output_dir, args.log_replays)
        # TRL's beta is that of a reference model, which a KL term to the old policy does without.
        beta = args.beta if args.kl_target == "reference" else 0.0
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
        self.decoding = args.decoding(self.spec)
        self.estimator = self.build_estimator()
        if self.estimator.noise != self.spec.noise:
            raise ValueError(
                f"{type(self).__name__} estimates likelihoods of models with noise={self.estimator.noise!r}, but this "
                f"one has noise={self.spec.noise!r}"
            )
        if args.beta and args.kl_target == "old" and not self.uses_old_policy:
            raise ValueError(f"kl_target='old' is not supported: {type(self).__name__} does not score the old policy")
        if args.scope not in ("valid", self.estimator.scope):
            raise ValueError(
                f"scope={args.scope!r} is not supported: {type(self).__name__} builds an estimator of "
                f"{self.estimator.scope!r} tokens"
            )
        schedule = self.decoding.build_schedule()
        if self.estimator.scope == "canvas" and getattr(schedule, "resize", None) is not None:
            raise ValueError(
                f"{type(self).__name__} scores the whole canvas, of which schedule={self.decoding.schedule!r} uses "
                "another part in each row; choose another schedule, or score valid tokens only"
            )
        self.eos_token_ids = list(self.spec.eos_token_ids)
        check_tokenizer(self._tokenizer, self.spec)
        if self.aux_loss_enabled:
            raise ValueError("the model adds a router loss, which is not supported; set router_aux_loss_coef=0.0")
        if args.disable_dropout:
            for module in [*self.model.modules(), *(self.ref_model.modules() if self.ref_model is not None else ())]:
                if isinstance(getattr(module, "attention_dropout", None), float):  # not an nn.Dropout, so TRL misses it
                    module.attention_dropout = 0.0
        self._check_forward_counts()
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

    # --- what an algorithm defines ------------------------------------------------------------------------------------

    @abstractmethod
    def build_estimator(self) -> Estimator:
        """The likelihood estimator, from `self.args`."""

    uses_old_policy: bool = True
    """Whether the loss compares with the policy that made the completions; if not, that is never scored."""

    needs_old_entropies: bool = False
    """Whether `old_entropies` `[B, n, C]`, of the policy that made the completions, are wanted in the batch."""

    scores_hints: bool = False
    """Whether tokens that an intervention has given are scored and in `completion_mask`. They are nobody's choice."""

    def compared(self, scores: PolicyScores) -> Tensor:
        """What is kept of old and reference scores, `[B, ...]`, for a loss to compare with; scores per token."""
        return scores.log_probs

    per_iteration: tuple[str, ...] = ("old_per_token_logps", "ref_per_token_logps", "old_entropies")
    """Entries `[B, n, ...]` of the batch of which the loss sees the current inner iteration's, `[B, ...]`."""

    def build_intervention(self) -> Intervention | None:
        """What changes groups of completions between rewards and advantages, in training; None: nothing."""
        return None

    def prepare_batch(self, batch: dict[str, Any], rewards: Tensor) -> None:
        """Changes a finished batch in place, before it is shuffled and split into micro-batches.

        Args:
            batch: of this process: tensors whose first dimension is its completions, and `num_items_in_batch`.
            rewards: `[N, G]` of all processes; NaN where a completion could not be scored.
        """

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """Advantages, or weights, of completions; None: TRL's own.

        Args:
            rewards: `[N, G]` of all processes; NaN where a completion could not be scored.
            batch: TRL's, of this process alone, with old and reference scores `[B, n, C]` where they are needed. See
                `of_all_processes`.

        Returns:
            `[N, G]`.
        """
        return None

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
                return super()._compute_loss(self.model_wrapped, batch)
            with swapped(self, "beta", 0.0):
                loss: Tensor = super()._compute_loss(self.model_wrapped, batch)
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
        ids = self._tokenize_prompts(prompts)[0]
        for i, prompt in enumerate(ids):
            check_prompt(prompt, f"prompt {i}", self.spec.mask_token_id)
            if self._prompt_limit is not None and len(prompt) > self._prompt_limit:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; at most {self._prompt_limit} are allowed")
        started = time.perf_counter()
        rollout = self._decode(ids, self._row_ids(len(ids), training))
        seconds = time.perf_counter() - started
        for name, value in rollout_metrics(rollout, seconds, self.accelerator.num_processes).items():
            self._log_metric(name, value)
        if self.args.log_completions:
            self._log_completion_extra("nfe", rollout.nfe.tolist())
            self._log_completion_extra("stop_reason", rollout.stop_reason)
        if self.args.log_replays:
            shown = training and self.accelerator.is_main_process
            links = self._replays.links(len(rollout), self.state.global_step + 1)
            self._log_completion_extra("replay", links if shown else [None] * len(rollout))
        return rollout

    def _decode(
        self, ids: list[list[int]], row_ids: list[int], hints: Sequence[Mapping[int, int]] | None = None
    ) -> Rollout:
        """One completion of each prompt, by the policy as it is. All processes decode together, if only nothing."""
        with (
            grpo.unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
        ):
            engine = RolloutEngine(
                model,
                self.spec,
                max_batch_rows=self.args.rollout_batch_size,
                progress=self.accelerator.is_local_main_process and not self.args.disable_tqdm,
            )
            engine.weight_version = self.state.global_step
            return engine.generate(ids, self.decoding, row_ids=row_ids, seed=self.args.seed, hints=hints)

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

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' evaluation loop; numbers its rows from zero."""
        self._eval_rows = 0
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, which also writes the table of completions; the replays that it links to are written before."""
        self._replays.write()
        super().log(logs, start_time)

    def _check_forward_counts(self) -> None:
        """Sharded models run in step: every rank must decode with the same number of forwards."""
        causes: list[str] = []
        if self.decoding.stop_at_eos or not registry.lookup(self.decoding.schedule).fixed_forwards:
            fixed = [name for name in registry.names() if registry.lookup(name).fixed_forwards]
            causes.append(
                f"schedule={self.decoding.schedule!r} with stop_at_eos={self.decoding.stop_at_eos} (choose a schedule "
                f"with a fixed number of forwards, one of {', '.join(fixed)}, and stop_at_eos=False)"
            )
        if self.spec.attention in BLOCK_KINDS and self.spec.grid_origin == "position_zero":
            causes.append(f"attention={self.spec.attention!r} from position 0 (a prompt that ends in a block adds one)")
        if not causes:
            return
        differs = f"forwards differ per process: {'; '.join(causes)}"
        if self.is_fsdp_enabled:
            raise ValueError(f"rollouts deadlock under FSDP; use DDP or DeepSpeed: {differs}")
        if self._dist.is_zero3 and not self.args.ds3_gather_for_generation:
            raise ValueError(f"ds3_gather_for_generation=False deadlocks rollouts; set it to True: {differs}")

    # --- generation batch ---------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.intervention is not None and self.model.training:
            rewards = self._intervene(inputs, prompts, completions, rewards)
        self._rewards_per_func = rewards
        return rewards  # [N * G, F], of all processes

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions([dict(row) for row in inputs])
        rollout, rewards = self._current_rollout, self._rewards_per_func
        assert rollout is not None and rewards is not None
        self._current_rollout = self._rewards_per_func = None
        device, training = self.accelerator.device, self.model.training
        mode, num_generations = ("train", self.num_generations) if training else ("eval", self.num_generations_eval)
        # Batch-first tensors only: TRL shuffles and splits every entry along the first dimension.
        batch["canvas_ids"] = rollout.canvas.to(device)
        batch["canvas_valid"] = rollout.valid.to(device)
        batch["row_ids"] = torch.tensor(rollout.row_ids, device=device)
        batch["drawn"] = (rollout.trace.commit_step >= 0).to(device)
        trace = rollout.trace
        tempered = self.args.score_temperature != 1 and trace.log_prob is not None
        batch["drawn_log_probs"] = (trace.log_prob if tempered else trace.raw_log_prob).to(device)  # type: ignore[union-attr]
        if rollout.trace.length is not None:
            slots = torch.arange(rollout.canvas.shape[1], device=device)
            batch["canvas_seen"] = slots < rollout.trace.length.to(device)[:, None]
        intervened = self.intervention is not None and training
        if intervened:
            batch["hinted"] = rollout.hinted.to(device)
            batch["replaced"] = torch.zeros(len(rollout), dtype=torch.bool, device=device)
            batch["replaced"][self._replaced_rows] = True
            self._with_completions(batch, rollout)
        if self.estimator.scope == "canvas":
            kept = batch["completion_mask"].any(-1, keepdim=True)  # false: masked out because it was truncated
            batch["completion_ids"] = batch["canvas_ids"]
            batch["completion_mask"] = kept.long().expand_as(batch["canvas_ids"]).contiguous()
        if intervened and not self.scores_hints:
            shown = resized(batch["hinted"], batch["completion_mask"].shape[1])
            batch["completion_mask"] = batch["completion_mask"] * ~shown
        if intervened or self.estimator.scope == "canvas":
            batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
        canvas, valid = (self.accelerator.gather(batch[name]) for name in ("canvas_ids", "canvas_valid"))
        same = identical_groups(canvas, valid, num_generations)
        self._metrics[mode]["diffusion/identical_completion_groups"].append(same)
        if self.args.log_replays and training and self.accelerator.is_main_process:
            summed = self._summed(rewards)[: len(rollout)].tolist()
            self._replays.hold(rollout, self._tokenizer, self.state.global_step + 1, summed)
        if not self.uses_old_policy:
            batch.pop("old_per_token_logps", None)
        self._score_fixed_policies(batch, iterations=self.num_iterations if training else 1)
        self._replace_advantages(batch, rewards, num_generations)
        if self.args.negative_advantage_weight != 1:
            signed = batch["advantages"]
            batch["advantages"] = torch.where(signed < 0, self.args.negative_advantage_weight * signed, signed)
        if training:
            self.prepare_batch(batch, self._summed(rewards).view(-1, num_generations))
        return batch

    def _replace_advantages(self, batch: dict[str, Any], rewards_per_func: Tensor, num_generations: int) -> None:
        advantages = self.advantages(self._summed(rewards_per_func).view(-1, num_generations), batch)
        if advantages is None:
            return
        everyone = advantages.nan_to_num(nan=0.0).flatten()
        local = len(batch["advantages"])
        start = self.accelerator.process_index * local
        batch["advantages"] = everyone[start : start + local].to(batch["advantages"])
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(everyone))):
            logged.pop()
        logged.extend(everyone.tolist())

    def _summed(self, rewards_per_func: Tensor) -> Tensor:
        """Weighted rewards `[N * G]`; NaN where no function could tell."""
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(-1)
        return rewards.masked_fill(rewards_per_func.isnan().all(-1), torch.nan)

    def _score_fixed_policies(self, batch: dict[str, Any], iterations: int) -> None:
        """Replaces TRL's placeholders by old and reference scores in each iteration's views, `[B, n, C]`.

        Whether they are needed is TRL's decision: it is whether the placeholder is there.
        """
        rows, width = rows_of(batch), batch["completion_ids"].shape[1]
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        count = iterations if self.estimator.fresh else 1

        def scores(model: Any) -> tuple[Tensor, Tensor]:
            each = [self._score(model, rows, n, width, rows_per_forward=size) for n in range(count)]
            return torch.stack([self.compared(s) for s in each], dim=1), torch.stack([s.entropies for s in each], dim=1)

        with torch.no_grad(), grpo.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if "old_per_token_logps" in batch or self.needs_old_entropies:
                log_probs, entropies = scores(self.model)
                if "old_per_token_logps" in batch:
                    batch["old_per_token_logps"] = log_probs
                if self.needs_old_entropies:
                    batch["old_entropies"] = entropies
            if "ref_per_token_logps" in batch:
                with self._reference() as reference:
                    batch["ref_per_token_logps"] = scores(reference)[0]

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with grpo.use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    # --- scores and loss ----------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, None]:
        # TRL asks twice: while it builds a batch, before views can be drawn (a placeholder will do), and in its loss.
        if self._current_scores is not None:
            return self._current_scores.log_probs, self._current_scores.entropies, None
        nothing = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        return nothing, nothing, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        iteration = 0
        if self.model.training:
            # Passes over the batch, not micro-steps as in the papers' code, which skips views when it accumulates.
            iteration = self._step // self.args.steps_per_generation % self.num_iterations
        rows, width = rows_of(inputs), inputs["completion_ids"].shape[1]
        batch = dict(inputs)  # the buffered batch is used again: never change its tensors
        for name in self.per_iteration:
            if batch.get(name) is not None:
                batch[name] = batch[name][:, min(iteration, batch[name].shape[1] - 1)]
        views = self._draw(rows, iteration)

        def loss(found: ViewScores) -> Tensor:
            scores = self._reduced(found, views, width)
            if iteration == 0:
                self._log_rollout_gap(scores.log_probs, inputs)
            return self.loss(scores, batch)

        if not (self._backward_per_view and torch.is_grad_enabled() and views.hidden.shape[1] > 1):
            return loss(self._view_scores(model, rows, views))
        with grpo.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs), torch.no_grad():
            found = self._view_scores(model, rows, views)
        return loss_per_view(
            found, views, lambda one: self._view_scores(model, rows, one), loss, self._backward_of_part
        )

    def _backward_of_part(self, forward: Callable[[], Tensor]) -> None:
        """A forward and its backward pass, whose gradients are added up in this process until another one."""
        with self.accelerator.no_sync(self.model_wrapped):  # of DDP
            value = forward()
            if self.is_deepspeed_enabled:
                self.accelerator.deepspeed_engine_wrapped.backward(value, sync_gradients=False, scale_wrt_gas=False)
            else:
                self.accelerator.backward(value)

    def _draw(self, rows: Rows, iteration: int) -> Views:
        views = self.estimator.draw(rows, seed=self.args.seed, iteration=iteration)
        return views if rows.given is None or self.scores_hints else views.without(rows.given)

    def _view_scores(self, model: Any, rows: Rows, views: Views, rows_per_forward: int | None = None) -> ViewScores:
        with self.accelerator.autocast():
            return score_views(
                model,
                self.spec,
                rows.ids,
                rows.attention_mask,
                views,
                temperature=self.args.score_temperature,
                cfg_scale=self.args.cfg_scale,
                rows_per_forward=rows_per_forward,
                one_view=self.args.one_view,
            )

    def _reduced(self, found: ViewScores, views: Views, width: int) -> PolicyScores:
        """Scores `[B, C]` from those of the views, cut or padded to C = `width`."""
        entropies = (found.entropies * views.scored).sum(1) / views.scored.sum(1).clamp(min=1)
        scores = resized(self.estimator.reduce(found.log_probs, views), width)
        return PolicyScores(scores, resized(entropies, width), views, found.log_probs)

    def _score(
        self, model: Any, rows: Rows, iteration: int, width: int, rows_per_forward: int | None = None
    ) -> PolicyScores:
        """Scores `[B, C]` of rows in the views of an inner iteration, cut or padded to C = `width`."""
        views = self._draw(rows, iteration)
        return self._reduced(self._view_scores(model, rows, views, rows_per_forward), views, width)

    @torch.no_grad()
    def _log_rollout_gap(self, scores: Tensor, inputs: dict[str, Any]) -> None:
        width = scores.shape[1]
        mask = inputs["completion_mask"].bool() & resized(inputs["drawn"], width)
        local = rollout_gap(resized(inputs["drawn_log_probs"], width), scores, mask)
        total, tokens = self.accelerator.reduce(local, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["diffusion/rollout_gap"].append(total / max(tokens, 1))


def _roll_out(prompts: list[Any], trainer: DiffusionPolicyTrainer) -> dict[str, Any]:
    """TRL's rollout hook. A function, since a bound method would tie the trainer to itself."""
    rollout = trainer.rollout(prompts)
    trainer._current_rollout = rollout
    return {"prompt_ids": rollout.prompt_ids, "completion_ids": rollout.completion_ids, "logprobs": None}


def rows_of(batch: dict[str, Any]) -> Rows:
    """The rows of a batch that are to be scored."""
    return Rows(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"],
        canvas_ids=batch["canvas_ids"],
        valid=batch["canvas_valid"],
        row_ids=batch["row_ids"],
        seen=batch.get("canvas_seen"),
        given=batch.get("hinted"),
    )
