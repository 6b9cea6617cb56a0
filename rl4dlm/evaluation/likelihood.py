"""How probable a model finds given continuations, by an estimator that the result names.

Owns the way from text to sums of log-probabilities: encoding, batches, what an estimator's name means for a model.
Views are `rl4dlm.likelihood`'s. What a request is worth depends on its own tokens, the seed and the weights: its draws
are keyed by what it holds, so that other requests, their order and the size of batches change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.blockwise import BlockELBO
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.uniform import UniformNoise
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.adapters import base_model
from rl4dlm.models.attention import BLOCK_KINDS, LEFT_TO_RIGHT
from rl4dlm.models.canvas import denoises_canvases
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.tasks.prompts import encode_prompt

ESTIMATORS = ("auto", "left_to_right", "elbo", "block_elbo", "mean_field")
"""Names that `log_likelihood` takes."""

EXACT, BOUND, OTHER = "exact", "lower bound", "no bound"
"""What values can be: the log-likelihood of writing from left to right, an estimate of a bound, or neither."""

ROWS = 16
"""Sequences in a forward, where nothing else is said."""

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class LogLikelihoods:
    """What `log_likelihood` found, one entry per request, in their order.

    Args:
        values: in nats, summed over the tokens of the continuation; see `kind`.
        standard_errors: of the Monte Carlo estimate, from the spread of its draws, which are stratified, so that the
            true ones are smaller; 0 where nothing is random, None where they are not known.
        tokens: of each continuation.
        estimator: its name, or its class, and `settings` its own.
        kind: `"exact"`: of writing one token per step from left to right. `"lower bound"`: an unbiased estimate of the
            evidence lower bound, over orders. `"no bound"`: neither.
    """

    values: list[float]
    standard_errors: list[float | None]
    tokens: list[int]
    estimator: str
    settings: dict[str, Any]
    kind: str


@torch.no_grad()
def log_likelihood(
    model: Any,
    prompts: Sequence[Prompt],
    continuations: Sequence[str | Sequence[int]],
    *,
    tokenizer: Any = None,
    estimator: str | Estimator = "auto",
    num_views: int = 128,
    block_length: int | None = None,
    seed: int = 0,
    batch_rows: int = ROWS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> LogLikelihoods:
    """Log-likelihoods, or estimates of bounds, of continuations given their prompts.

    The model sees prompt and continuation and nothing behind them: no end of sequence is added.

    Args:
        model: a denoiser, see `load_denoiser`.
        prompts: text, chat messages or token ids; none may be empty.
        continuations: one per prompt, text or token ids. Text behind text is encoded together with it, with the spaces
            between the two at its beginning, as lm-eval does; behind messages or ids it is encoded by itself.
        tokenizer: of the model; for text and messages.
        estimator: `"left_to_right"`, exact for decoding one token per step from left to right, a view per token (of a
            block, where attention has blocks); `"elbo"`, the evidence lower bound over all orders (LLaDA, arXiv
            2502.09992, equation 14), counts in complementary pairs, drawn per block where attention has blocks;
            `"block_elbo"`, that of writing block after block with full attention; `"mean_field"`, everything hidden at
            once (d1, without prompt masking); `"auto"`, the first where attention looks to the left only, else the
            second; or an estimator of `rl4dlm.likelihood`.
        num_views: of the two bounds. LLaDA's authors take 128.
        block_length: of `"block_elbo"`, in tokens.
        seed: keys every draw, together with the tokens of the request.
        batch_rows: sequences in a forward.
        chat_template_kwargs: for the chat template.

    Raises:
        ValueError: names the setting, the value and what is allowed; or the request that cannot be scored.
    """
    spec = DiffusionSpec.of(model)
    if batch_rows < 1:
        raise ValueError(f"batch_rows={batch_rows} is not allowed; it must be 1 or larger")
    if len(prompts) != len(continuations):
        raise ValueError(
            f"{len(prompts)} prompts and {len(continuations)} continuations; there must be as many of both"
        )
    chosen, name = named_estimator(estimator, model, num_views=num_views, block_length=block_length)
    pairs = [
        _encoded(tokenizer, prompt, continuation, chat_template_kwargs, i)
        for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True))
    ]
    _check(pairs, spec, model)
    attach_scoring(model)
    different = sorted(set(pairs), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float | None]] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(different), batch_rows):
            part = different[start : start + batch_rows]
            found |= zip(part, _scores(model, spec, chosen, part, seed, batch_rows), strict=True)
    finally:
        model.train(was_training)
    return LogLikelihoods(
        values=[found[pair][0] for pair in pairs],
        standard_errors=[found[pair][1] for pair in pairs],
        tokens=[len(pair[1]) for pair in pairs],
        estimator=name,
        settings=asdict(chosen),  # type: ignore[call-overload]
        kind=kind_of(chosen),
    )


def named_estimator(
    estimator: str | Estimator, model: Any, *, num_views: int = 128, block_length: int | None = None
) -> tuple[Estimator, str]:
    """The estimator that a name of `ESTIMATORS` stands for with this model, and its name in results.

    Raises:
        ValueError: an unknown name, or one that has no meaning for the model.
    """
    spec = DiffusionSpec.of(model)
    if block_length is not None and estimator != "block_elbo":
        raise ValueError(f"block_length={block_length} has no meaning for estimator={estimator!r}; leave it out")
    if isinstance(estimator, Estimator):
        if estimator.noise != spec.noise:
            raise ValueError(f"estimator={estimator} is for noise={estimator.noise!r}, the model has {spec.noise!r}")
        return estimator, type(estimator).__name__
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is not known; choose one of {', '.join(ESTIMATORS)}")
    name = estimator
    if name == "auto":
        name = "left_to_right" if spec.noise == "mask" and spec.attention in LEFT_TO_RIGHT else "elbo"
    if isinstance(num_views, bool) or not isinstance(num_views, int) or num_views < 1:
        raise ValueError(f"num_views={num_views!r} is not allowed; it must be an integer, 1 or larger")
    in_blocks = spec.attention in BLOCK_KINDS or spec.noise == "uniform"
    grid: dict[str, Any] = {}
    if in_blocks:
        grid = {"block_length": spec.block_length, "block_origin": spec.grid_origin}
    found: Estimator
    if name == "left_to_right":
        if spec.noise != "mask":
            raise ValueError("estimator='left_to_right' needs tokens that are written once; for this model choose elbo")
        found = LeftToRight(within="block", **grid) if in_blocks else LeftToRight()
    elif name == "elbo":
        found = ELBO(num_views, "count", complement=num_views % 2 == 0, per_block=in_blocks, **grid)
    elif name == "block_elbo":
        if in_blocks or spec.attention != "full":
            raise ValueError(f"estimator='block_elbo' is for full attention, not {spec.attention!r}; choose elbo")
        if block_length is None:
            raise ValueError("estimator='block_elbo' needs block_length, in tokens")
        found = BlockELBO(num_views, block_length)
    else:
        found = MeanField(p_mask_prompt=0.0)
    if spec.noise == "uniform":
        found = UniformNoise(found, int(model.config.get_text_config().vocab_size))
    return found, name


def kind_of(estimator: Estimator) -> str:
    """What its values are; see `LogLikelihoods`."""
    inner = estimator.inner if isinstance(estimator, UniformNoise) else estimator
    if isinstance(inner, LeftToRight) and inner.tokens_per_view == 1:
        return EXACT
    return BOUND if isinstance(inner, ELBO | BlockELBO) and not inner.reweighted else OTHER


def request_key(*parts: Sequence[int] | str | int) -> int:
    """An integer from 0 to 2^63 - 1 of what a request holds, for the draws that belong to it."""
    text = "/".join(part if isinstance(part, str) else repr(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def encode_pair(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of two texts that follow each other, encoded together; spaces between them belong to the second one."""
    bare = prompt.rstrip()
    first = list(tokenizer(bare)["input_ids"]) if bare else []
    whole = list(tokenizer(bare + prompt[len(bare) :] + continuation)["input_ids"])
    return first, whole[len(first) :]


def _encoded(
    tokenizer: Any, prompt: Prompt, continuation: str | Sequence[int], template: Any, number: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    texts = [isinstance(prompt, str), isinstance(continuation, str)]
    ids = not texts[0] and all(isinstance(token, int) for token in prompt)
    if tokenizer is None and (texts[1] or not ids):
        raise ValueError(f"request {number} holds text or messages, which need a tokenizer; give tokenizer=...")
    if all(texts):
        assert isinstance(prompt, str) and isinstance(continuation, str)
        first, second = encode_pair(tokenizer, prompt, continuation)
        return tuple(first), tuple(second)
    first = list(prompt) if ids else encode_prompt(tokenizer, prompt, chat_template_kwargs=template)  # type: ignore
    if isinstance(continuation, str):
        return tuple(first), tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    return tuple(first), tuple(continuation)


def _check(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], spec: DiffusionSpec, model: Any) -> None:
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    for number, (prompt, continuation) in enumerate(pairs):
        for what, ids in (("prompt", prompt), ("continuation", continuation)):
            if not ids:
                raise ValueError(f"request {number}: its {what} has no tokens; it must have at least one")
            if min(ids) < 0 or max(ids) >= text.vocab_size or spec.mask_token_id in ids:
                raise ValueError(
                    f"request {number}: its {what} has an id outside 0..{text.vocab_size - 1}, or the mask token "
                    f"{spec.mask_token_id}"
                )
        if limit is not None and len(prompt) + len(continuation) > limit:
            raise ValueError(
                f"request {number} has {len(prompt) + len(continuation)} tokens, more than the model's {limit} "
                "positions; shorten its prompt"
            )


def _scores(
    model: Any,
    spec: DiffusionSpec,
    estimator: Estimator,
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    seed: int,
    batch_rows: int,
) -> list[tuple[float, float | None]]:
    """Value and standard error of a few requests."""
    rows = _rows(pairs, spec, model)
    views = estimator.draw(rows, seed=seed, iteration=0)
    count = views.hidden.shape[1]
    # Each view becomes a row of its own, so that a forward holds so many sequences however many views there are.
    ids, targets = (None if value is None else value.flatten(0, 1)[:, None] for value in (views.ids, views.targets))
    apart = Views(views.hidden.flatten(0, 1)[:, None], views.weight.flatten(0, 1)[:, None], ids, targets)

    def each(values: Tensor) -> Tensor:
        return values.repeat_interleave(count, dim=0)

    scores = score_views(
        model,
        spec,
        each(rows.ids),
        each(rows.attention_mask),
        apart,
        rows_per_forward=batch_rows,
        prompt_lengths=each(rows.prompt_mask.sum(-1)),
    )
    log_probs = scores.log_probs.view(len(pairs), count, -1).double()
    values = estimator.reduce(log_probs, views).sum(-1).tolist()
    inner = estimator.inner if isinstance(estimator, UniformNoise) else estimator
    errors: list[float | None] = [None] * len(pairs)
    if isinstance(inner, ELBO):
        draws = inner.per_draw(log_probs, views)  # [B, J]
        if draws.shape[1] > 1:
            errors = (draws.std(-1) / draws.shape[1] ** 0.5).tolist()
    elif not estimator.fresh:
        errors = [0.0] * len(pairs)
    return list(zip(values, errors, strict=True))


def _rows(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], spec: DiffusionSpec, model: Any) -> Rows:
    """Requests as rows whose canvas is the continuation; padding on both sides is never seen."""
    device = model.device
    width = max(len(prompt) for prompt, _ in pairs)
    length = max(len(continuation) for _, continuation in pairs)
    whole = denoises_canvases(base_model(model))
    if whole:  # canvases are denoised whole: what is behind the continuation is noise, and counts for nothing
        assert spec.block_length is not None
        length = -(-length // spec.block_length) * spec.block_length
    prompt_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    canvas = torch.zeros(len(pairs), length, dtype=torch.long)
    real = torch.zeros(len(pairs), width, dtype=torch.bool)
    valid = torch.zeros(len(pairs), length, dtype=torch.bool)
    for row, (prompt, continuation) in enumerate(pairs):
        prompt_ids[row, width - len(prompt) :], real[row, width - len(prompt) :] = torch.tensor(prompt), True
        canvas[row, : len(continuation)], valid[row, : len(continuation)] = torch.tensor(continuation), True
    keys = torch.tensor([request_key(*pair) for pair in pairs], device=device)
    return Rows(
        prompt_ids.to(device),
        real.to(device),
        canvas.to(device),
        valid.to(device),
        keys,
        seen=None if whole else valid.to(device),
    )
