"""Causal models made into denoisers: the weights stay, the mask token is there, and the result is reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from rl4dlm.models.loading import load_denoiser, load_tokenizer, save_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.sft.adapt import MASK_TOKEN, adapt_causal_lm

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "phi": (PhiConfig, PhiForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}
VOCABULARY = len(tiny_tokenizer())
BLOCKS = {"attention": "block_causal", "block_length": 4}


def causal_folder(folder: Path, kind: str = "qwen2", *, rows: int = VOCABULARY, **changes: Any) -> Path:
    """A causal model and a tokenizer that names no mask token, as they are published."""
    config_class, model_class = CLASSES[kind]
    tokenizer = tiny_tokenizer()
    if kind == "gemma3":
        changes = {"layer_types": ["sliding_attention", "full_attention"], **changes}
    config = config_class(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=0,
        **{"initializer_range": 0.2, "tie_word_embeddings": True, **changes},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_with_causal_attention_it_predicts_what_it_did(kind: str, tmp_path: Path) -> None:
    folder = causal_folder(tmp_path, kind)
    ids = torch.randint(7, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(input_ids=ids).logits
    # With a token that is there already: the row of a new one would take a share of the softmax.
    model, _ = adapt_causal_lm(folder, attention="causal", dtype="float64", mask_token="Z")
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    found = attach_scoring(model)(input_ids=ids, score_positions=scored, score_targets=ids).log_probs
    expected = stock[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_mask_token_gets_the_mean_row_and_nothing_else_changes(
    tied: bool, tmp_path: Path, global_rng_untouched: None
) -> None:
    folder = causal_folder(tmp_path / "causal", tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model, tokenizer = adapt_causal_lm(folder, **BLOCKS)
    mask = tokenizer.mask_token_id
    assert tokenizer.mask_token == MASK_TOKEN and mask == VOCABULARY
    assert tokenizer(f"a{MASK_TOKEN}b")["input_ids"].count(mask) == 1
    for name, value in model.state_dict().items():
        if value.shape == before[name].shape:
            assert torch.equal(value, before[name]), name
        else:
            assert value.shape[0] == VOCABULARY + 1 and torch.equal(value[:mask], before[name]), name
            torch.testing.assert_close(value[mask], before[name].mean(0))


def test_a_spare_row_of_the_embedding_is_used(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path, rows=VOCABULARY + 9)
    model, tokenizer = adapt_causal_lm(folder, **BLOCKS)
    weight = model.get_input_embeddings().weight
    assert len(weight) == VOCABULARY + 9 == model.config.vocab_size
    torch.testing.assert_close(weight[tokenizer.mask_token_id], weight[:VOCABULARY].mean(0))


@pytest.mark.parametrize("wanted", ["<mask>", None])
def test_a_mask_token_that_is_there_is_used_as_it_is(wanted: str | None, tmp_path: Path) -> None:
    folder = causal_folder(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    own = tiny_tokenizer() if wanted is None else None
    model, tokenizer = adapt_causal_lm(folder, own, mask_token=wanted, **BLOCKS)
    assert tokenizer.mask_token == "<mask>" and DiffusionSpec.of(model).mask_token_id == tokenizer.mask_token_id
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "settings",
    [
        {**BLOCKS, "logit_shift": 0, "grid_origin": "response"},
        {"attention": "context_causal", "block_length": 8},
        {"attention": "full"},
    ],
    ids=lambda settings: settings["attention"],
)
def test_it_is_saved_and_reloaded(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = adapt_causal_lm(causal_folder(tmp_path / "causal", kind), **settings)
    save_denoiser(model, tmp_path / "denoiser", tokenizer)
    again, its_tokenizer = load_denoiser(tmp_path / "denoiser"), load_tokenizer(tmp_path / "denoiser")
    spec = DiffusionSpec.of(again)
    assert {name: getattr(spec, name) for name in settings} == settings
    assert spec.eos_token_ids == (tokenizer.eos_token_id,) == tuple(again.generation_config.eos_token_id)
    assert its_tokenizer.mask_token_id == spec.mask_token_id == tokenizer.mask_token_id
    ids = torch.tensor([[8, 9, spec.mask_token_id, 11]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    # It sees what follows.
    assert not torch.equal(model(input_ids=ids).logits[:, 0], model(input_ids=ids + (ids == 11)).logits[:, 0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention": "block_causal"}, "attention='block_causal' needs block_length"),
        ({"attention": "full", "block_length": 4}, "block_length=4 has no meaning for attention='full'"),
        ({"attention": "diagonal"}, "attention='diagonal' is not allowed"),
        ({**BLOCKS, "logit_shift": 2}, "logit_shift=2"),
        ({**BLOCKS, "grid_origin": "prompt"}, "grid_origin='prompt'"),
        ({**BLOCKS, "mask_token": "<eos>"}, "also in eos_token_ids"),
        ({**BLOCKS, "mask_token": "<pad>"}, "pads with its mask token"),
        ({**BLOCKS, "tokenizer": tiny_tokenizer(), "mask_token": "[M]"}, "contradicts the tokenizer"),
        ({**BLOCKS, "attn_implementation": "flash_attention_2"}, "cannot run attention='block_causal'"),
        ({**BLOCKS, "quantization_config": {"load_in_4bit": True}}, "quantization_config is not supported here"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        adapt_causal_lm(causal_folder(tmp_path), **settings)


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_denoiser(tiny_llada(), tmp_path / "denoiser", tiny_tokenizer())
    with pytest.raises(ValueError, match="has a `diffusion` entry"):
        adapt_causal_lm(tmp_path / "denoiser", **BLOCKS)
    window = causal_folder(
        tmp_path / "window", use_sliding_window=True, sliding_window=4, max_window_layers=0, tie_word_embeddings=True
    )
    with pytest.raises(ValueError, match="a sliding window is not supported"):
        adapt_causal_lm(window, **BLOCKS)
    other = causal_folder(tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"qwen2"', '"gpt2"'))
    with pytest.raises(ValueError, match=r"config.json: `model_type` is 'gpt2'.*llama, qwen2"):
        adapt_causal_lm(other, **BLOCKS)
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        adapt_causal_lm(tmp_path / "nowhere", **BLOCKS)


# --- M8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_m8_every_layer_of_every_kind_sees_what_follows(kind: str, tmp_path: Path) -> None:
    """By the plain forward and by the scoring one, whose block mask stops at the end of a block."""
    folder = causal_folder(tmp_path, kind)
    model, _ = adapt_causal_lm(folder, dtype="float64", mask_token="Z", attention="block_causal", block_length=4)
    model = attach_scoring(model)
    ids = torch.randint(7, 40, (1, 8), generator=torch.Generator().manual_seed(0))

    def other(place: int) -> torch.Tensor:
        return ids + 50 * (torch.arange(8) == place)

    assert not torch.equal(model(input_ids=ids).logits[:, 0], model(input_ids=other(7)).logits[:, 0])
    scored = (torch.arange(8) == 2)[None]  # predicted at position 1, of the first block

    def score(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, score_positions=scored, score_targets=ids).log_probs

    assert not torch.equal(score(ids), score(other(3))) and torch.equal(score(ids), score(other(4)))


def test_m8_the_defaults_are_enough(tmp_path: Path) -> None:
    model, _ = adapt_causal_lm(causal_folder(tmp_path))
    spec = DiffusionSpec.of(model)
    assert (spec.attention, spec.block_length) == ("block_causal", 32)
    model, _ = adapt_causal_lm(tmp_path, block_length=8)
    assert DiffusionSpec.of(model).block_length == 8


@pytest.mark.parametrize("kind", ["qwen2", "phi"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wanted", [None, "<mask>"])
def test_m8_the_embedding_is_filled_up(kind: str, tied: bool, wanted: str | None, tmp_path: Path) -> None:
    folder = causal_folder(tmp_path / "causal", kind, tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model, tokenizer = adapt_causal_lm(folder, pad_to_multiple_of=64, mask_token=wanted, **BLOCKS)
    assert model.config.vocab_size == 128 == len(model.get_output_embeddings().weight)
    for name, value in model.state_dict().items():
        if value.shape == before[name].shape:
            assert torch.equal(value, before[name]), name
        else:
            assert len(value) == 128 and torch.equal(value[:VOCABULARY], before[name]), name
            torch.testing.assert_close(value[VOCABULARY:], before[name].mean(0).expand_as(value[VOCABULARY:]))
    save_denoiser(model, tmp_path / "denoiser", tokenizer)
    assert load_denoiser(tmp_path / "denoiser").config.vocab_size == 128
    with pytest.raises(ValueError, match="pad_to_multiple_of=0"):
        adapt_causal_lm(folder, pad_to_multiple_of=0)


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "phi3"])
def test_m8_a_long_window_is_lifted(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With causal attention it predicts what it did within the window, and a canvas is seen as a whole beyond it."""
    folder = causal_folder(tmp_path / kind, kind, sliding_window=512, max_position_embeddings=1024)
    model, _ = adapt_causal_lm(folder, attention="full", dtype="float64", mask_token="Z")
    assert "sliding window of 512 tokens is lifted" in caplog.text
    ids = torch.randint(7, 40, (1, 600), generator=torch.Generator().manual_seed(0))
    other = ids + (torch.arange(600) == 599)
    assert not torch.equal(model(input_ids=ids).logits[:, 0], model(input_ids=other).logits[:, 0])
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(input_ids=ids[:, :500]).logits
    model.config.is_causal = True
    torch.testing.assert_close(model(input_ids=ids[:, :500]).logits, stock, rtol=0, atol=1e-12)
    short = causal_folder(tmp_path / "short", kind, sliding_window=8)
    with pytest.raises(ValueError, match="a sliding window is not supported where it is as short as 8 tokens"):
        adapt_causal_lm(short)


def test_m8_a_gguf_file_reaches_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration, tokenizer and weights are asked for from it, and it is among the files that are downloaded."""
    folder = causal_folder(tmp_path)
    asked: list[tuple[str, Any]] = []
    for loader in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def load(*args: Any, _own: Any = loader.from_pretrained, _name: str = loader.__name__, **options: Any) -> Any:
            asked.append((_name, options.pop("gguf_file", None)))
            assert options.pop("quantization_config").dequantize if _name == "AutoModelForCausalLM" else True
            return _own(*args, **options)

        monkeypatch.setattr(loader, "from_pretrained", load)
    downloaded: list[Any] = []
    monkeypatch.setattr(
        "rl4dlm.models.loading.snapshot_download",
        lambda *_, allow_patterns, **__: downloaded.extend(allow_patterns) or str(folder),
    )
    model, _ = adapt_causal_lm("someone/model", gguf_file="q8_0.gguf")
    assert DiffusionSpec.of(model).block_length == 32 and "q8_0.gguf" in downloaded
    assert {name for name, file in asked if file == "q8_0.gguf"} == {
        "AutoConfig", "AutoTokenizer", "AutoModelForCausalLM",
    }  # fmt: skip
