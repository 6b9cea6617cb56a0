"""Stopping when asked to: SIGTERM or SIGUSR1, agreed on by all processes at a step's end, with a checkpoint.

Owns the signals' handlers while training runs, the agreement, and the exit status of the scripts. What a checkpoint is,
is in `checkpoints.py`.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit status of a script whose run was stopped by a signal after a complete checkpoint: EX_TEMPFAIL, "try again"."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """Ends training at the end of the step in which any process was sent SIGTERM or SIGUSR1.

    The step is logged and saved, whatever `save_strategy` is, and not evaluated: time is short. Signals that come
    between `train` calls have their usual effect.
    """

    def __init__(self) -> None:
        self.stopped = False
        """Whether training was ended so; the same on all processes."""
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes over the signals."""
        self.stopped = self._asked = False
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread set handlers; another process may still be told
        for number in SIGNALS:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agrees with the other processes, and asks for a checkpoint and the end."""
        asked = torch.tensor(float(self._asked), device=args.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(asked)
        if asked.item() == 0:
            return
        logger.warning("a signal asks to stop: step %d is saved and training ends", state.global_step)
        self.stopped = True
        control.should_save = True
        control.should_evaluate = False
        control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing is saved or evaluated a second time at the end of an epoch that is cut short."""
        if self.stopped:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the signals back."""
        self.release()

    def release(self) -> None:
        """Restores what the signals did before; also where training ends by an error."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
