"""Equal inputs are fed once: the numbers and gradients of feeding each by itself, and how much is fed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.iid import IIDRatio
from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.scoring import ViewScores, score_views
from rl4dlm.likelihood.uniform import random_tokens
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_llada_moe
from tests.likelihood.test_estimators import name
from tests.models.block_denoisers import KINDS, block_denoiser

GROUP, GROUPS, PROMPT, CANVAS = 4, 3, 5, 8
ESTIMATORS: list[Estimator] = [
    MeanField(0.0),
    MeanField(0.2),
    Coupled(),
    IIDRatio(num_views=2),
    ELBO(form="count_with_zero", complement=True, num_views=8),
    LeftToRight(3),
]


def batch() -> Rows:
    """Groups of four completions behind prompts of different lengths; two completions of each group are the same."""
    generator = torch.Generator().manual_seed(5)
    group = torch.arange(GROUP * GROUPS) // GROUP
    mask = torch.arange(PROMPT) >= group[:, None]
    prompt = torch.randint(3, 24, (GROUPS, PROMPT), generator=generator)[group] * mask
    canvas = torch.randint(3, 24, (GROUP * GROUPS, CANVAS), generator=generator)
    canvas[1::GROUP] = canvas[0::GROUP]
    length = torch.randint(1, CANVAS + 1, (GROUP * GROUPS, 1), generator=generator)
    length[1::GROUP] = length[0::GROUP]
    return Rows(prompt, mask, canvas, torch.arange(CANVAS) < length, torch.arange(GROUP * GROUPS))


def scored(model: Any, rows: Rows, views: Views, **settings: Any) -> ViewScores:
    return score_views(model, DiffusionSpec.of(model), rows.ids, rows.attention_mask, views, **settings)


def gradients(model: Any, scores: ViewScores, views: Views) -> tuple[Tensor, ...]:
    """Of a loss that is linear in nothing."""
    loss = ((scores.log_probs * views.weight).sum((1, 2)) / 8).exp().sum() + scores.entropies.square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return tuple(gradient for gradient in found if gradient is not None)


def check(model: Any, rows: Rows, views: Views, **settings: Any) -> None:
    """Sharing changes no number and no gradient."""
    shared, alone = (scored(model, rows, views, share=share, **settings) for share in (True, False))
    for a, b in zip(shared[:2], alone[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(*(gradients(model, found, views) for found in (shared, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@contextmanager
def counting(module: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what a module is given, without the last dimension."""
    shapes: list[tuple[int, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:-1])))
    try:
        yield shapes
    finally:
        hook.remove()


def unique_inputs(model: Any, rows: Rows, views: Views) -> int:
    """How many different rows there are, found one by one."""
    shown = views.apply(rows.ids, DiffusionSpec.of(model).mask_token_id).flatten(0, 1).tolist()
    keys = rows.attention_mask.repeat_interleave(views.hidden.shape[1], dim=0).tolist()
    return len({(*ids, *real) for ids, real in zip(shown, keys, strict=True)})


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.5}, {"one_view": True}, {"temperature": 0.7}], ids=str)
@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=name)
def test_sharing_changes_no_number_and_no_gradient(estimator: Estimator, kind: str, settings: dict[str, Any]) -> None:
    rows = batch()
    check(block_denoiser(kind), rows, estimator.draw(rows, seed=1, iteration=0), **settings)


def test_views_in_turn_are_shared_with_guidance_too() -> None:
    rows = batch()
    for estimator in (Coupled(), LeftToRight(3)):
        views = estimator.draw(rows, seed=1, iteration=0)
        check(block_denoiser("full", shift=1), rows, views, one_view=True, cfg_scale=0.5)


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.5}, {"one_view": True}], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_models_with_blocks_share_rows_of_which_the_clean_copy_is_equal_too(
    kind: str, origin: str, shift: int, settings: dict[str, Any]
) -> None:
    model, rows = block_denoiser(kind, origin, shift=shift), batch()
    views = Coupled().draw(rows, seed=1, iteration=0)
    check(model, rows, views, **settings)
    with counting(model.model.layers[0].self_attn.q_proj) as fed, torch.no_grad():
        scored(model, rows, MeanField(0.0).draw(rows, seed=1, iteration=0))
    assert fed[0][0] == 3 * GROUPS, "two completions of each group are the same, the others differ in their clean copy"


def test_next_tokens_are_shared() -> None:
    model, rows = block_denoiser("context_causal"), batch()
    following = torch.cat([torch.zeros(len(rows), PROMPT).bool(), rows.valid], dim=1)
    views = MeanField(0.0).draw(rows, seed=1, iteration=0)
    results = []
    for share in (True, False):
        found = scored(model, rows, views, next_tokens=following, share=share)
        assert found.next_log_probs is not None
        loss = found.next_log_probs.sum().square() + found.log_probs.sum()
        results.append([found.next_log_probs, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_random_tokens_and_canvases() -> None:
    model = attach_scoring(tiny_diffusion_gemma(initializer_range=0.3))
    rows = batch()
    rows.canvas_ids[1::GROUP] = rows.canvas_ids[0::GROUP]
    noise = random_tokens(rows, 24, 2, 0, 0)
    noise[1::GROUP] = noise[0::GROUP]
    hidden = torch.cat([rows.prompt_mask & False, torch.ones_like(rows.valid)], dim=1)[:, None].expand(-1, 2, -1)
    views = Views(hidden, rows.valid[:, None].expand(-1, 2, -1).float(), noise)
    shared, alone = (scored(model, rows, views, share=share) for share in (True, False))
    torch.testing.assert_close(shared.log_probs, alone.log_probs, rtol=0, atol=1e-5)
    for a, b in zip(*(gradients(model, found, views) for found in (shared, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_experts_are_asked_once() -> None:
    model, rows = attach_scoring(tiny_llada_moe()), batch()
    views = Coupled().draw(rows, seed=1, iteration=0)
    shared, alone = (scored(model, rows, views, share=share) for share in (True, False))
    torch.testing.assert_close(shared.log_probs, alone.log_probs, rtol=0, atol=1e-5)


# --- how much is fed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_view", [False, True])
@pytest.mark.parametrize(
    ("estimator", "unique"),
    [
        (MeanField(0.0), GROUPS),  # diffu-GRPO without prompt masks: a group has one row
        (Coupled(), None),  # coupled-GRPO: the full view is shared, the others are not
    ],
    ids=["diffu-GRPO", "coupled-GRPO"],
)
def test_positions_fed_are_unique_rows_times_their_length(
    estimator: Estimator, unique: int | None, one_view: bool
) -> None:
    model, rows = block_denoiser("full"), batch()
    rows.valid[:] = True
    views = estimator.draw(rows, seed=2, iteration=0)
    if unique is None:
        full = unique_inputs(model, rows, views.only(0))
        assert full == GROUPS
        unique = unique_inputs(model, rows, views)
        assert unique == GROUPS + 2 * len(rows), "different completions show different tokens"
    with counting(model.model.layers[0].self_attn.q_proj) as fed, counting(model.lm_head) as seen:
        scored(model, rows, views, one_view=one_view)
    assert sum(a * b for a, b in fed) == unique * (PROMPT + CANVAS)
    assert len(fed) == (views.hidden.shape[1] if one_view else 1)
    # The head sees a position of a shared row once, whatever the completions have there.
    hidden = views.scored.sum((0, 2))
    assert sum(n for (n,) in seen) == GROUPS * CANVAS + int(hidden[1:].sum())


def test_guidance_feeds_one_bare_row_for_all_groups_of_one_length() -> None:
    model, rows = block_denoiser("full"), batch()
    rows.prompt_mask[:] = True
    views = MeanField(0.0).draw(rows, seed=1, iteration=0)
    with counting(model.model.layers[0].self_attn.q_proj) as fed, torch.no_grad():
        scored(model, rows, views, cfg_scale=1.0)
    assert fed == [(GROUPS + 1, PROMPT + CANVAS)]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("estimator", [MeanField(0.0), Coupled()], ids=name)
def test_parts_share_across_their_bounds(estimator: Estimator, in_step: bool, cfg_scale: float) -> None:
    """Micro-batches smaller than a group; in step, the number of forwards does not depend on the data."""
    model, rows = block_denoiser("full"), batch()
    views = estimator.draw(rows, seed=1, iteration=0)
    settings: dict[str, Any] = {
        "cfg_scale": cfg_scale,
        "rows_per_forward": 1,
        "in_step": len(rows) if in_step else None,
    }
    with torch.no_grad():
        whole = scored(model, rows, views, cfg_scale=cfg_scale, share=False)
        with counting(model.model.layers[0].self_attn.q_proj) as fed:
            parts = scored(model, rows, views, **settings)
    for a, b in zip(parts[:2], whole[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    unique, num_views = unique_inputs(model, rows, views), views.hidden.shape[1]
    assert all(shape[0] >= 1 for shape in fed)
    assert len(fed) == (len(rows) if in_step else -(unique // -num_views))
    if not cfg_scale:
        size = -(unique // -len(rows)) if in_step else num_views
        assert sum(shape[0] for shape in fed) == unique + len(fed) + (unique // -size), "and one row in idle forwards"


@pytest.mark.parametrize("in_step", [False, True])
def test_parts_of_one_view_at_a_time_are_as_small(in_step: bool) -> None:
    model, rows = block_denoiser("full"), batch()
    views = Coupled().draw(rows, seed=2, iteration=0)
    with torch.no_grad(), counting(model.model.layers[0].self_attn.q_proj) as fed:
        scored(model, rows, views, rows_per_forward=2, one_view=True, in_step=len(rows) if in_step else None)
    unique = unique_inputs(model, rows, views)
    assert max(shape[0] for shape in fed) == 2
    assert len(fed) == (len(rows) * 3 // 2 if in_step else -(unique // -2))


def test_dropout_is_not_shared() -> None:
    """With dropout, equal inputs are no equal questions."""
    model = attach_scoring(tiny_llada_moe())
    rows = batch()
    views = MeanField(0.0).draw(rows, seed=1, iteration=0)

    def rows_fed() -> int:
        with counting(model.model.layers[0].self_attn.q_proj) as fed, torch.no_grad():
            scored(model, rows, views)
        return fed[0][0]

    assert rows_fed() == GROUPS
    model.model.layers[0].dropout = torch.nn.Dropout(0.1)
    model.train()
    assert rows_fed() == len(rows)
    model.model.layers[0].dropout.p = 0.0
    assert rows_fed() == GROUPS
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert rows_fed() == len(rows)
    model.eval()
    assert rows_fed() == GROUPS
