"""From logits at slots of a canvas to candidate tokens and what schedules need to know about them.

Owns the one reduction over the vocabulary that decoding does. Which candidates are committed is a schedule's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.noise import BLOCK, NoiseSource, per_block

NUCLEUS = 1024
"""Tokens that top-p looks at first."""

NEIGHBOURS = 64
"""Tokens that top-k looks at besides those it keeps, to see that no others are as probable."""

GROWTH = 8
"""How many times as many are looked at next, in rows where they are not enough."""

PART_ELEMENTS = 2**21
"""Logits reduced at once on a CPU, in elements: 8 MiB in float32."""


class Drawn(NamedTuple):
    """Candidates, one entry per position."""

    token: Tensor  # long: the candidate, never the mask token
    confidence: Tensor  # its probability under the untempered softmax over the whole vocabulary
    raw_log_prob: Tensor  # log-probability under the model's own untempered softmax, before options and guidance
    log_prob: Tensor  # its log-probability under the distribution really drawn from; 0 at temperature 0
    entropy: Tensor  # nats, of the untempered softmax; NaN where neither the schedule nor the record wants it


@dataclass(frozen=True)
class Places:
    """Which slots logits belong to; n of them.

    Args:
        rows: long `[n]`, rows of the batch. positions: long `[n]`, canvas offsets.
        held: long `[n]`, the token now there; the mask token where nothing is written.
        row_ids: long `[n]`, which key randomness. steps: long `[n]`, steps each row has made.
        noise: keyed by row id, step and position.
        memory: of the batch's rows; index it with `rows`, and with `positions` for what is kept per slot.
        embedding: returns the model's embedding module.
    """

    rows: Tensor
    positions: Tensor
    held: Tensor
    row_ids: Tensor
    steps: Tensor
    noise: NoiseSource
    memory: Memory
    embedding: Callable[[], Any] | None = None

    @property
    def embeddings(self) -> Tensor:
        """`[V, D]`, the weights of the model's input embeddings."""
        assert self.embedding is not None
        weight: Tensor = self.embedding().weight
        return weight

    def at(self, part: slice) -> Places:
        """Some of the slots."""
        several = ("rows", "positions", "held", "row_ids", "steps")
        return dataclasses.replace(self, **{name: getattr(self, name)[part] for name in several})


@dataclass(frozen=True)
class Scored:
    """Logits of n slots and what follows from them, as a reading sees them.

    Args:
        logits: `[n, V]`, float32 or wider, after guidance and transforms.
        temperature, top_p, top_k: of the decoding settings.
        mask_token_id: of the model.
        banned: bool `[n, V]`, tokens that are not to be drawn there besides the mask token, or None.
        places: which slots they are.
        model_logits: `[n, V]`, before the schedule's transform.
        own_logits: `[n, V]`, the model's own: before that, options that change logits, and guidance. None: `logits`.
    """

    logits: Tensor
    temperature: float
    top_p: float
    top_k: int
    mask_token_id: int
    banned: Tensor | None
    places: Places
    model_logits: Tensor | None = None
    own_logits: Tensor | None = None

    @cached_property
    def log_probs(self) -> Tensor:
        """`[n, V]`, the untempered log-softmax over the whole vocabulary."""
        return self.logits.log_softmax(-1)

    @cached_property
    def own_log_probs(self) -> Tensor:
        """`[n, V]`, the model's own untempered log-softmax, before options, guidance and transforms."""
        if self.own_logits is None or self.own_logits is self.logits:
            return self.log_probs
        return self.own_logits.log_softmax(-1)

    @cached_property
    def entropy(self) -> Tensor:
        """`[n]`, of that, in nats."""
        return entropy_of(self.log_probs)

    @cached_property
    def allowed(self) -> Tensor:
        """`[n, V]`, logits with -inf at tokens that are not to be drawn."""
        return self._without_banned(self.logits.clone())

    @cached_property
    def sampling(self) -> Tensor:
        """`[n, V]`, log-probabilities of the distribution that candidates are drawn from: without the tokens that are
        not to be drawn, tempered (temperature 0 counts as 1 here), filtered."""
        warm = self.logits.clone() if self.temperature in (0, 1) else self.logits / self.temperature
        return filtered(self._without_banned(warm).log_softmax(-1), self.top_p, self.top_k)

    @cached_property
    def tempered(self) -> Tensor:
        """`[n, V]`, the same over the whole vocabulary, mask token included: where Dream's confidences come from."""
        warm = self.log_probs
        if self.temperature not in (0, 1):
            warm = (self.logits / self.temperature).log_softmax(-1)
        return filtered(warm, self.top_p, self.top_k)

    def later(self, steps: int) -> Scored:
        """The same logits with the noise of a later step of each row; what does not depend on the draw is shared."""
        other = dataclasses.replace(self, places=dataclasses.replace(self.places, steps=self.places.steps + steps))
        shared = ("log_probs", "own_log_probs", "entropy", "allowed", "sampling", "tempered")
        vars(other).update({name: vars(self)[name] for name in shared if name in vars(self)})
        return other

    @property
    def held_log_prob(self) -> Tensor:
        """`[n]`, the untempered log-probability of the token now in each slot; of the mask token in open ones."""
        return self.log_probs.gather(-1, self.places.held[:, None]).squeeze(-1)

    @cached_property
    def token(self) -> Tensor:
        """long `[n]`, the candidates; drawn at a temperature above 0, else the most probable ones."""
        if self.temperature == 0:
            return lowest_argmax(self.allowed)
        return self.places.noise.draw(
            self.sampling.exp(), self.places.row_ids, self.places.steps, self.places.positions
        )

    def drawn(self, *, entropy: bool = True) -> Drawn:
        """The candidates; without `entropy`, which costs a good part of all this, it is NaN."""
        chosen = self.log_probs.gather(-1, self.token[:, None]).squeeze(-1)
        own = chosen
        if self.own_log_probs is not self.log_probs:
            own = self.own_log_probs.gather(-1, self.token[:, None]).squeeze(-1)
        log_prob = torch.zeros_like(chosen)
        if self.temperature > 0:
            log_prob = self.sampling.gather(-1, self.token[:, None]).squeeze(-1)
        spread = self.entropy if entropy else torch.full_like(chosen, torch.nan)
        return Drawn(self.token, chosen.exp(), own, log_prob, spread)

    def _without_banned(self, fresh: Tensor) -> Tensor:
        """The same tensor `[n, V]`, which nobody else holds, with -inf at tokens that are not to be drawn."""
        fresh[:, self.mask_token_id] = -torch.inf
        return fresh if self.banned is None else fresh.masked_fill_(self.banned, -torch.inf)


Reading = Callable[[Scored], Tensor]
"""From the logits of n slots to something about each of them, `[n, ...]`."""

Transform = Callable[[Tensor, Places], Tensor]
"""From logits `[n, V]` and the slots they belong to, to other logits."""


Reduction = Callable[[Tensor, slice, Tensor], tuple[Tensor, ...]]
"""From logits `[c, V]` of some slots, which of all slots they are, and the model's own logits, to `[c, ...]` each."""


def in_parts(reduce: Reduction) -> Reduction:
    """The same reduction, on a CPU over a few rows at a time.

    What it makes on the way is then small enough to stay in the cache, and the next rows write to the same memory: for
    tensors as large as the logits, fetching fresh memory costs more than the arithmetic.
    """

    def parts(logits: Tensor, part: slice, own: Tensor) -> tuple[Tensor, ...]:
        size = max(1, PART_ELEMENTS // logits.shape[-1])
        if logits.device.type != "cpu" or len(logits) <= size:
            return reduce(logits, part, own)
        found = []
        for start in range(0, len(logits), size):
            some = logits[start : start + size]
            here = slice(part.start + start, part.start + start + len(some))
            found.append(reduce(some, here, some if own is logits else own[start : start + size]))
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    return parts


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropies `[n]` in nats of log-probabilities `[n, V]`, some of which may be -inf."""
    # softmax gives the probabilities back, and unlike exp it is no slower where they vanish. The lowest finite number
    # stands in for -inf, so that 0 times it is 0.
    probabilities = log_probs.softmax(-1)
    return -probabilities.mul_(log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def coarse_divergence(log_probs: Tensor, tokens: Tensor, before: Tensor) -> Tensor:
    """Kullback-Leibler divergence that tells some tokens apart and takes all others as one.

    Args:
        log_probs: `[n, V]`. tokens: long `[n, k]`. before: `[n, k]`, log-probabilities of these tokens under the
            distribution to compare with.

    Returns:
        `[n]` in nats, exact if the k tokens are all there are, else no larger than the divergence.
    """
    now = log_probs.gather(-1, tokens)
    single = torch.where(now.isneginf(), 0.0, now.exp() * (now - before)).sum(-1)
    tiny = torch.finfo(now.dtype).eps
    rest, rest_before = ((1 - part.exp().sum(-1)).clamp(min=tiny) for part in (now, before))
    return (single + rest * (rest / rest_before).log()).clamp(min=0)


def lowest_argmax(logits: Tensor) -> Tensor:
    """argmax over the last dimension with ties broken by the lower id, long; any id where there are NaN.

    The lowest id of the first block that holds the maximum, so that the vocabulary is read once and nothing as large as
    it is written.
    """
    size = logits.shape[-1]
    if size <= BLOCK:
        return logits.argmax(-1)  # which returns the first of equals
    best = per_block(logits, lambda part: part.amax(-1))  # [..., V / BLOCK]
    columns = best.argmax(-1, keepdim=True) * BLOCK + torch.arange(BLOCK, device=logits.device)
    # Columns behind the vocabulary repeat the last one, which comes before them.
    inside = logits.gather(-1, columns.clamp(max=size - 1)).argmax(-1, keepdim=True)
    return columns.gather(-1, inside).squeeze(-1).clamp(max=size - 1)


def filtered(log_probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Log-probabilities `[n, V]` renormalised over the tokens that top-k and then top-p keep; -inf elsewhere.

    Top-k keeps the k most probable tokens; top-p of what is left the most probable ones up to the first with which
    their mass, summed in float64, reaches `top_p`. Of equally probable tokens the lower id comes first.

    The vocabulary is not sorted: the most probable tokens are enough where the last one kept is more probable than the
    last one looked at. Rows where it is not are looked at in more of them, and at last in all.
    """
    size = log_probs.shape[-1]
    if (top_k <= 0 or top_k >= size) and top_p >= 1.0:
        return log_probs
    first = top_k + NEIGHBOURS if top_k > 0 else NUCLEUS
    kept, rows = log_probs, torch.empty(0)
    for count in (first, GROWTH * first, size):
        if count > size:
            continue
        part = log_probs if kept is log_probs else log_probs[rows]
        values, ids, settled = _most_probable(part, count, top_p, top_k)
        found = torch.full_like(part, -torch.inf).scatter_(-1, ids, values)
        kept = found if kept is log_probs else kept.index_copy_(0, rows, found)
        if count == size:
            break
        left = (~settled).nonzero().squeeze(-1)
        if not len(left):
            break
        rows = rows[left] if len(rows) else left
    return kept.log_softmax(-1)


def _most_probable(log_probs: Tensor, count: int, top_p: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What top-k and top-p make of the `count` most probable tokens.

    Returns:
        values: `[n, count]` in descending order, -inf where they drop a token. ids: long `[n, count]`. settled: bool
        `[n]`, whether it is what they make of all tokens.
    """
    whole = count == log_probs.shape[-1]
    if whole:
        values, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    else:  # topk does not say which of equals it returns, nor in which order
        ids = log_probs.topk(count, sorted=False).indices.sort(dim=-1).values
        values, order = log_probs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
    drop = torch.zeros_like(values, dtype=torch.bool)
    if top_k > 0:
        drop[:, top_k:] = True
    if top_p < 1.0:
        if whole or top_k > 0:
            mass = values.masked_fill(drop, -torch.inf).double().softmax(-1)
        else:
            mass = values.double().exp()
            mass = mass / torch.where(values[:, -1:].isneginf(), mass.sum(-1, keepdim=True), 1.0)
        drop |= mass.cumsum(-1) - mass >= top_p
    last = values.gather(-1, (~drop).sum(-1, keepdim=True) - 1)
    settled = (last > values[:, -1:]) | values[:, -1:].isneginf()
    return values.masked_fill(drop, -torch.inf), ids, settled.squeeze(-1)
