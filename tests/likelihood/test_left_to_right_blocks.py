"""The chain from left to right on models that denoise block by block: as many views as a block has tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.models.block_denoisers import BLOCK, KINDS, LENGTH, PROMPTS, block_denoiser

WIDTH = max(map(len, PROMPTS))


def batch(canvas: Tensor, valid: Tensor | None = None) -> Rows:
    prompt, mask = torch.zeros(len(PROMPTS), WIDTH, dtype=torch.long), torch.zeros(len(PROMPTS), WIDTH)
    for row, ids in enumerate(PROMPTS):
        prompt[row, WIDTH - len(ids) :], mask[row, WIDTH - len(ids) :] = torch.tensor(ids), 1
    valid = torch.ones_like(canvas) if valid is None else valid
    return Rows(prompt, mask, canvas, valid, torch.arange(len(PROMPTS)))


@torch.no_grad()
def scores(model: object, estimator: LeftToRight, rows: Rows) -> tuple[Tensor, int]:
    """Scores `[B, L]`, and the number of views."""
    views = estimator.draw(rows, seed=0, iteration=0)
    assert torch.equal(views.weight.sum(1), rows.valid.double()), "every token is scored once"
    found = score_views(model, DiffusionSpec.of(model), rows.ids, rows.attention_mask, views)
    return estimator.reduce(found.log_probs, views), views.hidden.shape[1]


@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_a_view_per_token_of_a_block_gives_the_scores_of_a_view_per_token(kind: str, origin: str) -> None:
    model = block_denoiser(kind, origin)
    generator = torch.Generator().manual_seed(1)
    canvas = torch.randint(3, 24, (len(PROMPTS), LENGTH), generator=generator)
    rows = batch(canvas, torch.arange(LENGTH) < torch.tensor([10, 4, 7, 1, 9])[:, None])
    long, count = scores(model, LeftToRight(), rows)
    short, few = scores(model, LeftToRight(within="block", block_length=BLOCK, block_origin=origin), rows)
    assert (count, few) == (LENGTH, BLOCK)
    torch.testing.assert_close(short, long, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("origin", "tokens_per_view"), [("position_zero", 1), ("response", 1), ("response", 2)])
def test_scores_are_the_log_probabilities_that_a_rollout_recorded(origin: str, tokens_per_view: int) -> None:
    model = block_denoiser("block_causal", origin)
    spec = replace(DiffusionSpec.of(model), eos_token_ids=(3,))  # which it often draws
    config = DecodingConfig(
        canvas_length=8, schedule="left_to_right", steps=8 // tokens_per_view, temperature=1.0, stop_at_eos=True
    ).for_model(spec)
    rollout = RolloutEngine(model, spec).generate(PROMPTS, config, seed=2)
    assert not rollout.valid.all()
    rows = batch(rollout.canvas, rollout.valid)
    estimator = LeftToRight(tokens_per_view, within="block", block_length=BLOCK, block_origin=origin)
    found, count = scores(model, estimator, rows)
    assert count == BLOCK // tokens_per_view
    expected = torch.where(rollout.valid, rollout.trace.raw_log_prob, 0.0)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-6)


def test_blocks_of_one_token_are_one_view() -> None:
    model = block_denoiser("block_causal", "response", block_length=1)
    rows = batch(torch.randint(3, 24, (len(PROMPTS), 5), generator=torch.Generator().manual_seed(1)))
    found, count = scores(model, LeftToRight(within="block", block_length=1), rows)
    assert count == 1
    torch.testing.assert_close(found, scores(model, LeftToRight(), rows)[0], rtol=0, atol=1e-12)
