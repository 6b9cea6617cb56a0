"""Where a trainer's rollouts come from: its backend, what of a run goes with it, and what happens when it fails.

Owns the choice, the checks before training, and the calls; what a backend is, is `rl4dlm.rollout.backends`'. TRL's
private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

import inspect
import logging
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.models.checkpoint import dtype_name
from rl4dlm.rollout.backends.backend import BackendError, RolloutBackend
from rl4dlm.rollout.backends.engines import SGLangBackend, VLLMBackend
from rl4dlm.rollout.backends.http import HTTPBackend
from rl4dlm.rollout.backends.in_process import InProcessBackend
from rl4dlm.rollout.backends.weights import check_sendable
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.state import State
from rl4dlm.training.config import DiffusionPolicyConfig
from rl4dlm.training.credit.credit import Credit
from rl4dlm.training.decoder import DecoderTrainer
from rl4dlm.training.interventions.intervention import Intervention
from rl4dlm.training.rollout_columns import FORWARD_COLUMNS

logger = logging.getLogger(__name__)

T = TypeVar("T")

GREEDY_GROUPS = 4
"""Groups of equal completions in a row, at least, that are no chance."""

_OF_SCHEDULES = (
    "schedule", "schedule_args", "denoising_steps", "block_length", "cfg_scale", "cache", "cache_args", "stop_at_eos",
    "min_new_tokens", "eos_penalty", "eos_penalty_decay", "suppress_token_ids", "defer_token_ids",
)  # fmt: skip


class BackendTrainer(DecoderTrainer):
    """Decodes by a rollout backend."""

    backend: RolloutBackend
    """Who decodes rollouts. Exact checks and audits are made in this process, whoever it is."""
    args: DiffusionPolicyConfig
    estimator: Estimator
    credit: Credit | None
    intervention: Intervention | None
    _has_drawn = False
    _identical_groups = 0
    _warned_of_greed = False

    def _build_backend(self) -> RolloutBackend:
        """What the settings ask for, once the trainer knows its policy and how it is decoded.

        Raises ValueError for what does not go with it, BackendError if it is not there.
        """
        if self.args.rollout_backend == "in_process":
            trainer = weakref.ref(self)  # what a trainer holds does not hold the trainer

            def owner() -> BackendTrainer:
                found = trainer()
                assert found is not None
                return found

            return InProcessBackend(
                lambda: owner().spec,  # another model may be lent in the policy's place
                max_batch_rows=self.args.rollout_batch_size,
                progress=self.accelerator.is_local_main_process and not self.args.disable_tqdm,
                in_step=lambda: owner()._any_process if owner()._forwards_differ else None,
                compile=self.args.rollout_compile,
            )
        run: list[Any] = [secrets.token_hex(6)]
        broadcast_object_list(run)
        backend = self._together(lambda: self._build_remote(run[0]))
        self._check_capabilities(backend)
        return backend

    def _build_remote(self, run: str) -> RolloutBackend:
        if self._sharded:
            raise ValueError(
                f"rollout_backend={self.args.rollout_backend!r} is not supported under FSDP, and under ZeRO-3 with "
                "ds3_gather_for_generation=False: one process hands over weights that it has whole; use DDP, ZeRO-2, "
                "or ds3_gather_for_generation=True"
            )
        policy = self.accelerator.unwrap_model(self.model)
        kind = self.args.rollout_backend
        if kind == "http":
            check_sendable(policy)
        elif hasattr(policy, "peft_config") or getattr(policy, "is_quantized", False):
            raise ValueError(
                f"rollout_backend={kind!r} is not supported for a policy with an adapter or quantized weights: what "
                "the server loads is a whole checkpoint; allowed: in_process, and http with an adapter"
            )
        url, folder = self.args.rollout_url, self.args.rollout_weights_dir
        assert url is not None and folder is not None  # the settings are checked
        options: dict[str, Any] = {
            "run": run,
            "writes": self.accelerator.is_main_process,
            "timeout": self.args.rollout_timeout,
            "device": self.accelerator.device,
        }
        if kind != "http":
            return (VLLMBackend if kind == "vllm" else SGLangBackend)(url, folder, self.spec, **options)
        backend = HTTPBackend(url, folder, self.spec, **options)
        own = dtype_name(policy.dtype)
        if backend.dtype != own and self.accelerator.is_main_process:
            logger.warning(
                "rollouts come from a server whose weights are %s, and the policy's are %s: log-probabilities differ "
                "by rounding (diffusion/rollout_gap)",
                backend.dtype,
                own,
            )
        return backend

    def _check_capabilities(self, backend: RolloutBackend) -> None:
        """Raises ValueError where the run needs what the backend cannot do."""
        able, name = backend.capabilities, self.args.rollout_backend
        if able.schedules is None:
            self._check_own_schedule(name)
        if not able.trace:
            for reason in self._reasons_for_record():
                raise ValueError(
                    f"rollout_backend={name!r} is not allowed: its rollouts do not say how completions came about, and "
                    f"{reason}; allowed here: in_process, http"
                )
        if not able.states and self.intervention is not None:
            raise ValueError(
                f"intervention={type(self.intervention).__name__} is not allowed with rollout_backend={name!r}, which "
                "cannot be given slots; allowed here: in_process, http"
            )
        if able.schedules is not None and self.decoding.schedule not in able.schedules:
            raise ValueError(
                f"schedule={self.decoding.schedule!r} is not known to the server at {self.args.rollout_url}; allowed "
                f"with rollout_backend={name!r}: {', '.join(able.schedules)}"
            )

    def _check_own_schedule(self, name: str) -> None:
        """Raises ValueError for settings that the engine's own schedule would not heed."""
        for entry in fields(DiffusionPolicyConfig):
            value = getattr(self.args, entry.name)
            if entry.name == "block_length" and self.args._paper_blocks:
                continue
            if entry.name in _OF_SCHEDULES and value != entry.default:
                raise ValueError(
                    f"{entry.name}={value!r} is not supported with rollout_backend={name!r}, which decodes by a "
                    f"schedule of its own; allowed: {entry.default!r}, or rollout_backend in_process, http"
                )
        if self.estimator.scope == "canvas":
            raise ValueError(
                f"scope='canvas' is not supported with rollout_backend={name!r}: what is behind a completion's end is "
                "not known; allowed: 'valid'"
            )

    def _reasons_for_record(self) -> Iterator[str]:
        """What of this run reads how completions came about."""
        args = self.args
        if self.estimator.reads_record:
            yield f"{type(self).__name__} learns from that"
        if self.estimator.as_drawn:
            yield f"{type(self).__name__} scores tokens as they were drawn, in an order that must be known"
        if self.credit is not None:
            yield f"credit={type(self.credit).__name__} needs it"
        more = set(self.decoding.record) - {"entropy"}
        if more:
            yield f"{type(self).__name__} records {', '.join(sorted(more))}"
        if args.audit_share:
            yield f"audit_share={args.audit_share} compares with it"
        if args.rollout_correction != "none":
            yield f"rollout_correction={args.rollout_correction!r} weighs by the recorded draws"
        if args.log_replays:
            yield f"log_replays={args.log_replays} shows it"
        for function, label in zip(self.reward_funcs, self.reward_func_names, strict=True):
            if isinstance(function, torch.nn.Module):
                continue
            wanted = [column for column in FORWARD_COLUMNS if column in inspect.signature(function).parameters]
            if wanted:
                yield f"the reward function {label} asks for {', '.join(wanted)}"

    def _watch_draws(self, identical: float, groups: int) -> None:
        """Says so, or gives the run up, when all completions of each group are the same, which teaches nothing.

        What counts is `GREEDY_GROUPS` groups one after another, whole batches of them. An engine that nobody here can
        look into, and that has never drawn two different completions in this run, is not drawing: that is an error.
        Otherwise it is the policy, or a low temperature, and a warning, once.
        """
        if not self.args.temperature or self.num_generations < 2:
            return
        if identical < 1:
            self._has_drawn, self._identical_groups = True, 0
            return
        self._identical_groups += groups
        if self._identical_groups < GREEDY_GROUPS:
            return
        said = (
            f"at temperature={self.args.temperature} the {self.num_generations} completions of each of "
            f"{self._identical_groups} prompts in a row are the same"
        )
        if not self.backend.capabilities.deterministic and not self._has_drawn:
            raise BackendError(
                f"{said}: the engine behind rollout_backend={self.args.rollout_backend!r} takes the most probable "
                "tokens whatever it is asked for, or draws every row with one seed, and nothing can be learnt from that"
            )
        if not self._warned_of_greed and self.accelerator.is_main_process:
            logger.warning("%s (diffusion/identical_completion_groups); nothing is learnt from them", said)
        self._warned_of_greed = True

    def _decode(
        self,
        ids: list[list[int]],
        row_ids: list[int],
        hints: Sequence[Mapping[int, int]] | None = None,
        start: State | None = None,
    ) -> Rollout:
        """One completion of each prompt, by the policy as it is. All processes decode together, if only nothing."""
        held = weakref.WeakMethod(self._policy_that_decodes)

        def policy() -> Any:
            lend = held()
            assert lend is not None
            return lend()

        def update() -> None:
            self.backend.update_weights(policy, self.state.global_step)

        def generate() -> Rollout:
            seed = self.args.seed
            return self.backend.generate(ids, self.decoding, row_ids=row_ids, seed=seed, hints=hints, start=start)

        if not self.backend.capabilities.remote:
            update()
            return generate()
        self._together(update)  # no process asks before the server has them
        return self._together(generate)

    def _together(self, call: Callable[[], T]) -> T:
        """What all processes do; where one fails, all raise, so that none waits for it."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = call()
        except Exception as problem:
            error = problem
        failed = self._any_process(error is not None)
        if error is not None:
            raise error
        if failed:
            raise BackendError("the rollouts of another process failed; its own error says why")
        return result  # type: ignore[return-value]
