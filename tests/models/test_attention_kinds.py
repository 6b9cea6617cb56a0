"""Who sees whom, per attention kind: the recorded masks of published models, and what every implementation is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from rl4dlm.models.attention import Sight, attention_mask, check_attention, one_copy, position_ids, two_copies
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.engine import RolloutEngine
from tests.models.block_denoisers import KINDS, LENGTH, MASK, PROMPTS, VOCAB, block_denoiser, block_of, sees

ALL_KINDS = [*KINDS, ("causal", "response")]
WRITTEN_FIRST = DiffusionSpec(1, (0,), attention="written_first")


def spec_of(kind: str, origin: str, block_length: int | None = 4) -> DiffusionSpec:
    return DiffusionSpec(1, (0,), attention=kind, grid_origin=origin, block_length=block_length)


def bools(sight: Sight | None, keys: Tensor) -> Tensor:
    """The mask `[R, Q, S]` as SDPA gets it."""
    queries = keys.shape[1] if sight is None else sight.horizons.shape[1]
    mask = attention_mask(keys, queries, "sdpa", torch.float32, sight)
    assert isinstance(mask, Tensor) and mask.dtype == torch.bool
    return mask[:, 0]


def batch(padding: tuple[int, ...] = (3, 0, 1), width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Real keys `[R, T]`, positions, and prompt lengths of 4, 7 and 6 real tokens."""
    keys = torch.arange(width) >= torch.tensor(padding)[:, None]
    return keys, position_ids(keys), torch.tensor([7, 7, 7]) - torch.tensor(padding)


@pytest.mark.parametrize(("kind", "origin"), ALL_KINDS)
def test_one_copy_is_the_definition_behind_any_padding(kind: str, origin: str):
    keys, positions, prompts = batch()
    spec, active = spec_of(kind, origin), 2
    starts = active * 4 + (torch.zeros_like(prompts) if origin == "position_zero" else prompts)
    mask = bools(one_copy(spec, positions, prompts, starts), keys)
    for row, prompt in enumerate(prompts.tolist()):
        size = int(keys[row].sum())
        expected = [[sees(spec, prompt, active, q, k) for k in range(size)] for q in range(size)]
        assert mask[row][keys[row]][:, keys[row]].tolist() == expected
        assert not mask[row][:, ~keys[row]].any()


def test_written_first_is_causal_in_another_order():
    """Tokens fed in the order of `written_first` under a causal mask see what they see in their own order."""
    keys, positions, _ = batch()
    masked = torch.rand(keys.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = bools(one_copy(WRITTEN_FIRST, positions, masked=masked), keys)
    for row in range(len(keys)):
        places = keys[row].nonzero().flatten().tolist()
        order = [i for i in places if not masked[row, i]] + [i for i in places if masked[row, i]]
        for before, query in enumerate(order):
            assert sorted(mask[row, query].nonzero().flatten().tolist()) == sorted(order[: before + 1])
    with pytest.raises(ValueError, match="written_first.*which tokens are masked"):
        one_copy(WRITTEN_FIRST, positions)


@pytest.mark.parametrize(("kind", "origin"), KINDS)
@pytest.mark.parametrize("first", [0, 4])
def test_two_copies_are_the_definition(kind: str, origin: str, first: int):
    keys, positions, prompts = batch()
    spec, width = spec_of(kind, origin), keys.shape[1]
    mask = bools(two_copies(spec, positions, prompts, first), torch.cat([keys[:, first:], keys], dim=1))
    noisy = width - first
    for row, prompt in enumerate(prompts.tolist()):
        padding = int((~keys[row]).sum())

        def block(column: int, padding: int = padding, prompt: int = prompt) -> int:
            return block_of(spec, prompt, column - padding)

        for q in range(max(first, padding), width):
            seen = mask[row, q - first]
            for k in range(max(first, padding), width):
                assert bool(seen[k - first]) == (block(k) == block(q)), "noisy tokens see their own noisy block"
            for k in range(padding, width):
                assert bool(seen[noisy + k]) == (block(k) < block(q)), "and the clean blocks before it"
        for q in range(padding, width):
            seen = mask[row, noisy + q]
            assert not seen[:noisy].any(), "clean tokens see no noisy ones"
            for k in range(padding, width):
                assert bool(seen[noisy + k]) == (k <= q if kind == "context_causal" else block(k) <= block(q))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "origin"), ALL_KINDS)
def test_every_query_sees_something_padding_too(kind: str, origin: str, side: str):
    """A query that sees nothing gives NaN in some kernels, and NaN spreads through values of weight zero."""
    keys, _, prompts = batch(padding=(6, 0, 5))
    keys = keys if side == "left" else keys.flip(-1)
    positions, spec = position_ids(keys), spec_of(kind, origin)
    assert bools(one_copy(spec, positions, prompts, prompts), keys).any(-1).all()
    if kind != "causal":
        for first in (0, 4):
            both = torch.cat([keys[:, first:], keys], dim=1)
            assert bools(two_copies(spec, positions, prompts, first), both).any(-1).all()


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_every_implementation_gets_the_same_mask(kind: str, origin: str, copies: int):
    keys, positions, prompts = batch()
    spec, sight = spec_of(kind, origin), one_copy(spec_of(kind, origin), positions, prompts, prompts)
    if copies == 2:
        sight, keys = two_copies(spec, positions, prompts, 3), torch.cat([keys[:, 3:], keys], dim=1)
    rows, width = keys.shape
    expected = bools(sight, keys)
    added = attention_mask(keys, width, "eager", torch.float64, sight)
    assert added.dtype == torch.float64 and torch.equal(added[:, 0] == 0, expected)
    assert bool((added[:, 0][~expected] == torch.finfo(torch.float64).min).all())
    flex = attention_mask(keys, width, "flex_attention", torch.float32, sight)
    assert torch.equal(create_mask(flex.mask_mod, rows, None, width, width, device="cpu")[:, 0], expected)


def test_columns_can_be_fed_alone():
    keys, positions, prompts = batch()
    sight = one_copy(spec_of("block_causal", "response"), positions, prompts)
    whole, columns = bools(sight, keys), torch.tensor([[7, 8, 9], [11, 12, 13], [15, 15, 3]])
    rows = torch.arange(3)[:, None]
    assert torch.equal(bools(sight.at(columns), keys), whole[rows, columns])
    inner = bools(sight.at(columns, columns), keys.gather(-1, columns))
    assert torch.equal(inner, whole[rows[..., None], columns[:, :, None], columns[:, None]])


@pytest.mark.parametrize(("kind", "origin"), KINDS)
@pytest.mark.parametrize("shift", [0, 1])
def test_blocks_behind_the_active_one_do_not_matter(kind: str, origin: str, shift: int):
    """Logits of a block with the rest of the canvas masked are those with the rest of the canvas left away."""
    model, generator = block_denoiser(kind, origin, shift=shift), torch.Generator().manual_seed(0)
    spec = DiffusionSpec.of(model)
    for prompt in PROMPTS:
        canvas = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
        grid = len(prompt) % 4 if origin == "position_zero" else 0
        for start in range(-grid, LENGTH, 4):
            stop, state = min(start + 4, LENGTH), canvas.clone()
            state[max(start, 0) :] = MASK
            logits = []
            for end in (stop, LENGTH):
                ids = torch.tensor([[*prompt, *state[:end].tolist()]])
                scored = torch.zeros_like(ids).bool()
                scored[:, len(prompt) + max(start, 0) : len(prompt) + stop] = True
                keys = torch.ones_like(ids).bool()
                lengths = torch.tensor([len(prompt)])
                sight = one_copy(spec, position_ids(keys), lengths, lengths + start)
                mask = attention_mask(keys, ids.shape[1], "sdpa", torch.float64, sight)
                with torch.no_grad():
                    logits += model(
                        input_ids=ids, attention_mask=mask, score_positions=scored, score_reduce=lambda x, _: (x,)
                    )
            assert (logits[0] - logits[1]).abs().max() <= 1e-10


# --- recorded masks ---------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "models").glob("*/cases.json"))
    cases = [case for file in files for case in json.loads(file.read_text(encoding="utf-8")).get("cases", ())]
    return [case for case in cases if case.get("attention_mask_2d_bool_LxL")]


def test_recorded_masks_of_published_models(conformance_dir: Path):
    """Their own mask builders' blocks: in one copy, and in a noisy copy before a clean one, whose positions repeat."""
    checked = 0
    for case in recorded(conformance_dir):
        mask = torch.tensor(case["attention_mask_2d_bool_LxL"]).bool()
        positions = case["position_ids"]
        twice = positions is not None and positions[0][: len(mask) // 2] == positions[0][len(mask) // 2 :]
        spec = spec_of("block_causal", "position_zero", int(mask[0].sum()))  # the first token sees its block alone
        keys = torch.ones(1, len(mask) // (2 if twice else 1)).bool()
        if twice:
            sight: Sight | None = two_copies(spec, position_ids(keys), None, 0)
        else:
            sight = one_copy(spec, position_ids(keys))
        assert torch.equal(bools(sight, torch.ones(1, len(mask)).bool())[0], mask), case["name"]
        checked += 1
    if not checked:
        pytest.skip("no case with a recorded block mask")


# --- what cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "implementation", "message"),
    [
        ({"attention": "block_causal"}, "sdpa", "attention='block_causal'.*block_length=None"),
        ({"attention": "context_causal"}, "sdpa", "attention='context_causal'.*block_length=None"),
        (
            {"attention": "block_causal", "block_length": 4},
            "flash_attention_2",
            "flash_attention_2.*block_causal.*sdpa, eager or flex_attention",
        ),
        ({"attention": "causal"}, "flash_attention_2", "flash_attention_2.*causal"),
        ({}, "paged", "attn_implementation='paged'.*sdpa, eager"),
    ],
)
def test_what_cannot_run_is_named(spec: dict[str, Any], implementation: str, message: str):
    with pytest.raises(ValueError, match=message):
        check_attention(DiffusionSpec(1, (0,), **spec), implementation)


def test_a_model_whose_blocks_have_no_length_is_refused():
    model = tiny_llada(vocab_size=VOCAB)
    model.config.diffusion.update(attention="block_causal")
    with pytest.raises(ValueError, match="block_length=None"):
        RolloutEngine(model)


def test_what_a_mask_depends_on_must_be_given():
    keys, positions, _ = batch()
    with pytest.raises(ValueError, match="grid_origin='response'.*prompt_lengths"):
        one_copy(spec_of("block_causal", "response"), positions)
    with pytest.raises(ValueError, match="context_causal.*being denoised"):
        one_copy(spec_of("context_causal", "position_zero"), positions)
    sight = one_copy(spec_of("causal", "response"), positions)
    with pytest.raises(ValueError, match="flash_attention_3.*padding or blocks"):
        attention_mask(keys, 16, "flash_attention_3", torch.float32, sight)
