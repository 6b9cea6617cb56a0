"""Decoding models with attention blocks: on their grid, exactly cached, and as the trainer recomputes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations import flex_attention as flex

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import Now, Plan
from rl4dlm.rollout.caches.prefix import PrefixCache
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, even_counts, top
from tests.models.block_denoisers import (
    BLOCK,
    KINDS,
    LENGTH,
    MASK,
    PROMPTS,
    block_denoiser,
    block_of,
    decoding_log_probs,
)
from tests.rollout.denoisers import assert_same_rows

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"steps": 9},
    "sampled": {"steps": 6, "temperature": 1.0},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.4}},
    "guided": {"steps": 6, "cfg_scale": 1.5},
}
HINTS = [{0: 9}, {}, {4: 5, 5: 6, 6: 7, 7: 8}, {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4}, {9: 3}]
"""Among them blocks that are given whole, and so never entered."""


def decoded(kind: str, origin: str, *, shift: int = 0, **settings: Any) -> Rollout:
    hints = settings.pop("hints", None)
    config = DecodingConfig(**{"canvas_length": LENGTH, "stop_at_eos": False, "cache": "none", **settings})
    return RolloutEngine(block_denoiser(kind, origin, shift=shift)).generate(PROMPTS, config, seed=4, hints=hints)


def blocks_of(rollout: Rollout, spec: DiffusionSpec) -> list[list[int]]:
    """Block of each canvas slot, per row."""
    return [[block_of(spec, len(p), len(p) + i) for i in range(LENGTH)] for p in rollout.prompt_ids]


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_blocks_are_written_one_after_another_on_the_models_grid(kind: str, origin: str, name: str):
    rollout, spec = decoded(kind, origin, **SETTINGS[name]), DiffusionSpec.of(block_denoiser(kind, origin))
    assert not bool((rollout.canvas == MASK).any())
    for blocks, steps in zip(blocks_of(rollout, spec), rollout.trace.commit_step.tolist(), strict=True):
        for i in range(LENGTH):
            for j in range(LENGTH):
                assert blocks[i] >= blocks[j] or steps[i] < steps[j]


def test_each_block_has_its_share_of_the_steps():
    rollout = decoded("block_causal", "position_zero", steps=6)  # three blocks of a row that starts on the grid
    blocks = blocks_of(rollout, DiffusionSpec.of(block_denoiser("block_causal", "position_zero")))
    steps = [sum(min(2, row.count(block)) for block in set(row)) for row in blocks]
    assert rollout.trace.steps.tolist() == rollout.nfe.tolist() == steps


def test_the_models_own_block_length_may_be_named():
    settings = {"canvas_length": 8, "block_length": BLOCK, "steps": 4}
    engine = RolloutEngine(block_denoiser("block_causal", "position_zero"))
    unnamed = engine.generate(PROMPTS, DecodingConfig(**{**settings, "block_length": None}))
    assert_same_rows(engine.generate(PROMPTS, DecodingConfig(**settings)), unnamed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"canvas_length": 8, "block_length": 8}, "block_length=8 contradicts.*block_causal.*4.*None"),
        ({"canvas_length": 8, "block_length": 2}, "block_length=2 contradicts.*4"),
        ({"canvas_length": 10, "steps": 10}, "steps=10.*3 blocks.*canvas_length=10, block_length=4.*multiple of 3"),
    ],
)
def test_blocks_that_are_not_the_models_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RolloutEngine(block_denoiser("block_causal", "response")).generate(PROMPTS, DecodingConfig(**settings))


@pytest.mark.parametrize("change", [{"grid_origin": "position_zero"}, {"block_length": 8}, {"attention": "causal"}])
def test_a_spec_with_another_grid_is_refused(change: dict[str, Any]):
    model = block_denoiser("block_causal", "response")
    with pytest.raises(ValueError, match=f"spec has {next(iter(change))}="):
        RolloutEngine(model, dataclasses.replace(DiffusionSpec.of(model), **change))


# --- what was drawn is what decoding, the cache and the trainer say ---------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_log_probabilities_are_those_of_the_recorded_states(kind: str, origin: str, shift: int):
    rollout, model = (
        decoded(kind, origin, shift=shift, steps=6, temperature=1.0),
        block_denoiser(kind, origin, shift=shift),
    )
    for step, states in enumerate(rollout.states()):
        for row, prompt in enumerate(PROMPTS):
            state = states[row].tolist()
            with torch.no_grad():
                expected = decoding_log_probs(model, prompt, state, state)
            for i in (rollout.trace.commit_step[row] == step).nonzero().squeeze(-1).tolist():
                assert abs(rollout.trace.raw_log_prob[row, i] - expected[i, rollout.canvas[row, i]]) <= 1e-10


@pytest.mark.parametrize("hints", [None, HINTS], ids=["free", "hinted"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response")])
def test_the_prefix_cache_is_exact(kind: str, origin: str, shift: int, name: str, hints: Any):
    block = {"canvas_length": 12, "block_length": BLOCK} if kind == "causal" else {}
    plain, cached = (
        decoded(kind, origin, shift=shift, cache=cache, hints=hints, **block, **SETTINGS[name])
        for cache in ("none", "prefix")
    )
    assert_same_rows(cached, plain)
    assert cached.exact


@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response")])
def test_a_cache_whose_blocks_are_not_stored_again_when_finished_is_not_exact(
    kind: str, origin: str, monkeypatch: pytest.MonkeyPatch
):
    class Uncommitted(PrefixCache):
        def plan(self, now: Now) -> Plan:
            return Plan(torch.where(now.refreshed < 0, -1, now.start))

    block = {"canvas_length": 12, "block_length": BLOCK} if kind == "causal" else {}
    plain = decoded(kind, origin, **block, steps=6)
    monkeypatch.setattr(DecodingConfig, "build_cache", lambda self, spec: Uncommitted())
    stale = decoded(kind, origin, cache="prefix", **block, steps=6)
    assert not torch.allclose(stale.trace.raw_log_prob, plain.trace.raw_log_prob, atol=1e-6)


def fed_columns(monkeypatch: pytest.MonkeyPatch, model: Any, prompt: list[int], **settings: Any) -> list[int]:
    widths: list[int] = []
    body = model.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        widths.append(input_ids.shape[1])
        return body(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    RolloutEngine(model).generate([prompt], DecodingConfig(canvas_length=12, stop_at_eos=False, **settings))
    return widths


@pytest.mark.parametrize("shift", [0, 1])
def test_only_what_can_be_seen_and_has_changed_is_fed(shift: int, monkeypatch: pytest.MonkeyPatch):
    model, prompt = block_denoiser("block_causal", "position_zero", shift=shift), [5, 6, 7, 8, 9, 10]
    plain = fed_columns(monkeypatch, model, prompt, steps=6, cache="none")
    assert plain == [8, 8, 12, 12, 16, 16, 18, 18]  # two of the prompt's tokens are in the first block
    cached = fed_columns(monkeypatch, model, prompt, steps=6)  # `auto` is the exact block cache here
    again = [4 + shift, 8 + shift, 4 + shift, 8 + shift, 4 + shift, 6 + shift, 2 + shift]
    assert cached == [8, *again]  # a block's first step also feeds the block before it


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_the_trainer_recomputes_every_step_of_every_block_at_once(kind: str, origin: str, cache: str, shift: int):
    """View k is the state of each block before its own step k: one row of views per step of the longest block."""
    rollout = decoded(kind, origin, shift=shift, steps=9, temperature=1.0, cache=cache, hints=HINTS)
    model, steps = block_denoiser(kind, origin, shift=shift), rollout.trace.commit_step
    spec, width = DiffusionSpec.of(model), max(map(len, PROMPTS))
    own = torch.full_like(steps, -1)
    for row, blocks in enumerate(map(torch.tensor, blocks_of(rollout, spec))):
        for block in blocks.unique():
            drawn = (blocks == block) & (steps[row] >= 0)
            if bool(drawn.any()):
                own[row, drawn] = steps[row, drawn] - steps[row, drawn].min()
    ids = torch.zeros(len(PROMPTS), width + LENGTH, dtype=torch.long)
    keys = torch.zeros_like(ids).bool()
    for row, prompt in enumerate(PROMPTS):
        ids[row, width - len(prompt) :] = torch.tensor([*prompt, *rollout.canvas[row].tolist()])
        keys[row, width - len(prompt) :] = True
    k = torch.arange(int(own.max()) + 1)[:, None]
    hidden = torch.cat([torch.zeros(len(PROMPTS), len(k), width).bool(), own[:, None] >= k], dim=-1)
    views = Views(hidden, (own[:, None] == k).double())
    with torch.no_grad():
        found = score_views(model, spec, ids, keys, views).log_probs.sum(1)
    torch.testing.assert_close(found, rollout.trace.raw_log_prob, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "origin"), KINDS)
def test_a_row_does_not_depend_on_its_batch_mates(kind: str, origin: str):
    settings = {"temperature": 1.0, "schedule": "threshold", "schedule_args": {"threshold": 0.5}, "cache": "prefix"}
    together = decoded(kind, origin, **settings)
    engine = RolloutEngine(block_denoiser(kind, origin), max_batch_rows=1)
    alone = engine.generate(PROMPTS, DecodingConfig(canvas_length=LENGTH, stop_at_eos=False, **settings), seed=4)
    assert_same_rows(alone, together)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_implementations_decode_the_same(implementation: str, monkeypatch: pytest.MonkeyPatch):
    # Compiled, FlexAttention takes a C++ compiler, half a minute and no float64 on a CPU.
    monkeypatch.setattr(flex.WrappedFlexAttention, "__call__", lambda self: flex_attention)
    config = DecodingConfig(canvas_length=LENGTH, steps=6, cache="prefix")
    expected, found = (
        RolloutEngine(block_denoiser("context_causal", "position_zero", implementation=name)).generate(PROMPTS, config)
        for name in ("sdpa", implementation)
    )
    assert torch.equal(found.canvas, expected.canvas)
    assert torch.equal(found.trace.commit_step, expected.trace.commit_step)
    # Stock eager attention takes its softmax in float32 whatever the model's dtype.
    torch.testing.assert_close(found.trace.raw_log_prob, expected.trace.raw_log_prob, rtol=0, atol=1e-5)


# --- recorded decoding ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LeftToRight(DecodingConfig):
    """As many tokens per step as a whole block has on average, from left to right."""

    def build_schedule(self) -> Schedule:
        def rule(window: Any, scores: Tensor) -> Tensor:
            whole = torch.full_like(window.masked_at_start, self.block_length)
            return top(scores, window.eligible, even_counts(whole, self.steps_per_block, window.step))

        return Schedule(fixed_blocks(self), lambda step: -step.offsets.double().expand(step.tokens.shape), rule)


def recorded_model(folder: Path, block_length: int) -> Any:
    """The dense SDAR checkpoint of a folder, in float64."""
    hub, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    known = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
    known |= {"num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "attention_bias"}
    rope = {"rope_type": "default", "rope_theta": hub["rope_theta"]}
    config = Qwen3Config(**{key: hub[key] for key in known}, rope_parameters=rope, is_causal=False, use_cache=False)
    mask, eos = hub["mask_token_id"], hub["eos_token_id"]
    config.diffusion = DiffusionSpec(
        mask, (eos,), attention="block_causal", block_length=block_length, grid_origin="position_zero"
    ).to_dict()
    model = Qwen3ForCausalLM(config)
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return model.double().eval()


def test_recorded_greedy_decoding_of_sdar(conformance_dir: Path):
    """Tokens of the authors' own generation loop, with its cache and commit forwards, prompts on and off the grid."""
    checked = 0
    for file in sorted((conformance_dir / "models").glob("*/cases.json")):
        config = json.loads((file.parent / "config.json").read_text())
        if config["architectures"] != ["SDARForCausalLM"] or "mask_token_id" not in config:
            continue
        for trace in json.loads(file.read_text())["traces"]:
            settings, prompt = trace["kwargs"], trace["prompt_ids"][0]
            if settings["remasking_strategy"] != "sequential" or settings["top_k"] != 1:
                continue
            length = len(trace["output_ids"][0]) - len(prompt)
            blocks = -(-length // settings["block_length"])
            model = recorded_model(file.parent, settings["block_length"])
            for cache in ("none", "prefix"):
                decoding = LeftToRight(
                    canvas_length=length, steps=blocks * settings["denoising_steps"], stop_at_eos=False, cache=cache
                )
                rollout = RolloutEngine(model).generate([prompt], decoding)
                assert [*prompt, *rollout.canvas[0].tolist()] == trace["output_ids"][0], trace["name"]
                checked += 1
    if not checked:
        pytest.skip("no recorded greedy decoding")
