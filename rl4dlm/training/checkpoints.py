"""Checkpoints that are complete or not there, and resuming exactly from them, also inside a generation cycle.

TRL reuses a generation batch for several optimizer steps and saves neither the batch nor how far it has come. Owns when
a checkpoint is written, how it takes its place among the others, and the file of each rank's buffered batch. What makes
a checkpoint complete is `manifest.py`'s. Private names of TRL and transformers are used here, and checked on import.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import has_length
from trl import GRPOConfig, GRPOTrainer

from rl4dlm.evaluation.machine import commit, machine, versions
from rl4dlm.files import writing
from rl4dlm.models.unmasking import write_policy
from rl4dlm.rollout.policies.policy import attached_policy
from rl4dlm.tracking.trackers import Trackers
from rl4dlm.training.contract import check_contract
from rl4dlm.training.manifest import (
    CheckpointError,
    check_checkpoint,
    checkpoints,
    folder_to_resume,
    step_of,
    write_manifest,
)
from rl4dlm.training.moving_reference import MovingReferenceTrainer, is_sharded
from rl4dlm.training.preemption import StopOnSignal

logger = logging.getLogger(__name__)

check_contract(
    Trainer,
    parameters={
        "train": ["resume_from_checkpoint"],
        "_get_output_dir": ["trial"],
        "_init_training_state": ["max_steps"],
        "_push_from_checkpoint": ["checkpoint_folder"],
        "_run_epoch": [],
        "_save": ["output_dir", "state_dict"],
        "_save_checkpoint": ["model", "trial"],
    },
)
check_contract(
    GRPOTrainer,
    parameters={
        "get_train_dataloader": [],
        "_get_train_sampler": ["dataset"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_save_rng_state": ["output_dir"],
    },
    attributes=["_step", "_buffered_inputs", "beta", "ref_model", "reward_func_names"],
)

INCOMPLETE = "incomplete"
"""Folder of a run in which a checkpoint is written before it takes its place."""

# Settings of TRL's that a buffered batch or its scores depend on; those an algorithm adds all count, except for these.
_OF_THE_BATCH = (
    "seed", "max_completion_length", "num_generations", "temperature", "top_p", "top_k", "scale_rewards",
    "reward_weights", "mask_truncated_completions", "disable_dropout", "model_init_kwargs",
)  # fmt: skip
_NO_MATTER = (
    "one_view", "log_replays", "run_group", "run_tags",
    "rollout_batch_size", "max_prompt_length", "overlong_prompts", "audit_share",
    "audit_bound", "audit_action", "rollout_correction", "rollout_correction_clip_max",
    "rollout_compile", "clip", "rollout_url", "rollout_weights_dir", "rollout_timeout",
)  # fmt: skip


class CheckpointingTrainer(Trainer):
    """Transformers' trainer, whose checkpoints appear when they are complete, and which stops when it is asked to.

    A checkpoint is written in the run's folder `incomplete` and takes its name when all processes are done with it.
    `train(resume_from_checkpoint=...)` takes a folder, or True or `"latest"`, as `folder_to_resume` says. SIGTERM and
    SIGUSR1 end training after a checkpoint; `preempted` says so.
    """

    saves_cycles = False
    """Whether checkpoints hold the generation cycle of each process."""

    _saving_in: str | None = None
    _push_later: Callable[[str], None] | None = None
    _stop_on_signal: StopOnSignal | None = None

    @property
    def preempted(self) -> bool:
        """Whether the last `train` was ended by a signal, after a complete checkpoint."""
        return self._stop_on_signal is not None and self._stop_on_signal.stopped

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers', from the checkpoint that `folder_to_resume` finds.

        Raises `CheckpointError` on all processes where the folder named is not complete.
        """
        if self._stop_on_signal is None:
            self._stop_on_signal = StopOnSignal()
            self.add_callback(self._stop_on_signal)
            self._follow_in_trackers()
        folder = self._folder_to_resume(resume_from_checkpoint)
        try:
            return super().train(folder, *args, **kwargs)
        finally:
            self._stop_on_signal.release()

    def tracked_facts(self) -> dict[str, Any]:
        """What trackers are told of the run beside its settings, as entries `rl4dlm/...` of its configuration."""
        return {"trainer": type(self).__name__, "machine": machine(), "versions": versions(), "commit": commit()}

    def _follow_in_trackers(self) -> None:
        trackers = Trackers(self, self.tracked_facts)
        self.callback_handler.callbacks.insert(0, trackers)  # before those that begin runs in trackers
        replays = getattr(self, "_replays", None)
        if replays is not None:
            replays.shown = trackers.show

    def _folder_to_resume(self, wanted: Any) -> str | None:
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = folder_to_resume(wanted, self.args.output_dir, cycles=self.saves_cycles)
            except CheckpointError as error:
                found[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)  # all processes take the same folder, or none trains
        if found[1] is not None:
            raise CheckpointError(found[1])
        folder: str | None = found[0]
        return folder

    def _get_output_dir(self, trial: Any) -> str:
        run_dir: str = super()._get_output_dir(trial)
        return run_dir if self._saving_in is None else self._saving_in

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving_in is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._push_later = super()._push_from_checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        folder, final = Path(run_dir, INCOMPLETE, name), Path(run_dir, name)
        if self.accelerator.is_local_main_process:
            shutil.rmtree(Path(run_dir, INCOMPLETE), ignore_errors=True)  # what a run that was killed has left
        self.accelerator.wait_for_everyone()
        self._saving_in = str(folder.parent)
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # a full disk gets its space back
            raise
        finally:
            self._saving_in = None
        if self.args.should_save and self.state.best_global_step == self.state.global_step:
            # Its final name, where transformers has seen the one it is written under.
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._put_in_place(folder, final)
            self._rotate(run_dir, final)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and folder.is_dir():  # a node with a disk of its own
            self._put_in_place(folder, final)
            self._rotate(run_dir, final)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        if self._push_later is not None:
            push, self._push_later = self._push_later, None
            push(str(final))

    def _put_in_place(self, folder: Path, final: Path) -> None:
        try:
            write_manifest(folder, global_step=self.state.global_step, world_size=self.accelerator.num_processes)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        replaced = folder.with_name(f"replaced-{final.name}")
        if final.exists():  # an earlier run's: damaged, or from before training was resumed
            os.replace(final, replaced)
        os.replace(folder, final)
        shutil.rmtree(folder.parent, ignore_errors=True)

    def _rotate(self, run_dir: str, newest: Path) -> None:
        """Deletes checkpoints beyond `save_total_limit`: incomplete ones first, then the oldest; never the best."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}

        def worth(folder: Path) -> tuple[bool, bool, int]:
            # A step that lies ahead is of a future that this run has left.
            return self._is_complete(folder), step_of(folder) <= step_of(newest), step_of(folder)

        others = sorted((f for f in checkpoints(run_dir) if f.name not in kept), key=worth)
        for folder in others[: max(0, len(others) + len(kept) - limit)]:
            shutil.rmtree(folder, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        model, folder = self.accelerator.unwrap_model(self.model), self.args.output_dir
        folder = folder if output_dir is None else output_dir
        policy = attached_policy(model)
        if policy is not None and (self.is_fsdp_enabled or is_sharded(policy)):
            logger.warning("%s does not hold the model's unmasking policy, which is sharded (FSDP, ZeRO-3)", folder)
        else:
            write_policy(model, folder)

    def _is_complete(self, folder: Path) -> bool:
        try:
            check_checkpoint(folder, cycles=self.saves_cycles, thorough=False)
        except CheckpointError:
            return False
        return True

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        passes, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or has_length(self.train_dataset) or self.args.ignore_data_skip:
            return passes, batches
        # Transformers takes a stream for one endless pass, and would start it again where its first pass is over. Each
        # pass counted as an epoch, and its batches as parts of the steps that were asked for then.
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint, "trainer_state.json")))
        whole = int(saved.epoch or 0)
        return whole, round(((saved.epoch or 0) - whole) * saved.max_steps * self.args.gradient_accumulation_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed behind its last checkpoint has nothing left to do; transformers trains a step before it
        # looks at how many there are.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


class ResumableGRPOTrainer(CheckpointingTrainer, MovingReferenceTrainer, GRPOTrainer):
    """TRL's, resuming inside a generation cycle: with the same processes and settings, losses go on bit-equal.

    With other processes or settings that the batch in use depends on, a fresh generation replaces it, and a warning
    says so.
    """

    saves_cycles = True

    def get_train_dataloader(self) -> Any:
        """TRL's; asked for whenever training starts, so the generation cycle starts with it."""
        self._step: int = 0
        self._buffered_inputs: list[dict[str, Any]] | None = None
        self._train_sampler: Any = None  # a stream has none
        self._train_batches: Any = super().get_train_dataloader()
        return self._train_batches

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_rng_state(self, output_dir: str) -> None:
        # Called on every rank, before the file that makes a checkpoint complete is written.
        super()._save_rng_state(output_dir)
        batches = self._buffered_inputs if self._is_mid_cycle() else None
        cycle = Cycle(self._step, self.accelerator.num_processes, self._cycle_layout(), batches)
        save_cycle(output_dir, self.accelerator.process_index, cycle)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        cycle = load_cycle(checkpoint, self.accelerator.process_index, self.accelerator.device)
        layout, world = self._cycle_layout(), self.accelerator.num_processes
        fits = cycle is not None and cycle.layout == layout
        own = (cycle.step, cycle.world_size) if cycle is not None and fits else None
        everyone = gather_object([own])  # all ranks must decide alike
        self._step = self._steps_done(everyone[0][0] if everyone[0] else None)
        # A checkpoint may have been written after a step's passes and before the optimizer's part of it.
        length = self.args.steps_per_generation * self.num_iterations
        here = self._step // length
        if cycle is not None and all(found and found[0] // length == here and found[1] == world for found in everyone):
            self._buffered_inputs = cycle.batches
        if self._is_mid_cycle() and self._buffered_inputs is None:
            logger.warning(
                "%s was saved inside a generation cycle by other processes or with other settings%s; a fresh "
                "generation replaces the batch that was in use, so losses differ from those of an unbroken run",
                checkpoint,
                "" if cycle is None or fits else f" ({_changes(cycle.layout, layout)})",
            )
        generator = getattr(self._train_sampler, "generator", None)
        if generator is not None:
            # TRL's sampler draws from one generator, epoch after epoch, and would start afresh when training resumes.
            for _ in range(int(self.state.epoch or 0)):
                torch.randperm(self._train_sampler.num_samples, generator=generator)

    def _is_mid_cycle(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _steps_done(self, saved: int | None) -> int:
        """Micro-steps behind the optimizer steps that are done: the last one of an epoch may have fewer."""
        steps, accumulated = self.state.global_step, self.args.gradient_accumulation_steps
        if not has_length(self.train_dataset):
            return steps * accumulated if saved is None else saved
        batches = len(self._train_batches)
        epochs, rest = divmod(steps, max(-(-batches // accumulated), 1))
        return epochs * batches + rest * accumulated

    def _cycle_layout(self) -> dict[str, Any]:
        """What a buffered batch and the scores in it depend on, beside the weights: name -> value."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
        own = {f.name for f in fields(self.args)} - {f.name for f in fields(GRPOConfig)} - set(_NO_MATTER)
        return {
            **{name: getattr(self.args, name) for name in names},
            # A buffered batch has the reference's scores only where a KL term was to it.
            "reference": self._reference_print() if self.beta != 0.0 else None,
            "trainer": type(self).__qualname__,
            "rewards": repr(self.reward_func_names),
            **{name: repr(getattr(self.args, name)) for name in sorted({*own, *_OF_THE_BATCH})},
        }

    def _reference_print(self) -> int:
        """A checksum of the reference's weights, of a few numbers of each; 0 where they are not here or change."""
        if self.args.sync_ref_model:
            return 0
        reference = self.ref_model
        weights = self.model.named_parameters() if reference is None else reference.named_parameters()
        value = 0
        for _, weight in weights:
            if reference is None and weight.requires_grad:  # the adapter that is trained
                continue
            if weight.numel() and not hasattr(weight, "ds_id") and not isinstance(weight, DTensor):
                first = weight.detach().flatten()[:8].to("cpu", copy=True).contiguous()
                value = zlib.crc32(first.view(torch.uint8).numpy().tobytes(), value)
        return value


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The names of settings that differ."""
    return ", ".join(sorted(name for name in {*before, *now} if before.get(name) != now.get(name)))


@dataclass
class Cycle:
    """Where a rank is in its generation cycle.

    Args:
        step: micro-steps since training began.
        world_size: number of processes.
        layout: settings that must not change for the batch to be reused: name -> value.
        batches: the buffered micro-batches; None at the end of a cycle.
    """

    step: int
    world_size: int
    layout: dict[str, Any]
    batches: list[dict[str, Any]] | None


def save_cycle(folder: str, rank: int, cycle: Cycle) -> None:
    """Writes a rank's cycle into a checkpoint folder; a kill leaves the file complete or absent."""
    with writing(_path(folder, rank)) as file:
        torch.save(asdict(cycle), file)


def load_cycle(folder: str, rank: int, device: torch.device) -> Cycle | None:
    """A rank's cycle, or None where there is no file for that rank."""
    path = _path(folder, rank)
    if not path.is_file():
        return None
    cycle = Cycle(**torch.load(path, map_location="cpu", weights_only=True))
    for batch in cycle.batches or ():
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[name] = value.to(device)
    return cycle


def _path(folder: str, rank: int) -> Path:
    return Path(folder) / f"generation_cycle_{rank}.pt"
