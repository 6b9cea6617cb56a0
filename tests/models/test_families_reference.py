"""Families without a recording: logits of published tensors by a forward of our own, from what their code computes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from rl4dlm.models.attention import attention_mask, one_copy, position_ids
from rl4dlm.models.loading import load_denoiser
from rl4dlm.models.spec import DiffusionSpec
from tests.models.families import edit, hub_folder, rewrite, tensors

IDS = torch.tensor([[5, 6, 9, 30, 2, 11, 2, 2, 40, 2, 17, 8], [7, 3, 8, 50, 60, 40, 41, 2, 2, 2, 12, 2]])
PROMPT = 4
NAMES = {  # what the tensors are called beside layers: embedding, final norm, head, prefix of the layers
    "illada": ("model.embed_tokens", "model.norm", "model.embed_tokens", "model.layers"),
    "nemotron_diffusion": ("encoder.embed_tokens", "encoder.norm", "diffusion_head", "encoder.layers"),
    "wedlm": ("model.embed_tokens", "model.norm", "lm_head", "model.layers"),
}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def frequencies(config: dict[str, Any], size: int) -> Tensor:
    """Of rotary embeddings, plain or as YaRN (arXiv 2309.00071) interpolates them; float64 `[size / 2]`."""
    rope = config.get("rope_parameters") or config
    base = rope["rope_theta"]
    plain = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope.get("rope_type", "default") == "default":
        return plain

    def dimension(rotations: float) -> float:  # of the pair that turns so often within the original length
        return (
            size * math.log(rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(base))
        )

    low = max(math.floor(dimension(rope["beta_fast"])), 0)
    high = min(math.ceil(dimension(rope["beta_slow"])), size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / rope["factor"] * ramp + plain * (1 - ramp)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """`[R, H, T, D]` by `[R, T, D / 2]`; halves are paired."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def forward(name: str, folder: Path, positions: Tensor, visible: Tensor) -> Tensor:
    """Logits `[R, T, V]` of `IDS` in float64 from the files alone; `visible` bool `[R, T, T]`, query then key."""
    config = json.loads((folder / "config.json").read_text())
    weights = {key: value.double() for key, value in tensors(folder).items()}
    embedding, norm, head, layers = NAMES[name]
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    angles = positions[..., None] * frequencies(config, size)
    x = weights[f"{embedding}.weight"][IDS]
    for layer in range(config["num_hidden_layers"]):

        def of(leaf: str, start: str = f"{layers}.{layer}") -> Tensor:
            return weights[f"{start}.{leaf}.weight"]

        h = rms(x, of("input_layernorm"), eps)
        q, k, v = (
            (h @ of(f"self_attn.{part}_proj").T).unflatten(-1, (-1, size)).transpose(1, 2) for part in ("q", "k", "v")
        )
        if name == "wedlm":
            q, k = rms(q, of("self_attn.q_norm"), eps), rms(k, of("self_attn.k_norm"), eps)
        q, k = turned(q, angles), turned(k, angles)
        if name == "nemotron_diffusion":
            rope = config["rope_parameters"]
            past = (positions / rope["original_max_position_embeddings"]).floor()
            q = q * (1 + rope["llama_4_scaling_beta"] * (1 + past).log())[:, None, :, None]
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
        scores = (q @ k.transpose(-1, -2) / size**0.5).masked_fill(~visible[:, None], -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ of("self_attn.o_proj").T
        h = rms(x, of("post_attention_layernorm"), eps)
        gated = silu(h @ of("mlp.gate_proj").T) * (h @ of("mlp.up_proj").T)
        x = x + gated @ of("mlp.down_proj").T
    return rms(x, weights[f"{norm}.weight"], eps) @ weights[f"{head}.weight"].T


def sees(name: str, block: int, active: int) -> Tensor:
    """bool `[R, T, T]` as the published code has it, from slot to slot."""
    query, key = torch.arange(IDS.shape[1])[:, None], torch.arange(IDS.shape[1])[None, :]
    if name == "illada":
        return torch.ones(*IDS.shape, IDS.shape[1], dtype=torch.bool)
    if name == "nemotron_diffusion":  # causal up to the active block, which sees the past and all of itself
        rule = (key <= query) & (query < active) | (key < active + block) & (query >= active)
        return rule.expand(len(IDS), -1, -1)
    order = torch.arange(IDS.shape[1]) + 1000 * (IDS == 2)  # written tokens are fed first, causally
    return order[:, None, :] <= order[:, :, None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_the_published_computation(name: str, implementation: str, tmp_path: Path):
    folder = hub_folder(name, tmp_path / "hub", max_position_embeddings=32, rope_theta=100.0)
    generator = torch.Generator().manual_seed(0)
    values = tensors(folder)
    for key, value in values.items():
        if "norm" in key:  # ones say nothing about which norm is where
            values[key] = value + 0.3 * torch.randn(value.shape, generator=generator)
    model = load_denoiser(rewrite(folder, values), attn_implementation=implementation)
    spec = DiffusionSpec.of(model)
    keys = torch.ones_like(IDS, dtype=torch.bool)
    positions, lengths = position_ids(keys), torch.full((len(IDS),), PROMPT)
    active = torch.full((len(IDS),), PROMPT + 4)  # the second block of the canvas
    sight = one_copy(spec, positions, lengths, active, IDS.eq(spec.mask_token_id))
    mask = attention_mask(keys, IDS.shape[1], implementation, model.dtype, sight)
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    expected = forward(name, folder, positions, sees(name, 4, PROMPT + 4))
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_illada_says_nothing_of_what_it_inherits(tmp_path: Path):
    """Its configuration class takes a tied head from transformers, which is not written then; Llama's does not."""
    folder = hub_folder("illada", tmp_path / "hub")
    edit(folder, tie_word_embeddings=None)
    model = load_denoiser(folder)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("illada", {"layer_norm_eps": 1e-5}, "`layer_norm_eps` is 1e-05.*only with None"),
        ("nemotron_diffusion", {"dlm_paradigm": "autoregressive"}, "`dlm_paradigm` is 'autoregressive'"),
        (
            "nemotron_diffusion",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "llama_4_scaling_beta",
        ),
        ("llada2", {"expert_capacity": 48}, "`expert_capacity` is 48.*only with None"),
        ("wedlm", {"qk_norm": False}, "`qk_norm` is False.*only with True"),
        ("wedlm", {"qk_norm": None}, "`qk_norm` is missing"),
    ],
)
def test_what_the_stock_class_does_not_compute_is_refused(name: str, changes: dict, words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=words):
        load_denoiser(edit(hub_folder(name, tmp_path / "hub"), **changes))


@pytest.mark.parametrize("name", NAMES)
def test_no_mask_token_is_guessed(name: str, tmp_path: Path):
    """Published vocabularies or not: iLLaDA's is in the tokenizer's files, Nemotron's and WeDLM's in `config.json`."""
    folder = hub_folder(name, tmp_path / "hub", hidden_size=8, vocab_size=155136)
    edit(folder, mask_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_denoiser(folder).config.diffusion["mask_token_id"] is None
    tokens = [{"id": 5, "content": "<[MASK]>", "special": True}]
    edit(folder, "tokenizer.json", added_tokens=tokens, model={"vocab": {}})
    if name == "illada":
        assert DiffusionSpec.of(load_denoiser(folder)).mask_token_id == 5
        return
    with pytest.raises(ValueError, match="no mask token.*takes 151665" if name == "wedlm" else "no mask token"):
        load_denoiser(folder)
    assert DiffusionSpec.of(load_denoiser(folder, mask_token_id=100)).mask_token_id == 100
