"""Fast-dLLM v2's own sampler, on checkpoints of `models/`: sub-blocks of a block, with and without their cache.

The literal is the released loop: finished blocks are stored, a block is fed whole or, with the sub-block cache, its
sub-block alone against what the rest of the block was when it was last fed whole. Two forwards of the record have no
counterpart here: those that only store keys and values, of a prompt that ends inside a block and of the last block. The
others that store give the first token of the next block, as the first step of a block does here.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rl4dlm.models.loading import load_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import MASK_IN_PROMPT
from tests.conformance.samplers import Literal, Recorded, Run, rows_of

Keys = list[tuple[Tensor, Tensor]]
"""Keys (rotated) and values of some positions, `[1, heads, n, d]` per layer."""


def record(case: Case) -> Recorded:
    """The record with whole rows as states, without forwards that only store and the token behind the last block."""
    found = Recorded.of(case)
    assert found.forwards is not None and len(found.prompts) == 1
    width, size, forwards = _width(found), case.settings["block_size"], []
    for number, fed in _kept(found):
        start, end = case.outputs["events"][number]["fed"]
        if case.outputs["events"][number]["kind"] == "commit":
            start, fed = end, fed[:, :0]  # what is decided is the token behind
        row = torch.full((1, width), found.mask)
        row[:, :start] = found.ids[:, :start]
        row[:, start : start + fed.shape[1]] = fed
        block_end = (start // size + 1) * size  # behind a sub-block nothing of its block is written
        assert start + fed.shape[1] <= block_end
        forwards.append(row)
    return dataclasses.replace(found, ids=found.ids[:, :width], forwards=forwards, nfe=len(forwards))


def model(recorded: Recorded) -> tuple[Any, DiffusionSpec]:
    """The checkpoint that the case names, with the case's block length and stop token."""
    settings = recorded.case.settings
    names = (settings["model"], settings["block_size"], settings["mask_id"], settings["stop_token"])
    return _model(*names, recorded.case.compute_dtype)


@functools.lru_cache(maxsize=8)
def _model(name: str, block_length: int, mask: int, stop: int, dtype: str) -> tuple[Any, DiffusionSpec]:
    denoiser = load_denoiser(folder() / "models" / name, dtype=getattr(torch, dtype), mask_token_id=mask)
    spec = {"block_length": block_length, "eos_token_ids": [stop]}
    denoiser.config.diffusion = {**denoiser.config.diffusion, **spec}
    return attach_scoring(denoiser.eval()), DiffusionSpec.of(denoiser)


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    size = settings["small_block_size"]
    return DecodingConfig(
        canvas_length=_width(recorded) - recorded.prompts.shape[1],
        schedule="sub_blocks",
        schedule_args={"sub_block_length": size, "threshold": settings["threshold"]},
        cache=recorded.case.cache,
        cache_args={"sub_block_length": size} if recorded.case.cache == "sub_block" else {},
        stop_at_eos=True,
    )


def rows(recorded: Recorded, rollout: Rollout) -> Run:
    """A rollout, cut behind the stop token as the reference cuts."""
    run = rows_of(recorded, rollout)
    return dataclasses.replace(run, ids=_cut(recorded, run.ids))


def difference(recorded: Recorded, run: Run) -> str:
    """As rows go; and with the sub-block cache in what is fed, but for what a block's first step stores besides."""
    from tests.conformance.verdict import difference as of_rows  # which imports all literals

    found = of_rows(recorded, dataclasses.replace(run, fed=None))
    expected = [fed for number, fed in _kept(recorded) if recorded.case.outputs["events"][number]["kind"] != "commit"]
    if found or run.fed is None or not expected:
        return found
    commits = [recorded.case.outputs["events"][number]["kind"] == "commit" for number, _ in _kept(recorded)]
    fed = [mine for mine, commit in zip(run.fed, commits, strict=True) if not commit]
    same = [torch.equal(mine[:, -other.shape[1] :], other) for mine, other in zip(fed, expected, strict=True)]
    short = [mine.shape == other.shape for mine, other in zip(fed[1:], expected[1:], strict=True)]
    return "" if all(same) and all(short) else "what is fed differs"


def _kept(recorded: Recorded) -> list[tuple[int, Tensor]]:
    """The forwards of a record that have a counterpart here, by their number, and what they are fed."""
    events = recorded.case.outputs.get("events") or []
    width, size, prompt = _width(recorded), recorded.case.settings["block_size"], recorded.prompts.shape[1]
    kept = []
    for number, event in enumerate(events):
        end = event["fed"][1]
        if event["kind"] == "commit" and (end >= width or (end <= prompt and prompt % size)):
            continue
        kept.append((number, torch.tensor(recorded.case.outputs["forward_inputs"][number])))
    return kept


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    settings, mask, stop = recorded.case.settings, recorded.mask, recorded.case.settings["stop_token"]
    size, sub, prompt = settings["block_size"], settings["small_block_size"], recorded.prompts.shape[1]
    ids = torch.full((_width(recorded),), mask)
    ids[:prompt] = recorded.prompts[0]
    net, states = model(recorded)[0], []
    store: Keys | None = None
    if prompt >= size:  # what precedes the block that is begun, each block seeing itself and those before it
        part = torch.arange(prompt // size * size)
        states.append(ids.clone()[None])
        logits, store = _forward(net, ids[part], part, None, (part // size)[:, None] >= part // size)
        if prompt % size:
            states.pop()
        else:
            ids[prompt] = logits[-1].argmax(-1)

    def ended() -> bool:
        return any(token == stop and mask not in ids[prompt:place] for place, token in _enumerated(ids, prompt))

    for start in range(prompt // size * size, len(ids), size):
        block, inside = torch.arange(start, start + size), None  # keys of the block as of its last whole forward
        for first in range(start, start + size, sub):
            here = torch.arange(first, min(first + sub, start + size))
            while bool((ids[here] == mask).any()) and not ended():
                states.append(ids.clone()[None])
                if not settings["use_block_cache"] or inside is None or ids[first] == mask:
                    logits, inside = _forward(net, ids[block], block, store)
                    logits = torch.cat([logits[:1], logits[:-1]])[here - start]
                else:
                    rest = torch.cat([block[block < first], block[block > here[-1]]]) - start
                    logits, new = _forward(net, ids[here], here, _joined(store, _taken(inside, rest)))
                    inside = _replaced(inside, here - start, new)
                    logits = torch.cat([logits[:1], logits[:-1]])
                confidence, token = logits.softmax(-1).max(-1)
                confidence = confidence.masked_fill(ids[here] != mask, -torch.inf)
                chosen = confidence > settings["threshold"]
                chosen[confidence.argmax()] = True
                ids[here[chosen]] = token[chosen]
        if ended() or start + size == len(ids):
            break
        states.append(ids.clone()[None])
        logits, new = _forward(net, ids[block], block, store)
        store = _joined(store, new)
        ids[start + size] = logits[-1].argmax(-1)
        if ended():
            break
    rules = {MASK_IN_PROMPT} if recorded.masks_in_prompt and deviations else set()
    ids = torch.where(ids == mask, stop, ids)
    return Literal(_cut(recorded, ids[None]), states, states, [torch.ones(1).bool()] * len(states), rules)


def _enumerated(ids: Tensor, prompt: int) -> list[tuple[int, int]]:
    return [(place, int(ids[place])) for place in range(prompt, len(ids))]


def _forward(
    net: Any, ids: Tensor, positions: Tensor, past: Keys | None, sees: Tensor | None = None
) -> tuple[Tensor, Keys]:
    """Logits `[n, V]` of some positions against stored ones and themselves, and their keys and values."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past or []):
        cache.update(keys, values, layer)
    before = cache.get_seq_length()
    mask = torch.ones(len(ids), before + len(ids)).bool() if sees is None else sees
    found = net(
        input_ids=ids[None],
        attention_mask=mask[None, None],
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
    )
    return found.logits[0], [(layer.keys[:, :, before:], layer.values[:, :, before:]) for layer in cache.layers]


def _joined(a: Keys | None, b: Keys) -> Keys:
    if a is None:
        return b
    return [(torch.cat([k, m], 2), torch.cat([v, n], 2)) for (k, v), (m, n) in zip(a, b, strict=True)]


def _taken(keys: Keys, index: Tensor) -> Keys:
    return [(k[:, :, index], v[:, :, index]) for k, v in keys]


def _replaced(keys: Keys, index: Tensor, new: Keys) -> Keys:
    return [(k.index_copy(2, index, m), v.index_copy(2, index, n)) for (k, v), (m, n) in zip(keys, new, strict=True)]


def _width(recorded: Recorded) -> int:
    """Positions of the block that the prompt ends in and of those that follow; the reference counts whole blocks."""
    size = recorded.case.settings["block_size"]
    return (recorded.prompts.shape[1] // size + recorded.length // size) * size


def _cut(recorded: Recorded, ids: Tensor) -> Tensor:
    """Up to the first stop token of the response."""
    prompt = recorded.prompts.shape[1]
    ends = (ids[0, prompt:] == recorded.case.settings["stop_token"]).nonzero().flatten()
    return ids[:, : prompt + int(ends[0]) + 1] if len(ends) else ids


def made_up(seed: int) -> Recorded:
    """Prompts that end anywhere in a block."""
    rng, generator = random.Random(f"fast-dllm v2 {seed}"), torch.Generator().manual_seed(seed)
    size = rng.choice([4, 8, 16])
    settings: dict[str, Any] = {
        "model": "fast-dllm-v2",
        "block_size": size,
        "small_block_size": rng.choice([n for n in (1, 2, 4, 8) if n <= size]),
        "max_new_tokens": size * rng.randint(1, 3),
        "mask_id": 120,
        "stop_token": rng.randint(0, 119),
        "threshold": rng.choice([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]),
        "use_block_cache": seed % 2 == 1,
    }
    prompts = torch.randint(0, 119, (1, rng.randint(1, 20)), generator=generator)
    case = Case(folder(), "fastdllmv2_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
