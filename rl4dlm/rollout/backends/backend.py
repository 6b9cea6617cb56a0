"""What a rollout backend is: prompts to a rollout by the policy as it was last handed over.

Owns the protocol and what a backend says about itself. Trainers know nothing else of where rollouts come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.state import State

Policy = Callable[[], AbstractContextManager[Any]]
"""Lends the policy, whole and unwrapped, for a while. All processes of a run enter it together."""


class BackendError(ConnectionError):
    """A backend cannot be reached, or says something that must not be learnt from."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Args:
        trace: whether rollouts say how they came about, `Rollout.recorded`.
        log_probs: whether they have the log-probability of each draw, at its own step.
        schedules: names that `DecodingConfig.schedule` may have; None: rows are written by a schedule of the engine's
            own, which is chosen where it is started, and of the settings only `canvas_length`, `temperature`, `top_p`
            and `top_k` say something.
        drafts: whether `DecodingConfig.draft_steps` may be above 0.
        states: whether slots may be given (`hints`) and rows go on from a state (`start`).
        deterministic: whether a row follows from its row id, the seed, the prompt and the weights alone.
        remote: whether weights have to be handed over to another process.
    """

    trace: bool
    log_probs: bool
    schedules: tuple[str, ...] | None
    drafts: bool
    states: bool
    deterministic: bool
    remote: bool


class RolloutBackend(Protocol):
    """Decodes prompts with the policy of a training run."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""

    def update_weights(self, policy: Policy, version: int) -> None:
        """From now on rollouts are the policy's, as it is now. All processes of a run call it together.

        Args:
            policy: lends it. version: the number of optimizer steps behind it, for `Rollout.weight_version`.

        Raises:
            BackendError: the weights did not arrive. ValueError: they cannot be handed over as they are.
        """

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
        """One completion of each prompt, as `RolloutEngine.generate`.

        Raises:
            BackendError: it cannot be reached, or answers with other weights than those it was handed last.
            ValueError: what is asked for is not allowed.
        """
