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
from rl4dlm.rollout.noise import NoiseSource


class Drawn(NamedTuple):
    """Candidates, one entry per position."""

    token: Tensor  # long: the candidate, never the mask token
    confidence: Tensor  # its probability under the untempered softmax over the whole vocabulary
    raw_log_prob: Tensor  # log-probability under the model's own untempered softmax, before options and guidance
    log_prob: Tensor  # its log-probability under the distribution really drawn from; 0 at temperature 0
    entropy: Tensor  # nats, of the untempered softmax


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
        allowed = self.logits.index_fill(-1, torch.tensor([self.mask_token_id], device=self.logits.device), -torch.inf)
        return allowed if self.banned is None else allowed.masked_fill(self.banned, -torch.inf)

    @cached_property
    def sampling(self) -> Tensor:
        """`[n, V]`, log-probabilities of the distribution that candidates are drawn from: without the tokens that are
        not to be drawn, tempered (temperature 0 counts as 1 here), filtered."""
        return filtered((self.allowed / (self.temperature or 1.0)).log_softmax(-1), self.top_p, self.top_k)

    @cached_property
    def tempered(self) -> Tensor:
        """`[n, V]`, the same over the whole vocabulary, mask token included: where Dream's confidences come from."""
        return filtered((self.logits / (self.temperature or 1.0)).log_softmax(-1), self.top_p, self.top_k)

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

    def drawn(self) -> Drawn:
        """The candidates."""
        chosen = self.log_probs.gather(-1, self.token[:, None]).squeeze(-1)
        own = self.own_log_probs.gather(-1, self.token[:, None]).squeeze(-1)
        log_prob = torch.zeros_like(chosen)
        if self.temperature > 0:
            log_prob = self.sampling.gather(-1, self.token[:, None]).squeeze(-1)
        return Drawn(self.token, chosen.exp(), own, log_prob, self.entropy)


Reading = Callable[[Scored], Tensor]
"""From the logits of n slots to something about each of them, `[n, ...]`."""

Transform = Callable[[Tensor, Places], Tensor]
"""From logits `[n, V]` and the slots they belong to, to other logits."""


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropies `[n]` in nats of log-probabilities `[n, V]`, some of which may be -inf."""
    probabilities = log_probs.exp()
    return -torch.where(probabilities > 0, probabilities * log_probs, 0.0).sum(-1)


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
    """argmax with ties broken by the lower id, which `torch.argmax` does not promise."""
    best = logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits >= best, ids, logits.shape[-1] - 1).amin(-1)


def filtered(log_probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Log-probabilities `[n, V]` renormalised over the tokens that top-k and then top-p keep."""
    if (top_k <= 0 or top_k >= log_probs.shape[-1]) and top_p >= 1.0:
        return log_probs
    ordered, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    drop = (rank >= top_k).expand_as(ordered) if top_k > 0 else torch.zeros_like(ordered, dtype=torch.bool)
    if top_p < 1.0:
        kept = ordered.masked_fill(drop, -torch.inf).softmax(-1)
        drop = drop | (kept.cumsum(-1) - kept >= top_p)
    dropped = torch.zeros_like(drop).scatter(-1, ids, drop)
    return log_probs.masked_fill(dropped, -torch.inf).log_softmax(-1)
