"""What leaves the engine: the tokens and everything that is known about how they came about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Refinement:
    """Every state of canvases whose tokens may change after they were accepted. S: steps, C: tokens of one canvas.

    A row denoises one canvas after another; what is recorded of a step is about the canvas that it works on. A token
    that was not accepted was replaced by a random one.

    Args:
        tokens: int32 `[N, S, C]`, the canvas that the model saw at each step; -1 behind a row's last step.
        accepted: bool `[N, S, C]`, where the next state has the candidate of this step. At the last step of a canvas it
            decides nothing: the most probable tokens are the result.
    """

    tokens: Tensor
    accepted: Tensor


@dataclass
class Trace:
    """How a canvas was written.

    Args:
        commit_step: long `[N, L]`, the row's own step at which a token was committed for good; -1 where none was drawn:
            a hint, or a slot that was still open when the row stopped at its end-of-sequence token.
        raw_log_prob: float `[N, L]`, log-probability at drawing time, untempered, over the whole vocabulary; 0 at -1.
        log_prob: float `[N, L]`, log-probability of the distribution really drawn from (without the mask token,
            tempered, filtered), or None where nothing was drawn: at temperature 0, or where the most probable tokens of
            the last step are the result.
        steps: long `[N]`, number of steps of each row.
        refinement: the states in between, where tokens may change after they were accepted; None where they never do.
    """

    commit_step: Tensor
    raw_log_prob: Tensor
    log_prob: Tensor | None
    steps: Tensor
    refinement: Refinement | None = None


@dataclass
class Rollout:
    """Finished rows, in the order `row = prompt * num_generations + generation`.

    Args:
        prompt_ids: N lists of prompt token ids, without padding.
        canvas: long `[N, L]`, all completion slots; slots behind an early stop hold the end-of-sequence token.
        valid: bool `[N, L]`, the canvas up to and including the first end-of-sequence token.
        hinted: bool `[N, L]`, slots that were given.
        trace: how the canvas was written.
        nfe: long `[N]`, forwards each row took part in; guidance counts two.
        stop_reason: per row `"complete"` (every slot is written), `"eos"` (stopped early, the valid part is) or
            `"max_steps"` (every slot is written, but a canvas of random tokens was still changing or unsure).
        row_ids: what keyed each row's randomness.
        schedule: name of the schedule. cache: name of the cache policy.
        exact: whether every logit was that of a full forward; False for caches that approximate.
        seed: of the run. weight_version: the engine's, as set by its owner.
        mask_token_id: of the model; None if it has none.
    """

    prompt_ids: list[list[int]]
    canvas: Tensor
    valid: Tensor
    hinted: Tensor
    trace: Trace
    nfe: Tensor
    stop_reason: list[str]
    row_ids: list[int]
    schedule: str
    cache: str
    exact: bool
    seed: int
    mask_token_id: int | None
    weight_version: int | None = None

    def __len__(self) -> int:
        return len(self.canvas)

    @property
    def completion_ids(self) -> list[list[int]]:
        """The valid part of each row as a list of token ids; never empty."""
        return [row[mask].tolist() for row, mask in zip(self.canvas, self.valid, strict=True)]

    def states(self) -> Iterator[Tensor]:
        """The canvas `[N, L]` that the model saw before each step, from the first step to the longest row's last.

        A row that needed fewer steps keeps its final state. Slots that nothing was written to yet hold the mask token,
        or -1 if there is none.
        """
        commit_step, last = self.trace.commit_step, int(self.trace.steps.max()) if len(self) else 0
        open_slot = -1 if self.mask_token_id is None else self.mask_token_id
        refinement = self.trace.refinement
        for step in range(last):
            written = torch.where(commit_step < 0, self.hinted, commit_step < step)
            state = torch.where(written, self.canvas, open_slot)
            if refinement is not None:
                rows = (self.trace.steps > step).nonzero().squeeze(-1)
                first = written[rows].sum(-1, keepdim=True)  # canvases are finished from left to right
                places = first + torch.arange(refinement.tokens.shape[2], device=first.device)
                state[rows[:, None], places] = refinement.tokens[rows, step].long()
            yield state


def valid_mask(canvas: Tensor, eos_token_ids: tuple[int, ...]) -> Tensor:
    """bool `[N, L]`: True up to and including the first token of the end-of-sequence set."""
    is_eos = torch.isin(canvas, torch.tensor(eos_token_ids, dtype=canvas.dtype, device=canvas.device))
    return is_eos.cumsum(-1) - is_eos.long() == 0
