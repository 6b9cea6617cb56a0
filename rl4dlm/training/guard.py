"""The guard between the backward pass and the optimizer: a step is finite on all processes, or it is skipped on all.

Owns the check of losses and gradients, what is said about the first thing that was not finite, when a run is given up,
and the check of parameters before they are written. Transformers' trainer hides such losses (`logging_nan_inf_filter`)
and steps with them. Its private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from rl4dlm.training.contract import check_contract

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 5
"""Skipped steps in a row that end a run, unless it says otherwise."""

check_contract(
    Trainer,
    parameters={
        "_get_grad_norm": ["model", "grad_norm"],
        "_maybe_log_save_evaluate": ["tr_loss"],
        "log": ["logs", "start_time"],
        "save_model": ["output_dir", "_internal_call"],
        "training_step": ["model", "inputs"],
    },
)


class NonFiniteError(RuntimeError):
    """Training was given up, or a model was not written, because something in it is NaN or infinite."""


class GuardedTrainer(Trainer):
    """Skips optimizer steps whose loss or gradient is not finite on some process, on all processes together.

    The gradients are dropped, so that weights and optimizer state stay as they were; the learning rate's schedule goes
    on. `diffusion/skipped_steps` counts them, and `args.max_skipped_steps` in a row end the run with `NonFiniteError`
    before anything is saved. A model with a parameter that is not finite is never written.
    """

    _total_loss_scalar: float
    _skipped_steps = 0
    _skipped_in_a_row = 0
    _noted: list[tuple[str, Tensor, Tensor | None]] | None = None

    def note(self, parts: Mapping[str, Tensor], rows: Tensor | None = None) -> None:
        """Remembers what a loss is made of, in that order, until the step is known to be finite; nothing in evaluation.

        Args:
            parts: what it is called in the message -> tensors whose first dimension is the rows, or scalars.
            rows: ids of the rows, `[B]`.
        """
        if not self.model.training:
            return
        self._noted = self._noted if self._noted is not None else []
        for name, value in parts.items():
            flat = value.detach().reshape(len(value), -1) if value.dim() else value.detach().reshape(1, 1)
            self._noted.append((name, ~flat.isfinite().all(-1), rows if value.dim() else None))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Transformers', whose loss is noted."""
        self._check_overflow_of_deepspeed()
        loss: Tensor = super().training_step(*args, **kwargs)
        self.note({"loss": loss})
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called on every rank once per optimizer step, after the last backward pass and before the optimizer.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        noted, self._noted = self._noted or [], None
        local = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        for _, bad, _ in noted:
            local = local | bad.any()
        by_deepspeed = self.is_deepspeed_enabled  # has stepped already, and looks at gradients itself
        if by_deepspeed:
            local = local | bool(self.accelerator.optimizer_step_was_skipped)
        elif norm is not None:
            local = local | ~torch.as_tensor(norm, device=local.device).isfinite().all()
        if self.accelerator.reduce(local.float().reshape(1), reduction="sum").item() == 0:
            self._skipped_in_a_row = 0
            return norm
        if not by_deepspeed:
            self._drop_gradients()
        self._skipped_steps += 1
        self._skipped_in_a_row += 1
        causes = [cause for cause in gather_object([_first_cause(noted, self.accelerator.process_index)]) if cause]
        message = (
            f"optimizer step {self.state.global_step + 1} was skipped on all processes: "
            f"{'; '.join(causes) or 'the gradient is not finite'}"
        )
        limit = self.args.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            raise NonFiniteError(
                f"{message}. So were the {self._skipped_in_a_row - 1} steps before it (max_skipped_steps={limit}); "
                "nothing was saved: resume from the newest checkpoint with a lower learning rate, or without these rows"
            )
        logger.warning("%s (%d in a row, max_skipped_steps=%d)", message, self._skipped_in_a_row, limit)
        return norm

    def _drop_gradients(self) -> None:
        if self.accelerator.scaler is not None:  # it skips the step itself, where gradients overflow
            for parameter in self.model_wrapped.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)
            return
        self.model_wrapped.zero_grad(set_to_none=True)  # an optimizer passes by parameters without gradient

    def _check_overflow_of_deepspeed(self) -> None:
        """DeepSpeed steps within its backward pass; it drops a step itself if it is told to look at the gradients."""
        engine = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        optimizer = getattr(getattr(engine, "engine", None), "optimizer", None)
        if getattr(optimizer, "check_grad_overflow", None) is False:
            optimizer.check_grad_overflow = True  # type: ignore[union-attr]

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        total = self._total_loss_scalar
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        # It clears the sum of losses by subtracting it from itself, which leaves NaN where one was NaN.
        if self._globalstep_last_logged == self.state.global_step and not tr_loss.isfinite():
            tr_loss.zero_()
        if not math.isfinite(self._total_loss_scalar):
            self._total_loss_scalar = total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Transformers', with the number of skipped steps."""
        if self.model.training and "loss" in logs:
            logs["diffusion/skipped_steps"] = float(self._skipped_steps)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Transformers'; raises `NonFiniteError`, on all processes, before a model that is not finite is written."""
        check_parameters(self.accelerator, self.model_wrapped, output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)


def check_guard(config: Any) -> None:
    """Switches off the filter of the log; raises ValueError for a `max_skipped_steps` that is no positive number."""
    config.logging_nan_inf_filter = False  # it logs 0 in the place of a loss that is not finite
    value = config.max_skipped_steps
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"max_skipped_steps={value!r} is not allowed; it must be a whole number, 1 or larger")


@torch.no_grad()
def check_parameters(accelerator: Any, model: Any, target: str) -> None:
    """Raises `NonFiniteError` on all processes if a parameter, or this process's shard of one, is not finite."""
    bad = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    everyone: list[str] = gather_object(bad[:1])
    if everyone:
        raise NonFiniteError(
            f"nothing was written to {target}: parameter {everyone[0]!r} is not finite, and so would be the model; "
            "resume from a checkpoint before"
        )


def _finite(parameter: Tensor) -> bool:
    shard = getattr(parameter, "ds_tensor", parameter)
    local = shard.to_local() if hasattr(shard, "to_local") else shard
    if not local.is_floating_point() or not local.numel():
        return True
    # A sum is finite only if all of it is, and costs no copy; where it overflows, the elements decide.
    return bool(local.sum(dtype=torch.float64).isfinite()) or bool(local.isfinite().all())


def _first_cause(noted: Iterable[tuple[str, Tensor, Tensor | None]], rank: int) -> str | None:
    for name, bad, rows in noted:
        if bad.any():
            where = f" of rows {_some(rows[bad].tolist())}" if rows is not None else ""
            return f"the {name}{where} is not finite on process {rank}"
    return None


def _some(rows: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")
