"""Resuming exactly: a GRPO trainer whose checkpoints hold each rank's buffered batch and its step counter.

TRL reuses a generation batch for several optimizer steps and saves neither the batch nor how far it has come. Owns the
file, one per rank, and when it is written and read. TRL's private names are used here, and checked on import.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from rl4dlm.files import writing
from rl4dlm.training.contract import check_contract

logger = logging.getLogger(__name__)

check_contract(
    GRPOTrainer,
    parameters={
        "get_train_dataloader": [],
        "_get_train_sampler": ["dataset"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_save_rng_state": ["output_dir"],
    },
    attributes=["_step", "_buffered_inputs", "beta"],
)


class ResumableGRPOTrainer(GRPOTrainer):
    """TRL's, resuming inside a generation cycle: with the same processes and settings, losses go on bit-equal.

    With other processes or batch settings, a fresh generation replaces the batch in use, and a warning says so.
    """

    def get_train_dataloader(self) -> Any:
        """TRL's; asked for whenever training starts, so the generation cycle starts with it."""
        self._step: int = 0
        self._buffered_inputs: list[dict[str, Any]] | None = None
        self._train_sampler: Any = None  # a stream has none
        return super().get_train_dataloader()

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
        own = None if cycle is None or cycle.layout != layout else (cycle.step, cycle.world_size)
        everyone = gather_object([own])  # all ranks must decide alike
        self._step = everyone[0][0] if everyone[0] else self.state.global_step * self.args.gradient_accumulation_steps
        if cycle is not None and all(found == (self._step, world) for found in everyone):
            self._buffered_inputs = cycle.batches
        elif self._is_mid_cycle():
            logger.warning(
                "%s was saved inside a generation cycle by other processes or with other settings of batches or of the "
                "KL term; a fresh generation replaces the batch that was in use, so losses differ from those of an "
                "unbroken run",
                checkpoint,
            )
        generator = getattr(self._train_sampler, "generator", None)
        if generator is not None:
            # TRL's sampler draws from one generator, epoch after epoch, and would start afresh when training resumes.
            for _ in range(int(self.state.epoch or 0)):
                torch.randperm(self._train_sampler.num_samples, generator=generator)

    def _is_mid_cycle(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _cycle_layout(self) -> dict[str, Any]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
        # A buffered batch has the reference's scores only where a KL term was to it.
        return {**{name: getattr(self.args, name) for name in names}, "reference": self.beta != 0.0}


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
