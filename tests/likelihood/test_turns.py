"""Several turns in a block: scores against one forward per turn, what no score depends on, and what costs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.denoising import denoising_views, places_of
from rl4dlm.likelihood.scoring import reduce_views, score_views
from rl4dlm.likelihood.turns import by_turn, turns_of
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.distributions import HiddenStates
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.noise import keyed_uniform

# Turns of (context, answer) lengths; what is left over is context behind the last answer.
CHATS = ([(3, 2), (1, 4), (2, 2)], [(5, 6)], [(2, 1), (0, 0), (1, 1), (1, 2), (3, 3)])
RULES = ("as_decoded", "apart")


def model_of(attention: str, origin: str, shift: int = 0, block_length: int = 4) -> Any:
    model = tiny_llada(initializer_range=0.3, dtype=torch.float64)
    model.config.diffusion.update(attention=attention, grid_origin=origin, block_length=block_length, logit_shift=shift)
    return attach_scoring(model.eval())


def rows_of(chats: Any = CHATS, behind: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """ids, targets and real tokens `[B, T]`, padded on the right."""
    targets = [[i < a for c, a in chat for i in [a] * c + list(range(a))] + [False] * behind for chat in chats]
    width = max(map(len, targets))
    real = torch.tensor([[i < len(row) for i in range(width)] for row in targets])
    padded = torch.tensor([row + [False] * (width - len(row)) for row in targets])
    ids = torch.arange(len(chats) * width).view(len(chats), width) * 7 % 80 + 10
    return torch.where(real, ids, 0), padded, real


def drawn(targets: Tensor, level: float = 0.7, complementary: bool = False) -> Views:
    row, place = torch.arange(len(targets))[:, None], torch.arange(targets.shape[1])
    uniform = keyed_uniform(0, "turns", row, place)
    share = torch.full((len(targets), 1), level, dtype=torch.float64)
    return denoising_views(uniform, targets, share, torch.ones_like(share), complementary=complementary)


def scored(model: Any, rule: str, ids: Tensor, targets: Tensor, real: Tensor, **how: Any) -> Tensor:
    """Log-probabilities `[B, T]` of what a view hides, zero elsewhere."""
    spec = DiffusionSpec.of(model)
    prompts = (real & (targets.cumsum(-1) == 0)).sum(-1)
    views = drawn(targets, **how)
    blocks = places_of(spec, real, prompts).blocks
    views = views if rule == "together" else by_turn(views, targets, real, blocks, rule)
    return score_views(model, spec, ids, real, views, prompt_lengths=prompts).log_probs.sum(1)


@pytest.mark.parametrize("attention", ["block_causal", "context_causal"])
@pytest.mark.parametrize(("origin", "shift"), [("position_zero", 1), ("response", 0), ("whole_prompt", 0)])
def test_as_decoded_is_the_row_cut_behind_each_turn(attention: str, origin: str, shift: int) -> None:
    """One forward for each answer: earlier turns are its prompt, and nothing follows it."""
    model = model_of(attention, origin, shift)
    spec, (ids, targets, real) = DiffusionSpec.of(model), rows_of()
    found, hidden, turn = (
        scored(model, "as_decoded", ids, targets, real),
        drawn(targets).hidden[:, 0],
        turns_of(targets),
    )
    expected = torch.zeros_like(found)
    for row in range(len(ids)):
        prompts = (targets[row].cumsum(-1) == 0).sum()[None]
        for number in turn[row][targets[row]].unique().tolist():
            own = targets[row] & (turn[row] == number)
            cut = slice(0, int(own.nonzero().max()) + 1)
            alone = (hidden[row] & own)[None, None, cut]
            views = Views(alone, alone.double())
            expected[row, cut] += score_views(
                model, spec, ids[row, None, cut], real[row, None, cut], views, prompt_lengths=prompts
            ).log_probs[0, 0]
    assert int((found != 0).sum()) == int(hidden.sum()) > 8
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    together = scored(model, "together", ids, targets, real)
    assert (together - found).abs().max() > 1e-3, "the rule matters here"


@pytest.mark.parametrize("origin", ["position_zero", "response"])
def test_apart_is_one_copy_without_the_other_turns_of_the_block(origin: str) -> None:
    """One forward of a single copy for each block and turn: finished blocks, and the turn's own tokens."""
    model = model_of("block_causal", origin)
    spec, (ids, targets, real) = DiffusionSpec.of(model), rows_of()
    found, hidden, turn = scored(model, "apart", ids, targets, real), drawn(targets).hidden[:, 0], turns_of(targets)
    expected = torch.zeros_like(found)
    for row in range(len(ids)):
        prompts = (targets[row].cumsum(-1) == 0).sum()[None]
        blocks = places_of(spec, real[row, None], prompts).blocks[0]
        for start in blocks[hidden[row]].unique().tolist():
            for number in turn[row][hidden[row] & (blocks == start)].unique().tolist():
                own = (blocks == start) & (turn[row] == number) & real[row]
                wanted = own & hidden[row]
                noised = torch.where(wanted, spec.mask_token_id, ids[row])
                scores = model(
                    input_ids=noised[None],
                    attention_mask=(own | (blocks < start))[None],
                    position_ids=torch.arange(len(noised))[None],
                    score_positions=wanted[None],
                    score_targets=ids[row, None],
                    score_prompt_lengths=prompts,
                )
                expected[row, wanted] = scores.log_probs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shift", [0, 1])
def test_no_score_depends_on_a_later_turn(rule: str, shift: int) -> None:
    model = model_of("block_causal", "position_zero", shift)
    ids, targets, real = rows_of()
    before, turn = scored(model, rule, ids, targets, real), turns_of(targets)
    for number in range(1, 4):
        later = turn >= number
        after = scored(model, rule, torch.where(later & real, ids + 1, ids), targets, real)
        torch.testing.assert_close(after[~later], before[~later], rtol=0, atol=1e-12)
    changed = torch.where((turn > 0) & real, ids + 1, ids)
    leak = scored(model, "together", changed, targets, real) - scored(model, "together", ids, targets, real)
    assert leak[turn == 0].abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_padding_and_batch_mates_change_nothing(rule: str) -> None:
    model = model_of("block_causal", "position_zero")
    ids, targets, real = rows_of()
    together = scored(model, rule, ids, targets, real)
    hidden = drawn(targets).hidden
    for row in range(len(ids)):
        size = int(real[row].sum())
        for width in (size, size + 5):  # less padding, and more
            more = max(0, width - ids.shape[1])
            one = [torch.nn.functional.pad(x[row, None], (0, more))[:, :width] for x in (ids, targets, real)]
            mask = torch.nn.functional.pad(hidden[row, None], (0, more))[..., :width]
            spec = DiffusionSpec.of(model)
            views = by_turn(Views(mask, mask.double()), one[1], one[2], places_of(spec, one[2], None).blocks, rule)
            alone = score_views(model, spec, one[0], one[2], views).log_probs.sum(1)
            torch.testing.assert_close(alone[0, :size], together[row, :size], rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_where_no_block_holds_several_turns_the_views_are_the_same(rule: str) -> None:
    ids, targets, real = rows_of([[(5, 6)], [(2, 3)]], behind=0)
    views = drawn(targets)
    blocks = torch.arange(ids.shape[1]).expand_as(ids) // 4 * 4
    assert by_turn(views, targets, real, blocks, rule) is views, "single turns, one of them padded"
    ids, targets, real = rows_of()
    views = drawn(targets)
    assert by_turn(views, targets, real, torch.arange(ids.shape[1]).expand_as(ids), rule) is views, "blocks of one"


def test_there_are_as_many_views_as_answers_in_a_block_and_each_token_is_scored_as_before() -> None:
    ids, targets, real = rows_of()
    blocks = torch.arange(ids.shape[1]).expand_as(ids) // 4 * 4
    for complementary in (False, True):
        views = drawn(targets, complementary=complementary)
        found = by_turn(views, targets, real, blocks, "as_decoded")
        assert found.hidden.shape[1] == 2 * (1 + complementary)
        torch.testing.assert_close(found.weight.view(3, -1, 2, ids.shape[1]).sum(2), views.weight, rtol=0, atol=0)
        assert not (found.scored & ~found.hidden).any()
        assert found.absent is not None and not (found.absent & (found.scored | ~real[:, None])).any()
        # the row of a single turn shows the same in all of its views, so that they share a forward
        assert torch.equal(found.hidden[1, 0], found.hidden[1, 1])


def test_reinforcement_learning_scores_the_last_turn_as_decoded() -> None:
    """A prompt with earlier turns that ends inside a block: the view of a completion needs no rule."""
    model = model_of("block_causal", "position_zero")
    spec, (ids, targets, real) = DiffusionSpec.of(model), rows_of([[(3, 2), (1, 5)]], behind=0)
    hidden = drawn(targets).hidden & (turns_of(targets) == 1)[:, None]
    start = 6
    rows = Rows(ids[:, :start], real[:, :start], ids[:, start:], real[:, start:], torch.zeros(1, dtype=torch.long))
    plain = score_views(
        model, spec, rows.ids, rows.attention_mask, Views(hidden, hidden[..., start:].double())
    ).log_probs[:, 0]
    found = scored(model, "as_decoded", ids, targets, real)[:, start:]
    assert hidden.any()
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)


def test_what_has_no_meaning_is_refused() -> None:
    ids, targets, real = rows_of()
    views = drawn(targets)
    with pytest.raises(ValueError, match="turns='together'"):
        by_turn(views, targets, real, ids, "together")
    absent = Views(views.hidden, views.weight, absent=torch.zeros_like(views.hidden))
    full = attach_scoring(tiny_llada())
    with pytest.raises(ValueError, match="absent"):
        score_views(full, DiffusionSpec.of(full), ids, real, absent)
    blocks = model_of("block_causal", "position_zero")
    with pytest.raises(ValueError, match="absent"):
        reduce_views(blocks, DiffusionSpec.of(blocks), ids, real, absent, HiddenStates(), noisy_history=True)
    with pytest.raises(ValueError, match="score_clean_ids"):
        blocks(input_ids=ids, score_positions=targets, score_targets=ids, score_absent=real)
    with pytest.raises(ValueError, match="shaped as hidden"):
        Views(views.hidden, views.weight, absent=views.hidden[:, :, 1:])
