"""What is kept of whole distributions over the vocabulary, at chosen positions: for losses against a teacher.

Reductions of logits `[c, V]`, a chunk of positions at a time, as `scoring.py` runs them: full log-probabilities, the
teacher's most probable tokens with all others as one class, log-probabilities of given tokens, and divergences that
leave the chunk as one number per position. Every one is one node of the graph that keeps its chunk of logits and
computes the rest again in the backward pass. Of a teacher's distribution a divergence over the whole vocabulary needs
its hidden states `[n, D]` and its head, so that the teacher's logits, too, exist a chunk at a time.

Owns the formulas. Which positions, whose states and what the numbers are used for is not known here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "tv", "mse")
"""With p the student's distribution and q the teacher's: KL(p, q); KL(q, p); the mean of KL(p, m) and KL(q, m) with m
the mean of both; half the sum of |p - q|; the sum of (log p - log q)^2."""


class PositionReduction(ABC):
    """A reduction whose tensors have an entry for each scored position, so that it can be made of some of them.

    It maps logits `[c, V]` of the positions of a slice to tensors `[c, ...]`. Subclasses are dataclasses.
    """

    @abstractmethod
    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """What is kept of the logits; differentiable where it is floating point."""

    @property
    def constant_count(self) -> int:
        """How many tensors `constants` has."""
        return 0

    def constants(self, part: slice) -> tuple[Tensor, ...]:
        """What is computed once for a chunk, without gradients, and handed to `columns`."""
        return ()

    def picked(self, index: Tensor) -> PositionReduction:
        """The same for some of the positions, long `[m]`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # type: ignore[arg-type]
        chosen = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **chosen)  # type: ignore[type-var]

    def __call__(self, logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        with torch.no_grad():
            constants = self.constants(part)
        found: tuple[Tensor, ...] = _OneNode.apply(self, part, logits, *constants)
        return found


@dataclass(frozen=True)
class HiddenStates(PositionReduction):
    """The states `[n, D]` that the head would be applied to: the head is left out."""

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """Never asked: `scoring.py` returns the states."""
        raise ValueError("HiddenStates is about states, not logits")


@dataclass(frozen=True)
class LogSoftmax(PositionReduction):
    """Log-probabilities `[n, V]` of the whole vocabulary: for few positions.

    Args:
        temperature: divides the logits.
    """

    temperature: float = 1.0

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """`[c, V]`."""
        return ((logits / self.temperature).log_softmax(-1),)


@dataclass(frozen=True)
class TopClasses(PositionReduction):
    """The most probable tokens, long `[n, k]`, and log-probabilities `[n, k + 1]`: theirs, and of all others as one.

    Args:
        count: k; V where it is larger. With k = V the class of all others has log-probability minus infinity.
        temperature: divides the logits.
    """

    count: int
    temperature: float = 1.0

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """Ids, most probable first, and classes."""
        ids = logits.topk(min(self.count, logits.shape[-1]), dim=-1).indices
        return ids, _classes(logits / self.temperature, ids)


@dataclass(frozen=True)
class Classes(PositionReduction):
    """Log-probabilities `[n, k + 1]` of given tokens, and of all others as one class.

    Args:
        ids: long `[n, k]`, different ones at a position.
        temperature: divides the logits.
    """

    ids: Tensor
    temperature: float = 1.0

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """`[c, k + 1]`."""
        return (_classes(logits / self.temperature, self.ids[part]),)


@dataclass(frozen=True)
class Targets(PositionReduction):
    """Of given tokens: log-probabilities `[n]`, whether each is the most probable one, and the entropies there.

    Args:
        ids: long `[n]`.
        temperature: divides the logits of entropies, and not those of log-probabilities.
    """

    ids: Tensor
    temperature: float = 1.0

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """`[c]`: log-probabilities, entropies in nats, and 1 where the token is the arg-max, as long."""
        ids = self.ids[part]
        log_probs = logits.log_softmax(-1)
        cooled = log_probs if self.temperature == 1 else (logits / self.temperature).log_softmax(-1)
        entropies = -(cooled.exp() * cooled).sum(-1)
        right = (logits.argmax(-1) == ids).long()
        return log_probs.gather(-1, ids[:, None]).squeeze(-1), entropies, right


@dataclass(frozen=True)
class Divergence(PositionReduction):
    """The divergence `[n]` of each position's distribution and the teacher's, over the whole vocabulary.

    Args:
        states: `[n, D]`, what the teacher's head is applied to.
        head: maps states `[c, D]` to the teacher's logits `[c, V]`, as `scoring.logits_of` does.
        kind: one of `DIVERGENCES`.
        temperature: divides the logits of both.
        limit: the largest divergence of a position; None: any.
        by_entry: limit each entry of the sum instead, which may turn its gradient away from the teacher.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    kind: str = "reverse_kl"
    temperature: float = 1.0
    limit: float | None = None
    by_entry: bool = False

    @property
    def constant_count(self) -> int:
        return 1

    def constants(self, part: slice) -> tuple[Tensor, ...]:
        """The teacher's log-probabilities `[c, V]`."""
        return ((self.head(self.states[part]) / self.temperature).log_softmax(-1),)

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """`[c]`."""
        student = (logits / self.temperature).log_softmax(-1)
        return (divergence(student, constants[0].to(student.dtype), self.kind, self.limit, self.by_entry),)


@dataclass(frozen=True)
class Draws(PositionReduction):
    """Tokens drawn from the distributions, long `[n]`, and the probabilities of the most probable ones.

    Args:
        uniform: `[n]` in (0, 1), what each is drawn by.
        temperature: divides the logits that are drawn from; 0 takes the most probable tokens.
        never: an id that is not drawn, such as the mask token; None: any is.
    """

    uniform: Tensor
    temperature: float = 0.0
    never: int | None = None

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """`[c]` each."""
        if self.never is not None:
            logits = logits.index_fill(-1, torch.tensor([self.never], device=logits.device), -torch.inf)
        sure = logits.softmax(-1).amax(-1)
        if not self.temperature:
            return logits.argmax(-1), sure
        upto = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        level = self.uniform[part, None].to(upto) * upto[:, -1:]
        return torch.searchsorted(upto, level).squeeze(-1).clamp(max=upto.shape[-1] - 1), sure


@dataclass(frozen=True)
class Together(PositionReduction):
    """Several reductions of the same logits: their tensors one after another, as one node of the graph."""

    parts: Sequence[PositionReduction]

    def picked(self, index: Tensor) -> PositionReduction:
        """Each of them."""
        return Together([part.picked(index) for part in self.parts])

    @property
    def constant_count(self) -> int:
        return sum(each.constant_count for each in self.parts)

    def constants(self, part: slice) -> tuple[Tensor, ...]:
        """Those of all."""
        return tuple(value for each in self.parts for value in each.constants(part))

    def columns(self, logits: Tensor, part: slice, *constants: Tensor) -> tuple[Tensor, ...]:
        """Those of all."""
        found: list[Tensor] = []
        given = list(constants)
        for each in self.parts:
            own, given = given[: each.constant_count], given[each.constant_count :]
            found += each.columns(logits, part, *own)
        return tuple(found)


def divergence(
    student: Tensor, teacher: Tensor, kind: str, limit: float | None = None, by_entry: bool = False
) -> Tensor:
    """One of `DIVERGENCES` from log-probabilities `[..., C]` of all C classes: `[...]`, in nats for the first three.

    Args:
        student: with gradients. teacher: a constant; classes that both give no probability count for nothing.
        kind: one of `DIVERGENCES`.
        limit: the largest value, beyond which there is no gradient; None: any.
        by_entry: the published form of d-OPSD's code: each entry of the sum over classes is limited, so that positive
            entries are cut and negative ones stay: the result may be negative, and its gradient may point away from the
            teacher. Only to reproduce that.

    Raises:
        ValueError: an unknown kind.
    """
    nowhere = (student == -torch.inf) & (teacher == -torch.inf)
    if bool(nowhere.any()):
        lowest = torch.finfo(student.dtype).min / 4  # exp of it is 0, and differences of it are finite
        student, teacher = student.masked_fill(nowhere, lowest), teacher.masked_fill(nowhere, lowest)
    if kind == "reverse_kl":
        entries = student.exp() * (student - teacher)
    elif kind == "forward_kl":
        entries = teacher.exp() * (teacher - student)
    elif kind == "jsd":
        middle = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0, dtype=student.dtype))
        entries = 0.5 * (student.exp() * (student - middle) + teacher.exp() * (teacher - middle))
    elif kind == "tv":
        entries = 0.5 * (student.exp() - teacher.exp()).abs()
    elif kind == "mse":
        entries = (student - teacher).square()
    else:
        raise ValueError(f"divergence={kind!r} is not allowed; choose one of {', '.join(DIVERGENCES)}")
    if by_entry and limit is not None:
        entries = entries.clamp(max=limit)
    total = entries.sum(-1)
    return total if limit is None or by_entry else total.clamp(max=limit)


def renormalised(classes: Tensor) -> Tensor:
    """Log-probabilities `[..., k]` of the first k of `[..., k + 1]` classes, the last of which is left out."""
    return classes[..., :-1].log_softmax(-1)


def _classes(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities `[c, k + 1]` of tokens `[c, k]`, and of the others together."""
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(-1, ids) - total
    if ids.shape[-1] == logits.shape[-1]:
        return torch.cat([own, torch.full_like(total, -torch.inf).detach()], dim=-1)
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - total
    return torch.cat([own, others], dim=-1)


class _OneNode(torch.autograd.Function):
    """The columns of a reduction as one node: it keeps the logits of its chunk, and the rest is computed again.

    Of several nodes, one whose column has no gradient would never run, and hold what checkpointing computes again for
    it until the whole backward pass is over.
    """

    @staticmethod
    def forward(
        ctx: Any, reduction: PositionReduction, part: slice, logits: Tensor, *constants: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.part = reduction, part
        ctx.save_for_backward(logits, *constants)
        found = reduction.columns(logits, part, *constants)
        ctx.mark_non_differentiable(*(column for column in found if not column.is_floating_point()))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *constants = ctx.saved_tensors
        nothing = (None,) * (2 + len(constants))
        with torch.enable_grad():
            logits = saved.detach().requires_grad_()
            found = ctx.reduction.columns(logits, ctx.part, *constants)
        pairs = [(column, g) for column, g in zip(found, gradients, strict=True) if g is not None]
        pairs = [(column, g) for column, g in pairs if column.requires_grad]
        if not pairs:
            return None, *nothing
        columns, given = zip(*pairs, strict=True)
        (gradient,) = torch.autograd.grad(columns, logits, given)
        return None, None, gradient, *(None for _ in constants)
