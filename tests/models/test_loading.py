"""From memory to disk and back without losing a bit, and clear words for what cannot be loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rl4dlm.models.loading import check_tokenizer, load_denoiser, save_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer

IDS = torch.tensor([[5, 6, 2, 2, 9], [7, 2, 8, 2, 2]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llada(initializer_range=0.4, seed=5)


def adapted(model: LlamaForCausalLM) -> PeftModel:
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return adapter.eval()


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
def test_a_saved_model_gives_the_same_bits(model: LlamaForCausalLM, attached: bool, tmp_path: Path):
    expected = logits(model)
    save_denoiser(attach_scoring(model) if attached else model, tmp_path / "model", tiny_tokenizer())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(stock) is LlamaForCausalLM and torch.equal(logits(stock), expected)
    loaded = load_denoiser(tmp_path / "model")
    assert type(loaded) is LlamaForCausalLM and torch.equal(logits(loaded), expected)
    assert DiffusionSpec.of(loaded) == DiffusionSpec.of(model)
    assert loaded.generation_config is not None and loaded.config.is_causal is False
    check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "model"), DiffusionSpec.of(loaded))
    save_denoiser(loaded, tmp_path / "again")
    assert torch.equal(logits(load_denoiser(str(tmp_path / "again"))), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float64", torch.float64), (torch.bfloat16, torch.bfloat16), ("auto", torch.float32)],
)
def test_a_dtype_is_asked_for_by_name_or_value(model: LlamaForCausalLM, dtype: Any, expected: Any, tmp_path: Path):
    save_denoiser(model, tmp_path / "model")
    assert load_denoiser(tmp_path / "model", dtype=dtype).dtype == expected


def test_an_attention_implementation_is_asked_for(model: LlamaForCausalLM, tmp_path: Path):
    save_denoiser(model, tmp_path / "model")
    loaded = load_denoiser(tmp_path / "model", attn_implementation="eager", device="cpu")
    assert loaded.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_folder_is_loaded_onto_its_base(model: LlamaForCausalLM, tmp_path: Path):
    save_denoiser(model, tmp_path / "base")
    plain = logits(model)
    peft_model = adapted(load_denoiser(tmp_path / "base"))
    expected = logits(peft_model)
    assert not torch.allclose(expected, plain, atol=1e-4)
    save_denoiser(peft_model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = load_denoiser(tmp_path / "adapter").eval()
    assert isinstance(loaded, PeftModel) and torch.equal(logits(loaded), expected)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora" in name for name in trainable)
    assert DiffusionSpec.of(loaded.get_base_model()) == DiffusionSpec.of(model)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), plain)


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def edited(model: LlamaForCausalLM, folder: Path, **changes: Any) -> Path:
    """A saved model whose configuration is then changed; None removes a key."""
    save_denoiser(model, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key) if value is None else config.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion": None}, "no `diffusion` entry.*save_denoiser"),
        ({"diffusion": {"mask_token_id": 2}}, "lacks.*eos_token_ids"),
        ({"is_causal": None}, "is_causal: false"),
        ({"is_causal": True}, "is_causal: false"),
    ],
)
def test_a_folder_that_is_no_denoiser(model: LlamaForCausalLM, changes: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_denoiser(edited(model, tmp_path / "model", **changes))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "runs/of/mine"])
def test_a_folder_that_is_not_there(path: str):
    with pytest.raises(FileNotFoundError, match=path):
        load_denoiser(path)


def test_remote_code_is_refused(model: LlamaForCausalLM, tmp_path: Path):
    save_denoiser(model, tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code=True is not supported"):
        load_denoiser(tmp_path / "model", trust_remote_code=True)


def test_an_adapter_that_names_no_base(model: LlamaForCausalLM, tmp_path: Path):
    save_denoiser(model, tmp_path / "base")
    save_denoiser(adapted(load_denoiser(tmp_path / "base")), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        load_denoiser(tmp_path / "adapter")


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saving_again_replaces_the_model(model: LlamaForCausalLM, tmp_path: Path):
    save_denoiser(tiny_llada(seed=1), tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("of the first")
    save_denoiser(model, tmp_path / "model")
    assert torch.equal(logits(load_denoiser(tmp_path / "model")), logits(model))
    assert os.listdir(tmp_path) == ["model"] and not (tmp_path / "model" / "stale.txt").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_save_leaves_what_was_there(
    model: LlamaForCausalLM, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target, first = tmp_path / "model", tiny_llada(seed=1)
    if existing:
        save_denoiser(first, target)

    def half_written(folder: Path) -> None:
        (Path(folder) / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_denoiser(model, target)
    assert os.listdir(tmp_path) == (["model"] if existing else [])
    if existing:
        assert torch.equal(logits(load_denoiser(target)), logits(first))


def test_what_is_no_model_is_not_overwritten(model: LlamaForCausalLM, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="will not be overwritten"):
            save_denoiser(model, target)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_denoiser(model, tmp_path / "empty")
    save_denoiser(model, tmp_path / "deep" / "down")


def test_a_model_without_a_spec_is_not_saved(model: LlamaForCausalLM, tmp_path: Path):
    del model.config.diffusion
    with pytest.raises(ValueError, match="no `config.diffusion`"):
        save_denoiser(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_mask_token():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token.*id 2"):
        check_tokenizer(tokenizer, DiffusionSpec(2, (1,)))


def test_a_tokenizer_with_another_mask_token():
    with pytest.raises(ValueError, match="mask_token_id=2.*mask_token_id=9"):
        check_tokenizer(tiny_tokenizer(), DiffusionSpec(9, (1,)))


def test_a_tokenizer_that_pads_with_the_mask_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.mask_token
    with pytest.raises(ValueError, match="pads with its mask token"):
        check_tokenizer(tokenizer, DiffusionSpec(2, (1,)))
