"""The prefix cache: exact while nothing has changed, stale once something has, always what a stock cache would give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rl4dlm.models.attention import attention_mask, position_ids
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.caches import Now, Plan
from rl4dlm.rollout.caches.prefix import PrefixCache
from rl4dlm.rollout.caches.store import KeyValueStore
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.models.float64 import exactly_float64
from tests.rollout.denoisers import MASK, PROMPTS, assert_same_rows, denoiser

LENGTH, BLOCK = 12, 4
SETTINGS = {
    "greedy": {"steps": 6},
    "sampled": {"steps": 6, "temperature": 1.0},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.4}},
    "guided": {"steps": 6, "cfg_scale": 1.5},
}


def decoded(shift: int = 0, **settings: Any) -> Rollout:
    decoding = DecodingConfig(
        **{"canvas_length": LENGTH, "block_length": BLOCK, "stop_at_eos": False, "cache": "prefix", **settings}
    )
    return RolloutEngine(denoiser(shift=shift)).generate(PROMPTS, decoding, seed=4)


class Refreshing(PrefixCache):
    """Feeds everything at every step, through the store."""

    def plan(self, now: Now) -> Plan:
        return Plan(torch.full_like(now.start, -1))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_refreshing_at_every_step_is_no_cache(name: str, shift: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DecodingConfig, "build_cache", lambda self, spec: Refreshing())
    refreshed = decoded(shift, **SETTINGS[name])
    monkeypatch.undo()
    plain = decoded(shift, cache="none", **SETTINGS[name])
    assert_same_rows(refreshed, plain)
    assert torch.equal(refreshed.trace.raw_log_prob, plain.trace.raw_log_prob)


class Batch:
    """A left-padded batch of prompts and masked canvases, and forwards over it."""

    def __init__(self) -> None:
        self.model = denoiser()
        width = max(map(len, PROMPTS))
        self.tokens = torch.full((len(PROMPTS), width + LENGTH), MASK)
        self.keys = torch.ones_like(self.tokens).bool()
        for row, prompt in enumerate(PROMPTS):
            self.tokens[row, : width - len(prompt)], self.keys[row, : width - len(prompt)] = 0, False
            self.tokens[row, width - len(prompt) : width] = torch.tensor(prompt)
        self.width, self.positions = width, position_ids(self.keys)
        self.store = KeyValueStore(self.model.config.num_hidden_layers, len(PROMPTS), width + LENGTH)

    def logits(self, columns: Tensor, rows: list[int] | None = None, *, stored: bool = True) -> Tensor:
        """Logits of the columns `[r, q]` that are fed, from the model's own forward."""
        index = torch.arange(len(PROMPTS)) if rows is None else torch.tensor(rows)
        extra: dict[str, Any] = {}
        if stored:
            self.store.place(index, columns)
            extra["past_key_values"] = self.store
        with torch.no_grad():
            return self.model(
                input_ids=self.tokens[index].gather(-1, columns),
                attention_mask=attention_mask(self.keys[index], columns.shape[1], "sdpa", torch.float64),
                position_ids=self.positions[index].gather(-1, columns),
                use_cache=False,
                **extra,
            ).logits

    @property
    def all_columns(self) -> Tensor:
        return torch.arange(self.tokens.shape[1]).expand_as(self.tokens)

    def from_starts(self, starts: list[int]) -> Tensor:
        """Columns from a start of each row on, repeating the last one in rows that start later."""
        first = torch.tensor(starts) + self.width
        feed = self.tokens.shape[1] - int(first.min())
        return (first[:, None] + torch.arange(feed)).clamp(max=self.tokens.shape[1] - 1)


def test_a_cached_step_without_change_is_a_full_forward():
    batch = Batch()
    whole = batch.logits(batch.all_columns, stored=False)
    entered = batch.logits(batch.all_columns)
    assert (entered - whole)[batch.keys].abs().max() <= 1e-12
    columns = batch.from_starts([0, 4, 8, 4, 11])  # rows in different blocks
    cached = batch.logits(columns)
    expected = whole.gather(1, columns[..., None].expand(-1, -1, whole.shape[-1]))
    assert (cached - expected).abs().max() <= 1e-12
    some = batch.logits(columns[[1, 3]], [1, 3])  # other rows in the store are not touched
    assert (some - expected[[1, 3]]).abs().max() <= 1e-12


def test_a_cached_step_after_a_commit_is_stale():
    batch = Batch()
    batch.logits(batch.all_columns)
    batch.tokens[:, batch.width + 4] = 9
    whole = batch.logits(batch.all_columns, stored=False)
    cached = batch.logits(batch.from_starts([4] * len(PROMPTS)))
    error = (cached - whole[:, batch.width + 4 :]).abs().amax((1, 2))
    assert bool((error > 1e-3).all())
    # What is stored is that of the forward before: another full one brings it up to date.
    batch.logits(batch.all_columns)
    again = batch.logits(batch.from_starts([4] * len(PROMPTS)))
    assert (again - whole[:, batch.width + 4 :]).abs().max() <= 1e-12


def test_compaction_keeps_the_right_rows():
    batch = Batch()
    whole = batch.logits(batch.all_columns)
    keep = torch.tensor([1, 3, 4])
    batch.store.compact(keep)
    for name in ("tokens", "keys", "positions"):
        setattr(batch, name, getattr(batch, name)[keep])
    columns = torch.arange(batch.width + 4, batch.tokens.shape[1]).expand(3, -1)
    cached = batch.logits(columns, [0, 1, 2])
    assert (cached - whole[keep][:, batch.width + 4 :]).abs().max() <= 1e-12


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", ["greedy", "sampled", "threshold"])
def test_log_probabilities_are_those_of_the_stock_cache(name: str, shift: int):
    """Row by row: enter each block with a full forward, crop a `DynamicCache` to what precedes it, feed the rest."""
    rollout, model, checked = decoded(shift, **SETTINGS[name]), denoiser(shift=shift), 0
    for row, prompt in enumerate(rollout.prompt_ids):
        states, entered = list(rollout.states()), -1
        for step in range(int(rollout.trace.steps[row])):
            committed = (rollout.trace.commit_step[row] == step).nonzero().squeeze(-1)
            block = int(committed[0]) // BLOCK
            tokens = torch.tensor([[*prompt, *states[step][row].tolist()]])
            if block != entered:
                cache, start, entered = DynamicCache(), 0, block
            else:
                start = len(prompt) + block * BLOCK - shift
                cache.crop(start - cache.get_seq_length())
            fed = tokens[:, start:]
            with torch.no_grad():
                logits = model(
                    input_ids=fed,
                    attention_mask=torch.ones(1, 1, fed.shape[1], tokens.shape[1]).bool(),
                    position_ids=torch.arange(start, tokens.shape[1])[None],
                    past_key_values=cache,
                    use_cache=True,
                ).logits[0]
            for offset in committed.tolist():
                at = len(prompt) + offset - shift - start
                expected = logits[at].log_softmax(-1)[rollout.canvas[row, offset]]
                assert abs(rollout.trace.raw_log_prob[row, offset] - expected) <= 1e-10
                checked += 1
    assert checked == LENGTH * len(PROMPTS)


def test_staleness_shows_in_a_rollout():
    cached, plain = decoded(steps=6), decoded(steps=6, cache="none")
    first_of_block = torch.isin(cached.trace.commit_step, torch.tensor([0]))
    assert torch.equal(cached.trace.raw_log_prob[first_of_block], plain.trace.raw_log_prob[first_of_block])
    assert not torch.allclose(cached.trace.raw_log_prob, plain.trace.raw_log_prob, atol=1e-6)
    assert not cached.exact and plain.exact


@pytest.mark.parametrize("block_length", [LENGTH, BLOCK])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_step_per_block_never_uses_the_cache(block_length: int, temperature: float):
    settings = {"steps": LENGTH // block_length, "block_length": block_length, "temperature": temperature}
    assert_same_rows(decoded(**settings), decoded(cache="none", **settings))


@pytest.mark.parametrize("steps", [3, 6, 9, 12])
def test_forwards_are_steps_and_blocks_are_written_alone(steps: int):
    rollout = decoded(steps=steps)
    assert rollout.nfe.tolist() == [steps] * len(PROMPTS)
    blocks = rollout.trace.commit_step.view(len(PROMPTS), -1, BLOCK)
    for block in range(LENGTH // BLOCK):
        per_block = steps // (LENGTH // BLOCK)
        low = block * per_block
        assert bool(((blocks[:, block] >= low) & (blocks[:, block] < low + per_block)).all())


def forwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each forward from here on."""
    fed: list[int] = []
    body = model.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        fed.append(input_ids.numel())
        return body(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    return fed


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_rows_that_enter_a_block_share_a_forward_with_rows_inside_one(
    threshold: float, monkeypatch: pytest.MonkeyPatch
):
    """There are as many forwards as the longest row has steps, wherever the others are."""
    fed = forwards(denoiser(shift=0), monkeypatch)
    rollout = decoded(schedule="threshold", schedule_args={"threshold": threshold})
    steps = rollout.trace.steps
    assert len(fed) == int(steps.max())
    assert len(set(steps.tolist())) > 1, "rows that go on in step show nothing"


def test_weights_that_change_are_seen_by_the_next_call():
    """Keys and values live no longer than a call: none is of older weights."""
    model, other = (attach_scoring(copy.deepcopy(bare())) for _ in range(2))
    config = DecodingConfig(canvas_length=LENGTH, block_length=BLOCK, steps=6, cache="prefix", temperature=1.0)
    engine = RolloutEngine(model)
    engine.generate(PROMPTS, config)
    with torch.no_grad():
        for changed, same in zip(model.parameters(), other.parameters(), strict=True):
            changed.mul_(1.1)
            same.mul_(1.1)
    assert_same_rows(engine.generate(PROMPTS, config), RolloutEngine(other).generate(PROMPTS, config))


def bare() -> Any:
    """A denoiser that nobody else has, and nothing is attached to."""
    return exactly_float64(tiny_llada(vocab_size=24, initializer_range=0.4, dtype=torch.float64))
