"""Where a trainer's rollouts come from: its backend, and what of a run goes with it.

Owns the choice and the calls; what a backend is, is `rl4dlm.rollout.backends`'. TRL's private names are used here, and
checked when the file is imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl4dlm.rollout.backends.backend import RolloutBackend
from rl4dlm.rollout.backends.in_process import InProcessBackend
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.state import State
from rl4dlm.training.decoder import DecoderTrainer


class BackendTrainer(DecoderTrainer):
    """Decodes by a rollout backend."""

    backend: RolloutBackend
    """Who decodes the rollouts; not the exact checks and audits, which are this process's."""

    def _build_backend(self) -> RolloutBackend:
        """What the settings ask for, once the trainer knows its policy and how it is decoded."""
        asked, in_step = _weakly(self._any_process), _weakly_owned(self)
        return InProcessBackend(
            self.spec,
            max_batch_rows=self.args.rollout_batch_size,
            progress=self.accelerator.is_local_main_process and not self.args.disable_tqdm,
            in_step=lambda: asked if in_step()._forwards_differ else None,
            compile=self.args.rollout_compile,
        )

    def _decode(
        self,
        ids: list[list[int]],
        row_ids: list[int],
        hints: Sequence[Mapping[int, int]] | None = None,
        start: State | None = None,
    ) -> Rollout:
        """One completion of each prompt, by the policy as it is. All processes decode together, if only nothing."""
        self.backend.update_weights(_weakly(self._policy_that_decodes), self.state.global_step)
        return self.backend.generate(ids, self.decoding, row_ids=row_ids, seed=self.args.seed, hints=hints, start=start)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a trainer that does not keep the trainer: what holds it is held by the trainer."""
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        found = held()
        assert found is not None
        return found(*args)

    return call


def _weakly_owned(trainer: Any) -> Callable[[], Any]:
    held = weakref.ref(trainer)

    def owner() -> Any:
        found = held()
        assert found is not None
        return found

    return owner
