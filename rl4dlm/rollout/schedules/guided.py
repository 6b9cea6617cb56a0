"""Guided diffusion (FlashDLM, arXiv 2505.21467): a small causal model says which tokens of a draft may stay.

At each step the denoiser's candidates for all open slots make a draft, and a causal language model with the same
tokenizer reads it once. It agrees with a token that is among its own most probable ones there and not much less
probable than the best. What it agrees with before its first objection is committed, the rest stays open; if that is
nothing, the first open slot is. It never writes a token of its own. Its forwards are counted apart from the denoiser's
(`Rollout.extra_forwards`).

Differences from the released code: any number of rows; a draft reaches to the end of the active block, which is all of
the canvas there; slots that were given are read but not judged; the text is read afresh at each step, without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.causal import causal_model, check_causal, judge
from rl4dlm.rollout.schedules.checks import check_count, check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability
from rl4dlm.rollout.schedules.registry import register

ACCEPT = ("prefix", "all")


@dataclass(frozen=True)
class GuidedArguments:
    """Settings of `guided`. The defaults of the rule are those of the paper's GSM8K runs.

    Args:
        guide: the causal model, or where to load it from. It must have the denoiser's tokenizer.
        top_k: it agrees only with tokens among its k most probable ones; 1 is its greedy choice.
        ratio: and only if their probability is at least this share of the best one's.
        accept: `"prefix"` commits agreed tokens before the first objection only. `"all"` commits those behind it too,
            though the guide has judged them after tokens that do not stay.
    """

    guide: Any = None
    top_k: int = 2
    ratio: float = 0.5
    accept: str = "prefix"

    def __post_init__(self) -> None:
        if self.guide is None:
            raise ValueError("guide=None is not allowed; it must be a causal language model or the path of one")
        check_count(self, "top_k", 1)
        check_number(self, "ratio", 0.0, 1.0)
        if self.accept not in ACCEPT:
            raise ValueError(f"accept={self.accept!r} is not allowed; choose one of {', '.join(ACCEPT)}")


@register("guided", GuidedArguments, takes_steps=False)
def guided(arguments: GuidedArguments, config: Any) -> Schedule:
    """Commits the tokens that a causal model agrees with, and always at least one."""
    prefix = arguments.accept == "prefix"

    def agrees(logits: Tensor, tokens: Tensor) -> Tensor:
        own = logits.gather(-1, tokens[:, None])
        better = (logits > own).sum(-1)
        share = (own.squeeze(-1) - logits.amax(-1)).exp()
        return (better < arguments.top_k) & (share >= arguments.ratio)

    def commit(step: Step, scores: Tensor) -> Tensor:
        draft = torch.where(step.eligible, step.drawn.token, step.tokens)
        agreed = judge(causal_model(arguments.guide), step.prompts, draft, step.eligible, agrees)
        step.extra_forwards.add_(1)
        agreed &= scores > -torch.inf  # what is deferred waits
        if prefix:
            agreed &= (step.eligible & ~agreed).cumsum(-1) == 0
        return agreed

    return Schedule(
        fixed_blocks(config),
        first if prefix else probability,
        commit,
        check=lambda denoiser: check_causal(causal_model(arguments.guide), denoiser),
    )


def first(step: Step) -> Tensor:
    """Scores that put earlier slots first."""
    return -step.offsets.to(step.drawn.confidence.dtype).expand(step.tokens.shape)
