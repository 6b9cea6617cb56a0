"""The records of likelihood estimation: what they refuse, and that they may be shuffled and split like a batch."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.likelihood.views import Rows, Views


def some_views(batch: int = 5, views: int = 2, prompt: int = 3, canvas: int = 4) -> Views:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(batch, views, prompt + canvas, generator=generator) < 0.5
    weight = torch.rand(batch, views, canvas, generator=generator).round()
    return Views(hidden, weight)


def test_shuffling_and_splitting_views_commutes_with_applying_them() -> None:
    views = some_views()
    ids = torch.arange(35).view(5, 7)
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = views.apply(ids, 99)[order]
    assert torch.equal(views[order].apply(ids[order], 99), whole)
    parts = [views[order][part].apply(ids[order][part], 99) for part in (slice(0, 2), slice(2, 5))]
    assert torch.equal(torch.cat(parts), whole)


def test_a_view_replaces_hidden_tokens_only_and_by_the_mask_token() -> None:
    views = some_views()
    ids = torch.arange(35).view(5, 7)
    noised = views.apply(ids, 99)
    assert (noised[views.hidden] == 99).all()
    assert torch.equal(noised[~views.hidden], ids[:, None].expand_as(noised)[~views.hidden])


def test_other_corruptions_take_their_tokens_from_ids() -> None:
    views = some_views()
    random_tokens = torch.randint(100, 200, views.hidden.shape, generator=torch.Generator().manual_seed(1))
    noised = Views(views.hidden, views.weight, random_tokens).apply(torch.zeros(5, 7, dtype=torch.long), 99)
    assert torch.equal(noised, torch.where(views.hidden, random_tokens, 0))


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        (torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 1, 3), "hidden must be"),
        (torch.ones(2, 1, 5, dtype=torch.bool), torch.ones(3, 1, 3), "hidden must be"),
        (torch.ones(2, 1, 5), torch.ones(2, 1, 3), "hidden must be bool"),
        (torch.ones(2, 1, 5, dtype=torch.bool), torch.ones(2, 1, 3, dtype=torch.long), "weight float"),
        (torch.ones(2, 1, 5, dtype=torch.bool), torch.ones(2, 1, 6), "does not fit"),
    ],
)
def test_views_that_are_no_batch_of_views_are_refused(hidden: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(hidden, weight)


def test_rows_of_different_batches_are_refused() -> None:
    def rows(prompts: int = 2, canvases: int = 2, ids: int = 2) -> Rows:
        prompt, canvas = torch.ones(prompts, 3, dtype=torch.long), torch.ones(canvases, 4, dtype=torch.long)
        return Rows(prompt, prompt, canvas, canvas.bool(), torch.arange(ids))

    assert len(rows()) == 2
    for bad in ({"prompts": 3}, {"canvases": 1}, {"ids": 5}):
        with pytest.raises(ValueError, match="not one batch"):
            rows(**bad)


def test_attention_hides_padding_and_sees_the_whole_canvas_also_after_the_end_of_sequence() -> None:
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    valid = torch.tensor([[True, False], [True, True]])
    rows = Rows(torch.ones_like(prompt_mask), prompt_mask, torch.ones(2, 2, dtype=torch.long), valid, torch.arange(2))
    assert rows.attention_mask.tolist() == [[False, True, True, True, True], [True] * 5]
