"""EDLM (arXiv 2410.21357): several drafts of the canvas, one of them kept by what a causal model thinks of them.

A denoiser draws the tokens of a step independently of each other. Here it draws k drafts of all open slots; the energy
of a draft x is E(x) = log q(x) - log p(x), q being the distribution it was drawn from and p a causal language model
with the same tokenizer, and one draft is kept with probability softmax(-E). The more drafts, the closer the kept one is
to a draw from p among those that q can make. What is committed of it is up to a plain schedule: an even number of
tokens per step, in random order as in the paper or the most probable ones first. Only steps within a window of noise
levels, the open share of the block, are treated so; later tokens are determined by what is there.

What is recorded: the log-probability of a committed token is that under q, which drew it, and the selection
log-probability of a step is that of the draft among the k, log softmax(-E). Their sum is the log-probability of what
was done, given the drafts that were not kept. It is not the probability of the canvas under this schedule, which has no
closed form, so that ratios made of committed tokens alone are biased for k > 1.

Differences from the released code, which weighs drafts by softmax(+E), takes probabilities for log-probabilities in q
and mixes the rows of a batch: here energies and their sign follow the paper. q is the distribution really drawn from:
without the mask token, tempered, filtered. p counts every token of the draft, not only the open slots, since tokens
that are written say something about those before them; both end with the first end-of-sequence token. With several
blocks a draft ends with the active one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.causal import causal_model, check_causal, judge, log_prob
from rl4dlm.rollout.drawing import Drawn, Scored
from rl4dlm.rollout.noise import inverse_cdf
from rl4dlm.rollout.schedules.checks import check_count
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, even_top, probability, random_order
from rl4dlm.rollout.schedules.registry import register

ORDERS = {"random": random_order, "low_confidence": probability}
TOKEN, RAW, LOG_PROB, CONFIDENCE = range(4)


@dataclass(frozen=True)
class EDLMArguments:
    """Settings of `edlm`.

    Args:
        energy: the causal model, or where to load it from. It must have the denoiser's tokenizer.
        drafts: k, each of which costs a forward of the causal model per step. 1 is the plain schedule.
        window: smallest and largest open share of a block at which drafts are weighed; the paper weighs the early
            steps.
        order: of commitment: `"random"` or `"low_confidence"`.
    """

    energy: Any = None
    drafts: int = 2
    window: tuple[float, float] = (0.4, 1.0)
    order: str = "random"

    def __post_init__(self) -> None:
        if self.energy is None:
            raise ValueError("energy=None is not allowed; it must be a causal language model or the path of one")
        check_count(self, "drafts", 1)
        window: Any = self.window
        if not _is_window(window):
            raise ValueError(f"window={window!r} is not allowed; it must be two numbers, 0 <= smallest <= largest <= 1")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not allowed; choose one of {', '.join(ORDERS)}")


def _is_window(value: Any) -> bool:
    numbers = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
    return numbers and 0 <= value[0] <= value[1] <= 1


@register("edlm", EDLMArguments, fixed_forwards=True)
def edlm(arguments: EDLMArguments, config: Any) -> Schedule:
    """Commits tokens of the draft that a causal model prefers.

    Raises:
        ValueError: at temperature 0, where all drafts are the same.
    """
    if arguments.drafts > 1 and config.temperature == 0:
        raise ValueError(
            f"drafts={arguments.drafts} needs a temperature above 0, at which they differ; temperature=0 allows 1 only"
        )
    return Schedule(
        fixed_blocks(config),
        ORDERS[arguments.order],
        even_top(config.steps_per_block),
        propose=_resampled(arguments),
        reads={"drafts": _more_drafts(arguments.drafts - 1)},
        draws_positions=arguments.drafts > 1,
        check=lambda denoiser: check_causal(causal_model(arguments.energy), denoiser),
    )


def _more_drafts(count: int) -> Callable[[Scored], Tensor]:
    """A reading: further draws for each slot, float64 `[n, count, 4]`."""

    def reading(scored: Scored) -> Tensor:
        at = scored.places
        drafts = scored.logits.new_zeros(len(scored.logits), count, 4, dtype=torch.float64)
        for i in range(count):
            token = inverse_cdf(
                scored.sampling.exp(), at.noise.uniform(f"draft {i + 1}", at.row_ids, at.steps, at.positions)
            )
            drafts[:, i, TOKEN] = token.double()
            for column, values in (
                (RAW, scored.own_log_probs),
                (LOG_PROB, scored.sampling),
                (CONFIDENCE, scored.log_probs),
            ):
                drafts[:, i, column] = values.gather(-1, token[:, None]).squeeze(-1).double()
        drafts[..., CONFIDENCE] = drafts[..., CONFIDENCE].exp()
        return drafts

    return reading


def _resampled(arguments: EDLMArguments) -> Callable[[Step], Drawn]:
    low, high = arguments.window

    def propose(step: Step) -> Drawn:
        share = step.eligible.sum(-1) / step.masked_at_start.clamp(min=1)
        rows = ((share >= low) & (share <= high)).nonzero().squeeze(-1)
        if not len(rows):
            return step.drawn
        drafts = _drafts(step)  # [R, W, k, 4]
        weights = (-_energies(step, drafts, rows, causal_model(arguments.energy))).log_softmax(-1)  # [r, k]
        kept = inverse_cdf(weights.exp(), step.uniform("draft")[rows, 0])
        step.selection_log_prob[rows] += weights.gather(-1, kept[:, None]).squeeze(-1).to(step.selection_log_prob)
        step.extra_forwards[rows] += arguments.drafts
        chosen = torch.zeros_like(step.block).index_put((rows,), kept)  # outside the window the first draft stays
        taken = drafts[torch.arange(len(drafts), device=rows.device), :, chosen]  # [R, W, 4]
        return Drawn(
            token=taken[..., TOKEN].long(),
            confidence=taken[..., CONFIDENCE].to(step.drawn.confidence),
            raw_log_prob=taken[..., RAW].to(step.drawn.raw_log_prob),
            log_prob=taken[..., LOG_PROB].to(step.drawn.log_prob),
            entropy=step.drawn.entropy,
        )

    return propose


def _drafts(step: Step) -> Tensor:
    """All drafts, that which the engine drew first; float64 `[R, W, k, 4]`."""
    drawn = step.drawn
    values = (drawn.token, drawn.raw_log_prob, drawn.log_prob, drawn.confidence)
    own = torch.stack([value.double() for value in values], dim=-1)
    return torch.cat([own[:, :, None], step.read["drafts"]], dim=2)


def _energies(step: Step, drafts: Tensor, rows: Tensor, causal: Any) -> Tensor:
    """E of each draft of some rows, float64 `[r, k]`, up to what they share; one draft of each at a time goes through
    the model."""
    eligible = step.eligible[rows]
    read = (eligible.cumsum(-1) > 0) & (step.offsets < step.stop[rows, None])  # the same text precedes all drafts
    prompts = [step.prompts[row] for row in rows.tolist()]
    energies = []
    for i in range(drafts.shape[2]):
        draft = torch.where(eligible, drafts[rows, :, i, TOKEN].long(), step.tokens[rows])
        ended = step.is_eos(draft).long()
        counted = read & (ended.cumsum(-1) - ended == 0)
        own = (drafts[rows, :, i, LOG_PROB] * (eligible & counted)).sum(-1)
        energies.append(own - judge(causal, prompts, draft, counted, log_prob).double().sum(-1))
    return torch.stack(energies, dim=-1)
