"""The engine of this process as a rollout backend. What is decoded, and how, is the engine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.backends.backend import Capabilities, Policy
from rl4dlm.rollout.decoding import DecodingConfig, available_schedules
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.state import State


class InProcessBackend:
    """Decodes with the policy itself, so that there are no weights to hand over.

    Args:
        spec: gives that of the policy, as it is lent. max_batch_rows, progress, compile: as `RolloutEngine`'s.
        in_step: as `RolloutEngine`'s, asked for before each call; it gives None where processes need not wait.
    """

    def __init__(
        self,
        spec: Callable[[], DiffusionSpec],
        *,
        max_batch_rows: int | None = None,
        progress: bool = False,
        in_step: Callable[[], Callable[[bool], bool] | None] = lambda: None,
        compile: str | None = None,
    ) -> None:
        self.spec, self.max_batch_rows, self.progress, self.in_step = spec, max_batch_rows, progress, in_step
        self.compile = compile
        self._policy: Policy | None = None
        self._version: int | None = None

    @property
    def capabilities(self) -> Capabilities:
        """All that the engine can do."""
        return Capabilities(
            trace=True,
            log_probs=True,
            schedules=tuple(available_schedules()),
            drafts=True,
            states=True,
            deterministic=True,
            remote=False,
        )

    def update_weights(self, policy: Policy, version: int) -> None:
        """Remembers who lends the policy, and the number."""
        self._policy, self._version = policy, version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        *,
        row_ids: Sequence[int],
        seed: int,
        hints: Sequence[Mapping[int, int]] | None = None,
        start: State | None = None,
    ) -> Rollout:
        """As `RolloutEngine.generate`. RuntimeError before weights were handed over."""
        if self._policy is None:
            raise RuntimeError("update_weights comes before generate: there is no policy yet")
        with self._policy() as model:
            engine = RolloutEngine(
                model,
                self.spec(),
                max_batch_rows=self.max_batch_rows,
                progress=self.progress,
                in_step=self.in_step(),
                compile=self.compile,
            )
            engine.weight_version = self._version
            return engine.generate(prompts, config, row_ids=row_ids, seed=seed, hints=hints, start=start)
