"""The noisy and clean copies in one forward: every block's log-probabilities are those of decoding it on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.models.block_denoisers import BLOCK, KINDS, LENGTH, MASK, PROMPTS, VOCAB, block_denoiser, decoding_log_probs

WIDTH = max(map(len, PROMPTS))


def padded(prompts: list[list[int]], width: int = WIDTH, views: int = 2) -> tuple[Tensor, Tensor, Views]:
    """Left-padded prompts with random canvases, and random views that hide some prompt tokens too."""
    generator = torch.Generator().manual_seed(3)
    canvas = torch.randint(3, VOCAB, (len(prompts), LENGTH), generator=generator)
    shown = torch.rand(len(prompts), views, max(map(len, prompts)) + LENGTH, generator=generator) > 0.6
    ids = torch.zeros(len(prompts), width + LENGTH, dtype=torch.long)
    keys, hidden = torch.zeros_like(ids).bool(), torch.zeros(len(prompts), views, width + LENGTH).bool()
    for row, prompt in enumerate(prompts):
        real = slice(width - len(prompt), None)
        ids[row, real], keys[row, real] = torch.tensor([*prompt, *canvas[row].tolist()]), True
        hidden[row, :, real] = ~shown[row, :, -len(prompt) - LENGTH :]
    weight = hidden[:, :, -LENGTH:] * torch.rand(len(prompts), views, LENGTH, generator=generator, dtype=torch.float64)
    return ids, keys, Views(hidden, weight)


def by_decoding(model: Any, ids: Tensor, keys: Tensor, views: Views, **settings: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies `[B, K, L]`, row by row, view by view and block by block."""
    log_probs, entropies = torch.zeros_like(views.weight), torch.zeros_like(views.weight)
    for row, k in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(views.hidden.shape[1])).tolist():
        seen = torch.where(views.hidden[row, k], MASK, ids[row])[keys[row]].tolist()
        clean = ids[row, -LENGTH:].tolist()
        full = decoding_log_probs(model, seen[:-LENGTH], clean, seen[-LENGTH:], **settings)
        log_probs[row, k] = full.gather(-1, ids[row, -LENGTH:, None])[:, 0]
        entropies[row, k] = -(full.exp() * full).sum(-1)
    return log_probs * views.scored, entropies * views.scored


def scored(model: Any, ids: Tensor, keys: Tensor, views: Views, **settings: Any) -> Tensor:
    return score_views(model, DiffusionSpec.of(model), ids, keys, views, **settings).log_probs


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_one_forward_is_decoding_block_by_block(kind: str, origin: str, shift: int) -> None:
    model, batch = block_denoiser(kind, origin, shift=shift), padded(PROMPTS)
    with torch.no_grad():
        found = score_views(model, DiffusionSpec.of(model), *batch)
        log_probs, entropies = by_decoding(model, *batch)
    torch.testing.assert_close(found.log_probs, log_probs, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.entropies, entropies, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["block_causal", "context_causal"])
def test_another_grid_origin_is_another_model_unless_the_prompt_ends_on_the_grid(kind: str, shift: int) -> None:
    ids, keys, views = padded(PROMPTS)
    with torch.no_grad():
        zero, response = (
            scored(block_denoiser(kind, origin, shift=shift), ids, keys, views)
            for origin in ("position_zero", "response")
        )
    difference = (zero - response).abs().amax((1, 2))
    aligned = torch.tensor([len(prompt) % BLOCK == 0 for prompt in PROMPTS])
    assert difference[aligned].max() <= 1e-10 and difference[~aligned].min() >= 1e-2


@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_gradients_are_those_of_the_forwards_block_by_block(kind: str, origin: str) -> None:
    model, batch = block_denoiser(kind, origin, shift=1), padded(PROMPTS[1:3], views=1)
    parameters, weight = list(model.parameters()), batch[2].weight
    ours = torch.autograd.grad((scored(model, *batch) * weight).sum(), parameters)
    plain = torch.autograd.grad((by_decoding(model, *batch)[0] * weight).sum(), parameters)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_guidance_hides_the_prompt_in_both_copies(kind: str, origin: str) -> None:
    model, batch = block_denoiser(kind, origin), padded(PROMPTS)
    with torch.no_grad():
        found = scored(model, *batch, cfg_scale=1.5)
        expected, _ = by_decoding(model, *batch, cfg_scale=1.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["block_causal", "context_causal"])
def test_with_blocks_of_one_token_the_hidden_canvas_gives_the_exact_likelihood(kind: str, shift: int) -> None:
    """Then a rollout is autoregressive, and its log-probability factorises into what one view of it predicts."""
    model = block_denoiser(kind, shift=shift, block_length=1)
    config = DecodingConfig(canvas_length=LENGTH, temperature=1.0, stop_at_eos=False)
    rollout = RolloutEngine(model).generate(PROMPTS, config)
    ids, keys, views = padded(PROMPTS, views=1)
    ids[:, -LENGTH:] = rollout.canvas
    views.hidden[:] = torch.arange(ids.shape[1]) >= WIDTH
    views.weight[:] = 1
    with torch.no_grad():
        found = scored(model, ids, keys, views)[:, 0]
    torch.testing.assert_close(found, rollout.trace.raw_log_prob, rtol=0, atol=1e-10)


def test_what_a_view_hides_of_another_block_does_not_matter() -> None:
    model, (ids, keys, views) = block_denoiser("block_causal", "response"), padded(PROMPTS, views=1)
    weight = torch.zeros_like(views.weight)
    weight[:, :, BLOCK : 2 * BLOCK] = 1
    other = views.hidden.clone()
    for block in (slice(-LENGTH, BLOCK - LENGTH), slice(2 * BLOCK - LENGTH, None)):
        other[:, :, block] = ~other[:, :, block]
    same, inside = Views(views.hidden, weight), views.hidden.clone()
    inside[:, :, BLOCK - LENGTH] = ~inside[:, :, BLOCK - LENGTH]
    with torch.no_grad():
        expected = scored(model, ids, keys, same)
        torch.testing.assert_close(scored(model, ids, keys, Views(other, weight)), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(scored(model, ids, keys, Views(inside, weight)), expected, atol=1e-3)


@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response")])
def test_neither_padding_nor_batch_mates_matter(kind: str, origin: str) -> None:
    model = block_denoiser(kind, origin, shift=1)
    ids, keys, views = padded(PROMPTS)
    with torch.no_grad():
        expected = scored(model, ids, keys, views)
        wider = scored(model, *padded(PROMPTS, width=WIDTH + 5))
        alone = torch.cat([scored(model, ids[[i]], keys[[i]], views[[i]]) for i in range(len(ids))])
        parts = scored(model, ids, keys, views, rows_per_forward=2)
    for other in (wider, alone, parts):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shift", [0, 1])
def test_causal_attention_sees_what_a_view_shows_before_a_token(shift: int) -> None:
    model, (ids, keys, views) = block_denoiser("causal", shift=shift), padded(PROMPTS)
    with torch.no_grad():
        found = scored(model, ids, keys, views)
        for row, k in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(2)).tolist():
            seen = torch.where(views.hidden[row, k], MASK, ids[row])[keys[row]]
            for offset in views.scored[row, k].nonzero().squeeze(-1).tolist():
                end = len(seen) - LENGTH + offset + 1  # what follows is cut off
                causal = torch.ones(end, end).tril().bool()[None, None]
                logits = model(input_ids=seen[None, :end], attention_mask=causal).logits[0, -1 - shift]
                expected = logits.log_softmax(-1)[ids[row, -LENGTH + offset]]
                assert abs(found[row, k, offset] - expected) <= 1e-10


@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_examples_with_prompts_of_their_own_length_may_be_padded_on_the_right(kind: str, origin: str) -> None:
    """As in supervised training, where a view is as long as the row and the canvas starts where the prompt ends."""
    model, (ids, keys, views) = block_denoiser(kind, origin, shift=1), padded(PROMPTS)
    views.hidden[:, :, :-LENGTH] = False
    moved_ids, moved_keys = torch.zeros_like(ids), torch.zeros_like(keys)
    hidden = torch.zeros_like(views.hidden)
    weight = torch.zeros(hidden.shape, dtype=torch.float64)
    for row, prompt in enumerate(PROMPTS):
        size = len(prompt) + LENGTH
        moved_ids[row, :size], moved_keys[row, :size] = ids[row, -size:], True
        hidden[row, :, :size] = views.hidden[row, :, -size:]
        weight[row, :, len(prompt) : size] = views.weight[row]
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    with torch.no_grad():
        expected = scored(model, ids, keys, views)
        found = scored(model, moved_ids, moved_keys, Views(hidden, weight), prompt_lengths=lengths)
    for row, prompt in enumerate(PROMPTS):
        part = found[row, :, len(prompt) : len(prompt) + LENGTH]
        torch.testing.assert_close(part, expected[row], rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("implementation", "tolerance"), [("eager", 1e-5), ("flex_attention", 1e-10)])
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_implementations_agree(
    kind: str, origin: str, implementation: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stock eager attention takes its softmax in float32 whatever the model's dtype.
    # Compiled, FlexAttention takes a C++ compiler, half a minute and no float64 on a CPU.
    monkeypatch.setattr(flex.WrappedFlexAttention, "__call__", lambda self: flex_attention)
    batch = padded(PROMPTS)
    with torch.no_grad():
        expected = scored(block_denoiser(kind, origin), *batch)
        found = scored(block_denoiser(kind, origin, implementation=implementation), *batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_response_grid_needs_to_know_where_the_response_starts() -> None:
    model, (ids, keys, _) = block_denoiser("block_causal", "response"), padded(PROMPTS)
    with pytest.raises(ValueError, match="grid_origin='response'.*prompt_lengths"):
        model(input_ids=ids, attention_mask=keys, score_positions=keys, score_targets=ids, score_clean_ids=ids)
    with pytest.raises(ValueError, match="score_clean_ids.*attention='causal'"):
        block_denoiser("causal")(input_ids=ids, attention_mask=keys, score_positions=keys, score_clean_ids=ids)
