"""`score_views` against plain log-softmax of the model's own logits, and what it must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada

VOCABULARY, MASK = 16, 2


@pytest.fixture(scope="module")
def model() -> Any:
    return attach_scoring(tiny_llada(vocab_size=VOCABULARY, dtype=torch.float64))


@pytest.fixture(scope="module")
def spec(model: Any) -> DiffusionSpec:
    return DiffusionSpec.of(model)


def batch(rows: int = 3, views: int = 2, prompt: int = 4, canvas: int = 5) -> tuple[Tensor, Tensor, Views]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, VOCABULARY, (rows, prompt + canvas), generator=generator)
    keys = torch.ones_like(ids, dtype=torch.bool)
    keys[1:2, :2] = False
    hidden = torch.rand(rows, views, prompt + canvas, generator=generator) < 0.6
    weight = hidden[:, :, prompt:] * torch.rand(rows, views, canvas, generator=generator, dtype=torch.float64)
    return ids, keys, Views(hidden, weight)


def naive(model: Any, ids: Tensor, keys: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies `[B, K, L]` view by view, from full logits."""
    log_probs, entropies = [], []
    canvas = views.weight.shape[2]
    positions = (keys.long().cumsum(-1) - 1).clamp(min=0)
    for k in range(views.hidden.shape[1]):
        noised = torch.where(views.hidden[:, k], MASK, ids)
        logits = model(input_ids=noised, attention_mask=keys.long(), position_ids=positions).logits
        full = logits[:, -canvas:].log_softmax(-1)
        log_probs.append(full.gather(-1, ids[:, -canvas:, None]).squeeze(-1))
        entropies.append(-(full.exp() * full).sum(-1))
    scored = views.weight != 0
    return torch.stack(log_probs, 1) * scored, torch.stack(entropies, 1) * scored


def test_scores_are_log_softmax_at_the_scored_positions_and_zero_elsewhere(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch()
    found = score_views(model, spec, ids, keys, views)
    log_probs, entropies = naive(model, ids, keys, views)
    torch.testing.assert_close(found.log_probs, log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropies, entropies, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_plain_computation(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch()
    parameters = list(model.parameters())
    ours = torch.autograd.grad((score_views(model, spec, ids, keys, views).log_probs * views.weight).sum(), parameters)
    plain = torch.autograd.grad((naive(model, ids, keys, views)[0] * views.weight).sum(), parameters)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_stacking_views_equals_scoring_them_one_by_one(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch()
    together = score_views(model, spec, ids, keys, views).log_probs
    for k in range(2):
        alone = score_views(model, spec, ids, keys, Views(views.hidden[:, k : k + 1], views.weight[:, k : k + 1]))
        torch.testing.assert_close(together[:, k : k + 1], alone.log_probs, rtol=0, atol=1e-12)


def test_rows_may_be_scored_in_parts_when_no_gradient_is_wanted(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch()
    with torch.no_grad():
        whole = score_views(model, spec, ids, keys, views)
        parts = score_views(model, spec, ids, keys, views, rows_per_forward=2)
    torch.testing.assert_close(whole.log_probs, parts.log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.entropies, parts.entropies, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="rows_per_forward=2"):
        score_views(model, spec, ids, keys, views, rows_per_forward=2)


def test_temperature_divides_the_logits(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch(views=1)
    positions = (keys.long().cumsum(-1) - 1).clamp(min=0)
    noised = torch.where(views.hidden[:, 0], MASK, ids)
    logits = model(input_ids=noised, attention_mask=keys.long(), position_ids=positions).logits[:, -5:]
    expected = (logits / 0.7).log_softmax(-1).gather(-1, ids[:, -5:, None]).squeeze(-1) * views.scored[:, 0]
    found = score_views(model, spec, ids, keys, views, temperature=0.7).log_probs[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_guidance_combines_the_view_with_its_copy_that_hides_the_whole_prompt(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch(views=1)
    positions = (keys.long().cumsum(-1) - 1).clamp(min=0)
    conditional = torch.where(views.hidden[:, 0], MASK, ids)
    unconditional = conditional.clone()
    unconditional[:, :4] = MASK

    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, attention_mask=keys.long(), position_ids=positions).logits[:, -5:]

    c, u = logits(conditional), logits(unconditional)
    expected = (u + 2.5 * (c - u)).log_softmax(-1).gather(-1, ids[:, -5:, None]).squeeze(-1) * views.scored[:, 0]
    found = score_views(model, spec, ids, keys, views, cfg_scale=1.5).log_probs[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_padding_changes_nothing(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch(rows=1)
    padded_ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    padded_keys = torch.cat([torch.zeros(1, 3, dtype=torch.bool), keys], 1)
    padded = Views(torch.cat([torch.zeros(1, 2, 3, dtype=torch.bool), views.hidden], 2), views.weight)
    torch.testing.assert_close(
        score_views(model, spec, padded_ids, padded_keys, padded).log_probs,
        score_views(model, spec, ids, keys, views).log_probs,
        rtol=0,
        atol=1e-12,
    )


def test_nothing_to_score_gives_zeros_that_still_reach_every_parameter(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch()
    found = score_views(model, spec, ids, keys, Views(views.hidden, torch.zeros_like(views.weight)))
    assert not found.log_probs.any()
    gradients = torch.autograd.grad(found.log_probs.sum(), list(model.parameters()))
    assert all(not g.any() for g in gradients)


def test_shapes_that_do_not_fit_are_refused(model: Any, spec: DiffusionSpec) -> None:
    ids, keys, views = batch()
    for arguments in ((ids[:2], keys[:2]), (ids[:, 1:], keys[:, 1:]), (ids, keys[:, 1:])):
        with pytest.raises(ValueError, match="do not describe the same"):
            score_views(model, spec, *arguments, views)
