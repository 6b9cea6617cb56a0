"""The mean-field estimator of diffu-GRPO (d1, arXiv 2504.12216, section 3.1).

One view: the whole canvas is hidden, and so is each prompt token with probability p, drawn anew for every inner
iteration. The score of a canvas token is its log-probability there; the sum over tokens stands in for the sequence's
log-likelihood. It is a biased estimate: tokens are treated as independent given the prompt.

Decided differently from the released code: padding is never hidden and never attended to, masks are keyed by row and
iteration instead of re-seeding the global generators, and the iteration counts passes over a batch, not micro-steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl4dlm.likelihood.estimator import SCOPES, Estimator
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import position_ids
from rl4dlm.rollout.noise import keyed_uniform


@dataclass(frozen=True)
class MeanField(Estimator):
    """One view with the canvas hidden and prompt tokens hidden at random.

    Args:
        p_mask_prompt: probability that a prompt token is hidden.
        scope: score `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: a probability outside [0, 1], or an unknown scope.
    """

    p_mask_prompt: float = 0.15
    scope: str = "valid"

    def __post_init__(self) -> None:
        if not 0 <= self.p_mask_prompt <= 1:
            raise ValueError(f"p_mask_prompt={self.p_mask_prompt} is not allowed; it must be between 0 and 1")
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is not allowed; choose one of {', '.join(SCOPES)}")

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        """Whether the prompt masks of two iterations can differ."""
        return 0 < self.p_mask_prompt < 1

    @property
    def shares_masks(self) -> bool:  # type: ignore[override]
        """Whether there are prompt masks: with the same one, completions of a prompt are scored in one input."""
        return self.fresh

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """One view per row: `hidden` `[B, 1, T]`, `weight` `[B, 1, L]` of ones at the scored tokens."""
        # Positions count from the first real token, so that the amount of padding does not change what is hidden.
        position = position_ids(rows.prompt_mask)  # [B, P]
        n = torch.tensor(iteration, device=position.device)
        uniform = keyed_uniform(seed, "prompt mask", rows.row_ids[:, None], n, position)  # [B, P]
        prompt = (uniform < self.p_mask_prompt) & rows.prompt_mask
        hidden = torch.cat([prompt, torch.ones_like(rows.valid)], dim=1)  # [B, T]
        scored = rows.valid if self.scope == "valid" else torch.ones_like(rows.valid)
        return Views(hidden[:, None], scored[:, None].float())
