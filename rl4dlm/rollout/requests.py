"""What is recorded only on request: what a step would make of the whole canvas at once, what a policy saw and chose,
where blocks were, and which steps fell back.

Owns the names (`DecodingConfig.record`), what is read off a step's logits for them, and how it is put together. Every
completion comes from the forward that the step decodes from, and only token ids and log-probabilities are kept, never
logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Reading, Scored, lowest_argmax
from rl4dlm.rollout.noise import inverse_cdf

RECORDS = ("entropy", "predictions", "fillings", "filling_log_probs", "flagged", "policy", "blocks")
"""Names that `DecodingConfig.record` allows."""

PREDICTIONS, FILLINGS, FILLING_LOG_PROBS, FLAGGED, POLICY, BLOCKS = RECORDS[1:]

NOTED = ("policy_features", "policy_allowed", "policy_chosen")
"""What `"policy"` keeps of each step, names of `Step.noted` and of `Trace`: what the policy saw, what it could choose
from, and what it chose."""


def completes(record: Collection[str]) -> bool:
    """Whether something is recorded of every open slot."""
    return PREDICTIONS in record or FILLINGS in record


def checked_names(record: Any) -> tuple[str, ...]:
    """The names in one order, each once. Raises ValueError for unknown ones."""
    names = [record] if isinstance(record, str) or not isinstance(record, Collection) else list(record)
    unknown = [name for name in names if name not in RECORDS]
    if unknown or isinstance(record, str):
        raise ValueError(f"record={record!r} is not allowed; it holds names of {', '.join(RECORDS)}")
    if FILLING_LOG_PROBS in names and FILLINGS not in names:
        raise ValueError(f"record={record!r} asks for {FILLING_LOG_PROBS!r} without {FILLINGS!r}; name both")
    return tuple(name for name in RECORDS if name in names)


def checked_steps(steps: Any, record: tuple[str, ...]) -> tuple[int, ...] | None:
    """The steps in ascending order, each once. Raises ValueError for what is no step, and where nothing is kept."""
    if steps is None:
        return None
    if isinstance(steps, str) or not isinstance(steps, Collection) or not steps:
        raise ValueError(f"record_steps={steps!r} is not allowed; it holds steps, integers from 0 on, or is None")
    if any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in steps):
        raise ValueError(f"record_steps={steps!r} is not allowed; steps are integers from 0 on")
    if not completes(record):
        raise ValueError(
            f"record_steps={steps!r} has no meaning for record={record!r}; name 'predictions' or 'fillings', or leave "
            "it None"
        )
    return tuple(sorted(set(steps)))


def check_fillings(count: Any, record: tuple[str, ...]) -> None:
    """Raises ValueError for what is no number of fillings, and where none are kept."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_fillings={count!r} is not allowed; it must be an integer, 1 or larger")
    if count > 1 and FILLINGS not in record:
        raise ValueError(f"num_fillings={count} has no meaning for record={record!r}; name 'fillings', or leave it 1")


@dataclass(frozen=True)
class Requests:
    """What a call records besides the trace that every call has.

    Args:
        names: of `RECORDS`. steps: at which completions are kept; None: all. fillings: Z.
    """

    names: tuple[str, ...]
    steps: tuple[int, ...] | None = None
    fillings: int = 1

    @property
    def complete(self) -> bool:
        """Whether something is recorded of every open slot."""
        return completes(self.names)

    @property
    def readings(self) -> dict[str, Reading]:
        """What is read off the logits of a slot, by name: `[n]` and `[n, Z]`."""
        found: dict[str, Reading] = {}
        if PREDICTIONS in self.names:
            found[PREDICTIONS] = _most_probable
        if FILLINGS in self.names:
            found[FILLINGS] = lambda scored: _filled(scored, self.fillings)
        if FILLING_LOG_PROBS in self.names:
            found[FILLING_LOG_PROBS] = lambda scored: _log_probs(scored, self.fillings)
        return found

    def due(self, steps: Tensor) -> Tensor:
        """bool of the shape of `steps`: at which of them completions are kept."""
        if self.steps is None:
            return torch.ones_like(steps, dtype=torch.bool)
        return torch.isin(steps, torch.tensor(self.steps, device=steps.device))


@dataclass
class Answers:
    """What was asked for, step by step: rows `[r]` of the call, their steps `[r]` and values `[r, ...]`, by name."""

    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, name: str, rows: Tensor, steps: Tensor, values: Tensor) -> None:
        """Appends what was found in a step."""
        self.parts.setdefault(name, []).append((rows, steps, values))

    def completions(self, requests: Requests, name: str, like: Tensor, made: int) -> Tensor | None:
        """All of one name: `[N, K, L]`, or `[N, K, Z, L]` of fillings; None if it was not asked for.

        Args:
            like: `[N, L]`, of the dtype of log-probabilities. made: steps of the longest row; K is this number, or that
                of `requests.steps`. Where a row has no such step ids are -1 and log-probabilities 0.
        """
        if name not in requests.names:
            return None
        count, length = like.shape
        steps = range(made) if requests.steps is None else requests.steps
        shape = (count, len(steps), *([] if name == PREDICTIONS else [requests.fillings]), length)
        dtype, blank = (like.dtype, 0.0) if name == FILLING_LOG_PROBS else (torch.int32, -1)
        found = torch.full(shape, blank, dtype=dtype, device=like.device)
        place = torch.full((max(made, *steps, 0) + 1,), -1, device=like.device)
        place[torch.tensor(steps, dtype=torch.long)] = torch.arange(len(steps), device=like.device)
        for rows, at, values in self.parts.get(name, ()):
            found[rows, place[at], ..., : values.shape[-1]] = values.to(dtype)
        return found

    def flags(self, requests: Requests, like: Tensor, made: int) -> Tensor | None:
        """bool `[N, made]`, steps that fell back; None if that was not asked for."""
        if FLAGGED not in requests.names:
            return None
        found = torch.zeros(len(like), made, dtype=torch.bool, device=like.device)
        for rows, steps, values in self.parts.get(FLAGGED, ()):
            found[rows, steps] = values
        return found

    def per_step(self, name: str, like: Tensor, made: int, blank: float = 0) -> Tensor | None:
        """`[N, made, ...]` of what was added under a name, `blank` where a row made no such step; None if nothing was.

        Args:
            like: `[N, L]`.
        """
        parts = self.parts.get(name)
        if not parts:
            return None
        first = parts[0][2]
        found = first.new_full((len(like), made, *first.shape[1:]), blank)
        for rows, steps, values in parts:
            found[rows, steps] = values
        return found


def check_policy(record: tuple[str, ...], schedule: str, parts: Any) -> None:
    """Raises ValueError where the record of a policy is asked for, and the schedule of this name has none."""
    if POLICY in record and getattr(parts, "policy", None) is None:
        raise ValueError(
            f"record={record!r} asks for {POLICY!r}, but schedule={schedule!r} has no policy that decides; "
            "schedules that have one are 'bernoulli' and 'ctrldiff'"
        )


def completed(tokens: Tensor, masked: Tensor, length: Tensor, read: Tensor, name: str) -> Tensor:
    """What a reading makes of whole canvases: `[r, W]`, or `[r, Z, W]` of fillings.

    Args:
        tokens: long `[r, W]`. masked: bool `[r, W]`. length: long `[r]`, slots that there are; ids behind are -1.
        read: `[r, W]` or `[r, W, Z]`, of open slots.
    """
    exists = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
    if read.dim() == 3:
        read, tokens, masked, exists = read.transpose(1, 2), tokens[:, None], masked[:, None], exists[:, None]
    if name == FILLING_LOG_PROBS:
        return torch.where(masked & exists, read, 0.0)
    return torch.where(exists, torch.where(masked, read, tokens), -1).int()


def _most_probable(scored: Scored) -> Tensor:
    return scored.token if scored.temperature == 0 else lowest_argmax(scored.allowed)


def _fillings(scored: Scored, count: int) -> Sequence[Tensor]:
    """The step's own candidates, and draws apart from them; all are the same at temperature 0."""
    if scored.temperature == 0:
        return [scored.token] * count
    at, probabilities = scored.places, scored.sampling.exp()
    drawn = [scored.token]
    for number in range(1, count):
        uniforms = at.noise.uniform(f"filling {number}", at.row_ids, at.steps, at.positions)
        drawn.append(inverse_cdf(probabilities, uniforms))
    return drawn


def _filled(scored: Scored, count: int) -> Tensor:
    return torch.stack(list(_fillings(scored, count)), dim=-1)


def _log_probs(scored: Scored, count: int) -> Tensor:
    """Under the distribution that is drawn from; 0 at temperature 0, as in a trace."""
    tokens = _filled(scored, count)
    return (
        torch.zeros_like(tokens, dtype=scored.logits.dtype)
        if scored.temperature == 0
        else scored.sampling.gather(-1, tokens)
    )
