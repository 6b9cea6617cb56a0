"""The trainer every RL algorithm extends: TRL's GRPO loop with rollouts and likelihoods of a denoiser.

TRL keeps its loop, buffers, advantages, losses and logs. This file replaces how completions come about (the rollout
engine) and how log-probabilities do (views, scored inside the wrapped model). It owns neither an estimator nor a loss:
those are an algorithm's. TRL's private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

import os
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import trl.trainer.grpo_trainer as grpo
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.algorithms.checks import check_columns, check_prompt, check_prompts, checked_rewards
from rl4dlm.algorithms.contract import check_contract
from rl4dlm.algorithms.intervention import Context, Group, Intervention
from rl4dlm.algorithms.metrics import identical_groups, rollout_gap, rollout_metrics
from rl4dlm.algorithms.policy_config import DiffusionPolicyConfig
from rl4dlm.algorithms.resume import ResumableGRPOTrainer
from rl4dlm.algorithms.setup import base_model, copy_of, prepared, swapped, tokenizer_for
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.loading import check_tokenizer, load_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules import registry
from rl4dlm.tracking.training import TrainingReplays

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
        "_log_metric": ["name", "value"],
        "_log_completion_extra": ["column", "values"],
        "log": ["logs", "start_time"],
    },
    attributes=[
        "_step", "_metrics", "_logs", "_dist", "_pending_extra_logs", "_pending_metrics", "_tokenizer",
        "aux_loss_enabled", "eos_token_ids", "mask_truncated_completions",
        "num_generations", "num_generations_eval", "num_iterations",
        "pad_to_multiple_of", "ref_model", "reward_func_names", "reward_weights",
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
        "create_model_from_path", "disable_gradient_checkpointing", "gather", "is_conversational", "parse_response",
        "unwrap_model_for_generation", "use_adapter",
    ],
)  # fmt: skip

_ROWS_PER_CYCLE = 2**24  # more than any generation batch has rows, so that row ids of different cycles never meet
_EVALUATION_ROWS = 2**62  # row ids of evaluation start here
_SECOND_ATTEMPT = _ROWS_PER_CYCLE // 2  # from the row id of a completion to that of an attempt at its place


class PolicyScores(NamedTuple):
    """What a loss is computed from, per completion token; zero where nothing is scored."""

    log_probs: Tensor  # [B, C], what the estimator makes of the views
    entropies: Tensor  # [B, C], in nats, averaged over the views that score a token
    views: Views | None = None  # what was hidden; K views
    view_log_probs: Tensor | None = None  # [B, K, L], log-probabilities in each view


class DiffusionPolicyTrainer(ResumableGRPOTrainer, ABC):
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
            check_columns(dataset, name, "prompt")
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
        with swapped(grpo, "create_model_from_path", load), warnings.catch_warnings():
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
        self.intervention = self.build_intervention() if intervention is None else intervention
        if self.intervention is not None:
            self._check_intervention()
            self.intervention.bind(
                Context(
                    tokenizer=self._tokenizer,
                    spec=self.spec,
                    canvas_length=self.decoding.canvas_length,
                    num_generations=self.num_generations,
                    reward_names=list(self.reward_func_names),
                    seed=args.seed,
                )
            )
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

        Args:
            scores: of the current policy, with gradients.
            batch: TRL's: `advantages` `[B]`; `completion_ids`, `completion_mask`, and where they are needed
                `old_per_token_logps` and `ref_per_token_logps`, all `[B, C]`; `num_items_in_batch`, the tokens of the
                whole generation batch.
        """
        self._current_scores = scores
        try:
            return super()._compute_loss(self.model_wrapped, batch)
        finally:
            self._current_scores = None

    def of_all_processes(self, values: Tensor) -> Tensor:
        """`[N, G]`, from one number per completion of this process, `[B]`."""
        generations = self.num_generations if self.model.training else self.num_generations_eval
        gathered: Tensor = self.accelerator.gather(values.contiguous())
        return gathered.view(-1, generations)

    def tokens_scored(self, batch: dict[str, Any]) -> Tensor:
        """How many canvas tokens of each completion its scores are about, `[B]`: those in scope that were not given."""
        valid: Tensor = batch["canvas_valid"]
        within = torch.ones_like(valid) if self.estimator.scope == "canvas" else valid
        if batch.get("hinted") is not None and not self.scores_hints:
            within = within & ~batch["hinted"]
        return within.sum(-1)

    def mean_over_rows(self, values: Tensor) -> Tensor:
        """The mean of one number per row, `[B]`, scaled for gradient accumulation; for losses of whole sequences."""
        return values.mean() / (self.current_gradient_accumulation_steps if self.model.training else 1)

    def mean_over_tokens(self, values: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """The sum of `values` `[B, C]` where `mask` is set, over the completion tokens of the generation batch, scaled
        as TRL's `loss_type="dapo"`: splitting a batch into micro-batches or processes changes nothing."""
        total = batch["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            total = total * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return (values * mask).sum() / total

    @torch.no_grad()
    def log_entropy(self, scores: PolicyScores, mask: Tensor) -> None:
        """Logs the mean `entropy` of the tokens of `mask` `[B, C]` that a view scores; TRL's own loss logs it, too."""
        counted = mask.bool()
        if scores.views is not None:
            counted = counted & resized(scores.views.scored.any(1), mask.shape[1])
        sums = torch.stack([(scores.entropies * counted).sum(), counted.sum().to(scores.entropies)])
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"]["entropy"].append(total / max(tokens, 1))

    # --- rollout ------------------------------------------------------------------------------------------------------

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

    # --- interventions ------------------------------------------------------------------------------------------------

    def _check_intervention(self) -> None:
        """An intervention sees whole groups, gives slots, and decodes on some processes more than on others."""
        assert self.intervention is not None
        name, args = type(self.intervention).__name__, self.args
        for column in self.intervention.columns:
            check_columns(self.train_dataset, "train_dataset", column)
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % self.num_generations:
            raise ValueError(
                f"{name} needs whole groups on each process, but per_device_train_batch_size="
                f"{args.per_device_train_batch_size} x steps_per_generation={args.steps_per_generation} = {rows} is no "
                f"multiple of num_generations={self.num_generations}"
            )
        if self.spec.noise != "mask":
            raise ValueError(f"{name} gives slots of the canvas, which noise={self.spec.noise!r} would overwrite")
        if getattr(self.decoding.build_schedule(), "resize", None) is not None:
            raise ValueError(
                f"{name} gives slots of the canvas, which schedule={self.decoding.schedule!r} cannot have: it changes "
                "the length of the canvas"
            )
        if self.is_fsdp_enabled or (self._dist.is_zero3 and not args.ds3_gather_for_generation):
            raise ValueError(f"{name} decodes other numbers of rows on each process, which deadlocks sharded rollouts")
        if self._dist.is_zero3 and any(isinstance(f, torch.nn.Module) for f in self.reward_funcs):
            raise ValueError(f"{name} asks for rewards on some processes only, which deadlocks a sharded reward model")

    def _intervene(self, inputs: Any, prompts: Any, completions: list[Any], rewards: Tensor) -> Tensor:
        """Decodes and scores the attempts that the intervention asks for, and puts those that it accepts in place.

        Changes `completions` (which TRL logs) and the current rollout; returns the rewards `[N * G, F]` that count.
        """
        intervention, rollout, size = self.intervention, self._current_rollout, self.num_generations
        assert intervention is not None and rollout is not None
        start = self.accelerator.process_index * len(prompts)
        rewards = rewards[start : start + len(prompts)].clone()  # of this process
        groups = [
            Group(inputs[i], rewards[i : i + size], rollout.row_ids[i : i + size]) for i in range(0, len(prompts), size)
        ]
        hints = [intervention.attempts(group) for group in groups]
        if any(len(given) > size for given in hints):
            raise ValueError(f"{type(intervention).__name__} asks for more attempts than a group has members, {size}")
        rows = [g * size + k for g, given in enumerate(hints) for k in range(len(given))]
        replaced: dict[int, int] = {}
        if self.accelerator.gather(torch.tensor([len(rows)], device=self.accelerator.device)).any():
            ids = [rollout.row_ids[row] + _SECOND_ATTEMPT for row in rows]
            flat = [hint for given in hints for hint in given]
            attempts = self._decode([rollout.prompt_ids[row] for row in rows], ids, flat)
            if rows:
                found, extras = self._score_attempts(inputs, prompts, attempts, rows)
                first = 0
                for g, given in enumerate(hints):
                    chosen = intervention.replacements(groups[g], found[first : first + len(given)]) if given else {}
                    replaced |= {g * size + member: first + attempt for member, attempt in chosen.items()}
                    first += len(given)
                texts = self._texts(prompts, attempts)
                for row, attempt in replaced.items():
                    rewards[row], completions[row] = found[attempt], texts[attempt]
                self._current_rollout = rollout = rollout.replaced(replaced, attempts)
                self._replace_extras(extras, replaced, rollout)
        self._replaced_rows = sorted(replaced)
        self._log_metric("intervention/group_share", sum(map(bool, hints)) / len(hints))
        self._log_metric("intervention/row_share", len(replaced) / len(prompts))
        if self.args.log_completions:
            self._log_completion_extra("replaced", [row in replaced for row in range(len(prompts))])
        gathered: Tensor = self.accelerator.gather(rewards)
        return gathered

    def _score_attempts(
        self, inputs: Any, prompts: Any, attempts: Rollout, rows: list[int]
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """Rewards `[A, F]` of completions decoded in place of some rows, and the columns that reward functions log."""
        pending, metrics = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs: Any = defaultdict(list)
        self._pending_metrics: Any = defaultdict(list)
        asked = [prompts[row] for row in rows], self._texts(prompts, attempts), attempts.completion_ids
        try:
            with swapped(grpo, "gather", lambda values: values):  # other processes score another number, or none
                found = super()._calculate_rewards([inputs[row] for row in rows], *asked)
            return found, dict(self._pending_extra_logs)
        finally:
            self._pending_extra_logs, self._pending_metrics = pending, metrics

    def _replace_extras(self, extras: dict[str, list[Any]], replaced: dict[int, int], rollout: Rollout) -> None:
        pending = self._pending_extra_logs
        for column, values in extras.items():
            kept = pending[column] or [None] * len(rollout)
            pending[column] = [values[replaced[i]] if i in replaced else value for i, value in enumerate(kept)]
        if self.args.log_completions:
            pending["nfe"], pending["stop_reason"] = rollout.nfe.tolist(), list(rollout.stop_reason)

    def _texts(self, prompts: list[Any], rollout: Rollout) -> list[Any]:
        """Completions as TRL hands them to reward functions: text, or a chat message where prompts are chats."""
        completion_ids = rollout.completion_ids
        if not grpo.is_conversational({"prompt": prompts[0]}):
            texts: list[Any] = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
            return texts
        names = ("response_template", "response_schema")
        if any(getattr(self._tokenizer, name, None) is not None for name in names):
            pairs = zip(completion_ids, rollout.prompt_ids, strict=True)
            return [
                [grpo.parse_response(self._tokenizer, ids, prefix=prompt, tools=self.tools)] for ids, prompt in pairs
            ]
        contents = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": content}] for content in contents]

    def _with_completions(self, batch: dict[str, Any], rollout: Rollout) -> None:
        """Puts the completions that count into a batch that TRL made from those that were decoded first."""
        valid, canvas = batch["canvas_valid"], batch["canvas_ids"]
        width, multiple = int(valid.sum(-1).max()), self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        mask = valid
        if self.mask_truncated_completions:
            last = canvas.gather(1, valid.sum(-1, keepdim=True) - 1)
            ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
            mask = valid & torch.isin(last, ends)
        batch["completion_ids"] = resized(canvas.masked_fill(~valid, self._tokenizer.pad_token_id), width)
        batch["completion_mask"] = resized(mask.long(), width)

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
        batch["drawn_log_probs"] = rollout.trace.raw_log_prob.to(device)
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
        scores = self._score(model, rows_of(inputs), iteration, inputs["completion_ids"].shape[1])
        batch = dict(inputs)  # the buffered batch is used again: never change its tensors
        for name in self.per_iteration:
            if batch.get(name) is not None:
                batch[name] = batch[name][:, min(iteration, batch[name].shape[1] - 1)]
        if iteration == 0:
            self._log_rollout_gap(scores.log_probs, inputs)
        return self.loss(scores, batch)

    def _score(
        self,
        model: Any,
        rows: Rows,
        iteration: int,
        width: int,
        rows_per_forward: int | None = None,
        estimator: Estimator | None = None,
    ) -> PolicyScores:
        """Scores `[B, C]` of rows in the views of an inner iteration, cut or padded to C = `width`."""
        estimator = self.estimator if estimator is None else estimator
        views = estimator.draw(rows, seed=self.args.seed, iteration=iteration)
        if rows.given is not None and not self.scores_hints:
            views = views.without(rows.given)
        with self.accelerator.autocast():
            found = score_views(
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
        entropies = (found.entropies * views.scored).sum(1) / views.scored.sum(1).clamp(min=1)
        scores = resized(estimator.reduce(found.log_probs, views), width)
        return PolicyScores(scores, resized(entropies, width), views, found.log_probs)

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


def places(row_ids: Tensor) -> Tensor:
    """In which order the rows of a batch of completions were asked for, whether or not they were replaced since.

    Completions of a group are next to each other; a replacement counts as the member of its group that it was decoded
    for, so that two of a group may have one place.
    """
    return row_ids % _SECOND_ATTEMPT


def resized(values: Tensor, width: int) -> Tensor:
    """`[B, L]` cut to, or padded with zeros to, `[B, width]`: TRL pads completions to their own longest."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
