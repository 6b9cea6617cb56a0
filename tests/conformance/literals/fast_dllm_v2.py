"""Fast-dLLM v2's own sampler, on checkpoints of `models/`: sub-blocks of a block, with and without their cache.

The literal is the released loop: finished blocks are stored, a block is fed whole or, with the sub-block cache, its
sub-block alone against what the rest of the block was when it was last fed whole. Two forwards of the record have no
counterpart here: those that only store keys and values, of a prompt that ends inside a block and of the last block. The
others that store give the first token of the next block, as the first step of a block does here.

Rows of different lengths share their steps in the released code, which pads them with mask tokens that are decoded as
if they were response. Their records are predicted by that rule, and our rows by the same loop over each row alone.
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

LOCKSTEP = (
    "rows of a batch of Fast-dLLM v2 share their steps, and when their block is fed whole, and a token is predicted "
    "behind the last block; here every row is at its own place"
)

Keys = list[tuple[Tensor, Tensor]]
"""Keys (rotated) and values of some positions, `[1, heads, n, d]` per layer."""


def record(case: Case) -> Recorded:
    """The record with whole rows as states, without forwards that only store and the token behind the last block."""
    if len(case.inputs["prompt_ids"]) > 1:
        return _record_of_several(case)
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


def _record_of_several(case: Case) -> Recorded:
    """The record as it is: what each forward is fed, and rows with the token behind the last block."""
    prompts, longest = case.inputs["prompt_ids"], max(map(len, case.inputs["prompt_ids"]))
    padded = torch.zeros(len(prompts), longest, dtype=torch.long)
    keys = torch.zeros_like(padded).bool()
    for row, prompt in enumerate(prompts):
        padded[row, longest - len(prompt) :], keys[row, longest - len(prompt) :] = torch.tensor(prompt), True
    forwards = [torch.tensor(fed) for fed in case.outputs["forward_inputs"]]
    ids = torch.tensor(case.outputs["ids"])
    return Recorded(case, padded, keys, ids, forwards, case.outputs["nfe_forward_calls"])


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
        canvas_length=_width(recorded) - int(recorded.keys.sum(-1).min()),
        schedule="sub_blocks",
        schedule_args={"sub_block_length": size, "threshold": settings["threshold"]},
        cache=recorded.case.cache,
        cache_args={"sub_block_length": size} if recorded.case.cache == "sub_block" else {},
        stop_at_eos=True,
    )


def rows(recorded: Recorded, rollout: Rollout) -> Run:
    """A rollout, cut behind the stop token as the reference cuts."""
    if len(recorded.prompts) > 1:
        return _several(recorded, rollout)
    run = rows_of(recorded, rollout)
    return dataclasses.replace(run, ids=_cut(recorded, run.ids))


def _several(recorded: Recorded, rollout: Rollout) -> Run:
    """Rows without padding, up to the end of the last block; those of long prompts have a longer canvas here."""
    width, states, ids = _width(recorded), [], []
    for row, prompt in enumerate(rollout.prompt_ids):
        own = torch.tensor(prompt)
        whole = [torch.cat([own, state[row]])[:width] for state in rollout.states()]
        done = [_ended(recorded, state, len(prompt)) or recorded.mask not in state for state in whole]
        made = int(rollout.nfe[row])
        states.append([state for state, over in zip(whole[:made], done, strict=False) if not over])
        ids.append(_filled(recorded, torch.cat([own, rollout.canvas[row]])[:width], len(prompt)))
    return Run(torch.stack(ids), states, [len(row) for row in states])


def difference(recorded: Recorded, run: Run) -> str:
    """As rows go; and with the sub-block cache in what is fed, but for what a block's first step stores besides."""
    if len(recorded.prompts) > 1:
        return "rows share their steps"
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
    prompts = [row[keys] for row, keys in zip(recorded.prompts, recorded.keys, strict=True)]
    rules = {MASK_IN_PROMPT} if recorded.masks_in_prompt and deviations else set()
    if len(prompts) > 1 and deviations:
        return _together(recorded, prompts, rules | {LOCKSTEP})
    found = [_alone(recorded, prompt) for prompt in prompts]
    if len(prompts) == 1:
        ids, states = found[0]
        return Literal(_cut(recorded, ids[None]), states, states, [torch.ones(1).bool()] * len(states), rules)
    steps = max(len(states) for _, states in found)
    wrote = [torch.tensor([step < len(states) for _, states in found]) for step in range(steps)]
    states = [torch.cat([states[min(step, len(states) - 1)] for _, states in found]) for step in range(steps)]
    ids = [_filled(recorded, row, len(prompt)) for (row, _), prompt in zip(found, prompts, strict=True)]
    return Literal(torch.stack(ids), states, states, wrote, rules)


def _together(recorded: Recorded, prompts: list[Tensor], rules: set[str]) -> Literal:
    """The released loop over several rows. What it does with rows that have ended is left out."""
    settings, mask, net = recorded.case.settings, recorded.mask, model(recorded)[0]
    size, sub = settings["block_size"], settings["small_block_size"]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows, fed = torch.full((len(prompts), int(lengths.max())), mask), []
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt)] = prompt
    stores: list[Keys | None] = [None] * len(prompts)
    least = int(lengths.min())
    if least > size:
        part = torch.arange(least // size * size)
        fed.append(rows[:, part].clone())
        sees = (part // size)[:, None] >= part // size
        for row in range(len(rows)):
            logits, stores[row] = _forward(net, rows[row, part], part, None, sees)
            if least % size == 0 and lengths[row] == least:
                if rows.shape[1] <= least:
                    rows = torch.cat([rows, rows.new_full((len(rows), 1), mask)], dim=1)
                rows[row, least] = logits[-1].argmax(-1)
    at = lengths // size
    for number in range(least // size, settings["max_new_tokens"] // size + int(lengths.max()) // size):
        start, end = number * size, (number + 1) * size
        if bool((at == number).all()):
            rows = torch.cat([rows, rows.new_full((len(rows), size - rows.shape[1] % size), mask)], dim=1)
        now, block = rows[:, :end].clone(), torch.arange(start, end)
        inside: list[Keys] | None = None
        for first in range(start, end, sub):
            here = torch.arange(first, min(first + sub, end))
            while bool((now[:, here] == mask).any()):
                whole = not settings["use_block_cache"] or inside is None or bool((now[:, first] == mask).any())
                fed.append(now[:, block if whole else here].clone())
                if whole:
                    made = [_forward(net, now[row, block], block, store) for row, store in enumerate(stores)]
                    inside = [new for _, new in made]
                    scores = [torch.cat([logits[:1], logits[:-1]])[here - start] for logits, _ in made]
                else:
                    assert inside is not None
                    rest = torch.cat([block[block < first], block[block > here[-1]]]) - start
                    made = [
                        _forward(net, now[row, here], here, _joined(store, _taken(inside[row], rest)))
                        for row, store in enumerate(stores)
                    ]
                    inside = [_replaced(keys, here - start, new) for keys, (_, new) in zip(inside, made, strict=True)]
                    scores = [torch.cat([logits[:1], logits[:-1]]) for logits, _ in made]
                for row, logits in enumerate(scores):
                    confidence, token = logits.softmax(-1).max(-1)
                    masked = now[row, here] == mask
                    confidence = confidence.masked_fill(~masked, -torch.inf)
                    chosen = confidence > settings["threshold"]
                    chosen[confidence.argmax()] = True
                    now[row, here[chosen & masked]] = token[chosen & masked]
        fed.append(now[:, block].clone())
        made = [_forward(net, now[row, block], block, store) for row, store in enumerate(stores)]
        stores = [_joined(store, new) for store, (_, new) in zip(stores, made, strict=True)]
        following = torch.stack([logits[-1].argmax(-1) for logits, _ in made])
        rows = torch.cat([now, rows[:, end:]], dim=1)
        if rows.shape[1] <= end:
            rows = torch.cat([rows, following[:, None]], dim=1)
        else:
            rows[:, end] = torch.where(at == number, following, rows[:, end])
        at = torch.where(at == number, number + 1, at)
    nothing = [torch.zeros(len(rows)).bool()] * len(fed)
    return Literal(rows, fed, [], nothing, rules)


def _alone(recorded: Recorded, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The row `[W]` that the released loop makes of a prompt, ends written where nothing is, and its states."""
    settings, mask, stop = recorded.case.settings, recorded.mask, recorded.case.settings["stop_token"]
    size, sub, prompt = settings["block_size"], settings["small_block_size"], len(tokens)
    ids = torch.full((_width(recorded),), mask)
    ids[:prompt] = tokens
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
        return _ended(recorded, ids, prompt)

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
    return torch.where(ids == mask, stop, ids), states


def _ended(recorded: Recorded, ids: Tensor, prompt: int) -> bool:
    """Whether all up to a stop token of the response is written."""
    stop, row = recorded.case.settings["stop_token"], ids[prompt:].tolist()
    return stop in row and recorded.mask not in row[: row.index(stop)]


def _filled(recorded: Recorded, ids: Tensor, prompt: int) -> Tensor:
    """The row with stop tokens behind its first one, so that what was written there does not count."""
    stop = ids[prompt:] == recorded.case.settings["stop_token"]
    behind = torch.cat([torch.zeros(prompt).bool(), stop.cumsum(0) > 0])
    return torch.where(behind, recorded.case.settings["stop_token"], ids)


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
    """Prompts that end anywhere in a block, several of them one time out of four."""
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
    lengths = [rng.randint(1, 20) for _ in range(1 if seed % 4 else 3)]
    keys = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    prompts = torch.randint(0, 119, keys.shape, generator=generator) * keys
    case = Case(folder(), "fastdllmv2_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, keys, prompts, None, nfe=10**9)
