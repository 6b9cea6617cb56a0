"""Likelihoods of models whose noise is random tokens: any estimator that hides tokens behind a mask, with these.

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
A response of several canvases is a product: each canvas has a bound of its own and sees the finished ones before it.

`UniformNoise` draws what another estimator hides and puts random tokens there. Since u is independent of k and M, and
canvases are scored given clean ones, every estimate of the masked bound is one of this bound: counts per canvas
(`UniformELBO`) or over the whole response, complementary pairs, independent tokens, quadrature. What holds for it:

- Current, old and reference policy see the same M and the same u, keyed by row, iteration, view and position.
- A position whose random token happens to be the true one is scored like the others: leaving it out would be biased.
- What M leaves out is not scored, since the denoiser is not told M; for the same reason nothing may depend on M beside
  what is shown, such as weights by visible neighbours.
- With scope `"canvas"` the estimate is of the bound of all canvases, which the rollout then writes. With `"valid"`
  tokens behind the end, and canvases that were never written, have weight 0 and are random in every view; the model
  sees them so, which makes it an estimate for valid tokens beside a random tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_count
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.attention import position_ids
from rl4dlm.rollout.noise import keyed_uniform


@dataclass(frozen=True)
class UniformNoise(Estimator):
    """The views of an estimator with fresh random tokens in place of the mask token; its weights and its reduction.

    Args:
        inner: what is hidden, what it counts for, and what becomes of log-probabilities.
        vocabulary_size: random tokens are 0 to this, exclusive.

    Raises:
        ValueError: an estimator that has random tokens already, or that depends on the order in which masked tokens
            were written.
    """

    noise: ClassVar[str] = "uniform"
    fresh: ClassVar[bool] = True  # type: ignore[misc]  # random tokens differ from iteration to iteration
    inner: Estimator
    vocabulary_size: int

    def __post_init__(self) -> None:
        check_count("vocabulary_size", self.vocabulary_size)
        if self.inner.noise != "mask":
            raise ValueError(f"inner={self.inner} is not allowed; its noise is {self.inner.noise!r}, and not 'mask'")
        if self.inner.as_drawn:
            raise ValueError(
                f"inner={self.inner} is not allowed; its scores are those of tokens that are written once, and under "
                "this noise tokens are written until the last step"
            )

    @property
    def scope(self) -> str:  # type: ignore[override]
        """The inner estimator's."""
        return self.inner.scope

    @property
    def reweighted(self) -> bool:  # type: ignore[override]
        """The inner estimator's."""
        return self.inner.reweighted

    @property
    def shares_masks(self) -> bool:  # type: ignore[override]
        """Whether completions of a prompt may have the same masks, or have them anyway, and then the same tokens."""
        return self.inner.shares_masks or not self.inner.fresh

    @property
    def reads_record(self) -> bool:  # type: ignore[override]
        """The inner estimator's."""
        return self.inner.reads_record

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """The inner estimator's views, with `ids` `[B, K, T]`."""
        views = self.inner.draw(rows, seed=seed, iteration=iteration)
        count = views.hidden.shape[1]
        return Views(views.hidden, views.weight, random_tokens(rows, self.vocabulary_size, count, seed, iteration))

    def reduce(self, log_probs: Tensor, views: Views) -> Tensor:
        """The inner estimator's scores `[B, L]`."""
        return self.inner.reduce(log_probs, views)


class UniformMeanField(UniformNoise):
    """One view with random tokens in place of the canvas, and of prompt tokens at random.

    Args:
        vocabulary_size: random tokens are 0 to this, exclusive.
        p_mask_prompt: probability that a prompt token is replaced.
        scope: score `"valid"` tokens or the whole `"canvas"`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    def __init__(self, p_mask_prompt: float = 0.15, scope: str = "valid", *, vocabulary_size: int) -> None:
        super().__init__(MeanField(p_mask_prompt, scope), vocabulary_size)


class UniformELBO(UniformNoise):
    """The evidence lower bound of the module's docstring, from K draws of k, M and u per canvas.

    Args:
        vocabulary_size: random tokens are 0 to this, exclusive.
        block_length: n, tokens of one canvas.
        num_views: K.
        scope: with `"canvas"` the sum of the scores is an unbiased estimate of the bound; `"valid"`: see above.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    def __init__(self, *, vocabulary_size: int, block_length: int, num_views: int = 1, scope: str = "valid") -> None:
        bound = ELBO(num_views, "count", stratify="none", scope=scope, per_block=True, block_length=block_length)
        super().__init__(bound, vocabulary_size)

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """K views per row: `hidden` `[B, K, T]`, k tokens of each canvas; `weight` `[B, K, L]`, n / (k K) there."""
        assert isinstance(self.inner, ELBO)
        length, block = rows.valid.shape[1], self.inner.block_length
        assert block is not None
        if length % block:
            raise ValueError(f"a response of {length} tokens is not made of canvases of {block}")
        views = super().draw(rows, seed=seed, iteration=iteration)
        return Views(views.hidden, views.weight.float(), views.ids)


def random_tokens(rows: Rows, vocabulary_size: int, num_views: int, seed: int, iteration: int) -> Tensor:
    """Uniform random tokens, long `[B, K, T]`, keyed by row, iteration, view and position."""
    # Positions count from the first real token, so that the amount of padding does not change what is drawn.
    position = position_ids(rows.attention_mask)[:, None]  # [B, 1, T]
    n, view = torch.tensor(iteration, device=position.device), torch.arange(num_views, device=position.device)[:, None]
    uniform = keyed_uniform(seed, "uniform token", rows.row_ids[:, None, None], n, view, position)
    return (uniform * vocabulary_size).long()
