"""Likelihoods of models whose noise is random tokens: a mean field, and an evidence lower bound.

The bound. Let a canvas x of n tokens come about like this: draw a random order of positions and start from a canvas u
of uniform random tokens; n times, give the next position of the order a token drawn from the denoiser D, which sees the
tokens written so far and random ones elsewhere, u or fresh ones. The denoiser is not told which are which. Moving the
expectations over the order and over u out of the logarithm (Jensen's inequality, twice) gives

    log p(x) >= E_{k, M, u} [ n/k * sum_{i in M} log D_i(x_i | x with u on M) ],

where k is uniform on 1..n, M a uniform subset of k positions and the token at i counts only for i in M. With each
position in M independently with probability t ~ U(0, 1), and 1/t for n/k, the expectation is the same; a fixed k
varies less. For a mask token in place of u this is LLaDA's bound (arXiv 2502.09992, equations 3 and 14). It is not the
bound of the uniform Markov chain (arXiv 2412.10193), whose terms need the whole distribution at every position and
count positions that were not corrupted, too.

What it leaves out of DiffusionGemma's sampler: positions are accepted by their entropy instead of in random order, may
be taken back, and the result is the most probable canvas of the last step; the decoder also sees its own predictions of
the step before (self-conditioning), which the bound switches off. As with masked models, the estimate stands for the
likelihood in the policy ratio, it is not that of the sampler.

The mean field is the term k = n alone: a canvas of random tokens throughout, each token scored given the prompt only.
A response of several canvases is a product: each canvas has a k of its own and sees the finished ones before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import SCOPES, Estimator
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import position_ids
from rl4dlm.rollout.noise import keyed_uniform


@dataclass(frozen=True, kw_only=True)
class UniformMeanField(MeanField):
    """One view with random tokens in place of the canvas, and of prompt tokens at random.

    Args:
        vocabulary_size: random tokens are 0 to this, exclusive.
        p_mask_prompt: probability that a prompt token is replaced.
        scope: score `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    noise: ClassVar[str] = "uniform"
    vocabulary_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("vocabulary_size", self.vocabulary_size)

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        """True: the random tokens differ from iteration to iteration."""
        return True

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """One view per row: `hidden` `[B, 1, T]`, `weight` `[B, 1, L]` of ones at the scored tokens."""
        views = super().draw(rows, seed=seed, iteration=iteration)
        return Views(views.hidden, views.weight, random_tokens(rows, self.vocabulary_size, 1, seed, iteration))


@dataclass(frozen=True, kw_only=True)
class UniformELBO(Estimator):
    """The evidence lower bound of the module's docstring, from K draws of k, M and u per canvas.

    Args:
        vocabulary_size: random tokens are 0 to this, exclusive.
        block_length: n, tokens of one canvas.
        num_views: K.
        scope: with `"canvas"` the sum of the scores is an unbiased estimate of the bound. With `"valid"` the terms of
            tokens behind the end of sequence are left out of it; they are replaced by random tokens like the others.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    noise: ClassVar[str] = "uniform"
    vocabulary_size: int
    block_length: int
    num_views: int = 1
    scope: str = "valid"

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "block_length", "num_views"):
            _check_size(name, getattr(self, name))
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is not allowed; choose one of {', '.join(SCOPES)}")

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views per row: `hidden` `[B, K, T]`, k tokens of each canvas; `weight` `[B, K, L]`, n / (k K) there."""
        batch, length = rows.valid.shape
        if length % self.block_length:
            raise ValueError(f"a response of {length} tokens is not made of canvases of {self.block_length}")
        device, blocks = rows.canvas_ids.device, length // self.block_length
        row = rows.row_ids[:, None, None]
        n, view = torch.tensor(iteration, device=device), torch.arange(self.num_views, device=device)[:, None]
        block, offset = torch.arange(blocks, device=device), torch.arange(length, device=device)
        level = keyed_uniform(seed, "uniform level", row, n, view, block)  # [B, K, blocks]
        count = (level * self.block_length).long() + 1  # [B, K, blocks]
        place = keyed_uniform(seed, "uniform place", row, n, view, offset)  # [B, K, L]
        place = place.view(batch, self.num_views, blocks, self.block_length)
        rank = place.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        corrupted = (rank < count[..., None]).flatten(2)  # [B, K, L]
        weight = (self.block_length / (count.float() * self.num_views)).repeat_interleave(self.block_length, dim=-1)
        scored = corrupted & rows.valid[:, None] if self.scope == "valid" else corrupted
        prompt = corrupted.new_zeros(batch, self.num_views, rows.prompt_ids.shape[1])
        return Views(
            torch.cat([prompt, corrupted], dim=-1),
            torch.where(scored, weight, 0.0),
            random_tokens(rows, self.vocabulary_size, self.num_views, seed, iteration),
        )


def random_tokens(rows: Rows, vocabulary_size: int, num_views: int, seed: int, iteration: int) -> Tensor:
    """Uniform random tokens, long `[B, K, T]`, keyed by row, iteration, view and position."""
    # Positions count from the first real token, so that the amount of padding does not change what is drawn.
    position = position_ids(rows.attention_mask)[:, None]  # [B, 1, T]
    n, view = torch.tensor(iteration, device=position.device), torch.arange(num_views, device=position.device)[:, None]
    uniform = keyed_uniform(seed, "uniform token", rows.row_ids[:, None, None], n, view, position)
    return (uniform * vocabulary_size).long()


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, 1 or larger")
