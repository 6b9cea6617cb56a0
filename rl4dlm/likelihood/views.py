"""The data of likelihood estimation: rows to be scored, and the corrupted copies (views) they are scored in.

Owns these records and what is checked about them. Which tokens a view hides is an estimator's business, forwards are
`scoring.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepFacts:
    """What was known of each token when it was written; batch first, and None where it was not recorded.

    Args:
        entropy: float `[B, L]`, of the distribution it was drawn from, in nats and untempered; 0 where none was drawn.
        confidence: float `[B, L]`, its probability there; 0 likewise.
        threshold: float `[B]`, the entropy that a step must reach to be scored; the same for all rows of a batch.
        shown: long `[B, K, L]`, the canvas before each of K steps, the mask token where it was open.
        predicted: long `[B, K, L]`, what the step would have made of it at once.
        rank: long `[B, L]`, the place of each token among those that its step chose, -1 where none was drawn.
    """

    entropy: Tensor | None = None
    confidence: Tensor | None = None
    threshold: Tensor | None = None
    shown: Tensor | None = None
    predicted: Tensor | None = None
    rank: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> StepFacts:
        return StepFacts(**{name: None if value is None else value[rows] for name, value in vars(self).items()})


@dataclass
class Rows:
    """Prompts and canvases of a batch, one row per sequence. T = P + L.

    Args:
        prompt_ids: long `[B, P]`, padded on the left.
        prompt_mask: bool or long `[B, P]`, true for real prompt tokens.
        canvas_ids: long `[B, L]`, every completion slot the model saw.
        valid: bool `[B, L]`, the canvas up to and including the first end-of-sequence token.
        row_ids: long `[B]`, what keys a row's randomness; unique in a run.
        seen: bool `[B, L]`, the canvas slots that the model saw while decoding; None: all of them. Schedules that
            change the length of the canvas leave some that it did not.
        given: bool `[B, L]`, the canvas slots that the policy did not write; None: there are none. Estimators draw
            views as if it had; see `Views.without`.
        commit_step: long `[B, L]`, the row's own step at which a token was written, -1 where none was; None: it is not
            known. See `rl4dlm.likelihood.steps`.
        facts: what else was recorded of tokens when they were written.
        told_ids, told_mask: long and bool `[B, Q]`, padded on the left, the prompt that a teacher is given instead;
            None: the same one.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    canvas_ids: Tensor
    valid: Tensor
    row_ids: Tensor
    seen: Tensor | None = None
    given: Tensor | None = None
    commit_step: Tensor | None = None
    facts: StepFacts | None = None
    told_ids: Tensor | None = None
    told_mask: Tensor | None = None

    def __post_init__(self) -> None:
        self.prompt_mask, self.valid = self.prompt_mask.bool(), self.valid.bool()
        if self.prompt_ids.shape != self.prompt_mask.shape or self.canvas_ids.shape != self.valid.shape:
            raise ValueError(
                f"prompt_ids {list(self.prompt_ids.shape)} and prompt_mask {list(self.prompt_mask.shape)}, or "
                f"canvas_ids {list(self.canvas_ids.shape)} and valid {list(self.valid.shape)}, differ in shape"
            )
        if not len(self.prompt_ids) == len(self.canvas_ids) == len(self.row_ids):
            raise ValueError(
                f"{len(self.prompt_ids)} prompts, {len(self.canvas_ids)} canvases and {len(self.row_ids)} row_ids "
                "are not one batch"
            )

    def __len__(self) -> int:
        return len(self.canvas_ids)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        return Rows(
            self.prompt_ids[rows],
            self.prompt_mask[rows],
            self.canvas_ids[rows],
            self.valid[rows],
            self.row_ids[rows],
            None if self.seen is None else self.seen[rows],
            None if self.given is None else self.given[rows],
            None if self.commit_step is None else self.commit_step[rows],
            None if self.facts is None else self.facts[rows],
            None if self.told_ids is None else self.told_ids[rows],
            None if self.told_mask is None else self.told_mask[rows],
        )

    def as_told(self, views: Views) -> tuple[Rows, Views]:
        """Rows and their views as a teacher has them, whose prompts nothing is hidden of; these, where there are none.

        Raises ValueError for views that hide something of the prompt.
        """
        if self.told_ids is None or self.told_mask is None:
            return self, views
        length = self.canvas_ids.shape[1]
        if views.hidden[..., :-length].any():
            raise ValueError("views that hide parts of the prompt mean nothing for another prompt")
        before = self.told_ids.new_zeros(*views.hidden.shape[:2], self.told_ids.shape[1])

        def moved(values: Tensor) -> Tensor:
            return torch.cat([before.to(values.dtype), values[..., -length:]], dim=-1)

        told = replace(self, prompt_ids=self.told_ids, prompt_mask=self.told_mask, told_ids=None, told_mask=None)
        ids = None if views.ids is None else moved(views.ids)
        return told, replace(views, hidden=moved(views.hidden), ids=ids)

    @property
    def ids(self) -> Tensor:
        """Prompt and canvas, long `[B, T]`."""
        return torch.cat([self.prompt_ids, self.canvas_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """bool `[B, T]`: padding is hidden, the canvas is seen as it was while decoding."""
        seen = torch.ones_like(self.valid) if self.seen is None else self.seen
        return torch.cat([self.prompt_mask, seen], dim=1)


@dataclass
class Views:
    """K corrupted copies of each row and what their tokens' log-probabilities count for. Batch first, tensors only.

    Indexing with a slice, a permutation or a mask picks rows, so views may be shuffled and split like the batch itself.

    Args:
        hidden: bool `[B, K, T]`, the tokens of prompt and canvas that a view replaces. What is predicted from them
            depends on the model's attention, see `scoring.py`.
        weight: float `[B, K, L]`, what the log-probability of a canvas token in a view counts for; zero: not computed.
        ids: long `[B, K, T]`, what hidden tokens are replaced by where that is not the mask token.
        targets: long `[B, K, L]`, the canvas tokens whose log-probabilities are wanted, where they are not the row's.
        absent: bool `[B, K, T]`, the tokens that are not there for others of their own block, which do not see them at
            all; None: there are none. For models that denoise block by block; finished blocks are seen whole.
    """

    hidden: Tensor
    weight: Tensor
    ids: Tensor | None = None
    targets: Tensor | None = None
    absent: Tensor | None = None

    def __post_init__(self) -> None:
        if self.hidden.dim() != 3 or self.weight.dim() != 3 or self.hidden.shape[:2] != self.weight.shape[:2]:
            raise ValueError(
                f"hidden must be [B, K, T] and weight [B, K, L]; got {list(self.hidden.shape)} and "
                f"{list(self.weight.shape)}"
            )
        if self.hidden.dtype != torch.bool or not self.weight.is_floating_point():
            raise ValueError(f"hidden must be bool and weight float; got {self.hidden.dtype} and {self.weight.dtype}")
        if self.weight.shape[2] > self.hidden.shape[2]:
            raise ValueError(f"a canvas of {self.weight.shape[2]} tokens does not fit into {self.hidden.shape[2]}")
        if self.absent is not None and self.absent.shape != self.hidden.shape:
            raise ValueError(
                f"absent must be shaped as hidden, {list(self.hidden.shape)}; got {list(self.absent.shape)}"
            )
        if self.ids is not None and self.ids.shape != self.hidden.shape:
            raise ValueError(f"ids must be shaped as hidden, {list(self.hidden.shape)}; got {list(self.ids.shape)}")
        if self.targets is not None and self.targets.shape != self.weight.shape:
            raise ValueError(
                f"targets must be shaped as weight, {list(self.weight.shape)}; got {list(self.targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor) -> Views:
        return self._picked(rows)

    def without(self, tokens: Tensor) -> Views:
        """The same views, in which some canvas tokens (bool `[B, L]`) count for nothing."""
        return replace(self, weight=self.weight.masked_fill(tokens[:, None], 0.0))

    def only(self, view: int) -> Views:
        """One of the K views of each row, as views with K = 1."""
        return self._picked((slice(None), slice(view, view + 1)))

    def first(self, count: int) -> Views:
        """The first so many views of each row."""
        return self._picked((slice(None), slice(count)))

    def _picked(self, index: Any) -> Views:
        picked: dict[str, Any] = {name: None if v is None else v[index] for name, v in vars(self).items()}
        return Views(**picked)

    @property
    def scored(self) -> Tensor:
        """bool `[B, K, L]`, the canvas tokens whose log-probabilities are computed."""
        return self.weight != 0

    def apply(self, ids: Tensor, mask_token_id: int | None) -> Tensor:
        """The corrupted copies of `ids` (long `[B, T]`), long `[B, K, T]`.

        Raises:
            ValueError: tokens are to be hidden behind a mask token, and there is none.
        """
        if self.ids is not None:
            return torch.where(self.hidden, self.ids, ids[:, None])
        if mask_token_id is None:
            raise ValueError("views hide tokens behind a mask token, but the model has none; its noise is random")
        return torch.where(self.hidden, torch.tensor(mask_token_id, device=ids.device), ids[:, None])
