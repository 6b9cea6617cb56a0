"""Checkpoints with something wrong in them: the message names the file, the key and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rl4dlm.models import loading
from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.models.families import BUILDERS, IDS, MASKED, build, edit, hub_folder, logits, rewrite, tensors

NATIVE = "diffusion_gemma"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hub_folder("sdar", tmp_path / "hub")


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MysteryModel"], "model_type": "mystery"},
        {"architectures": ["DreamForCausalLM"], "model_type": "Dream"},  # for blocks, and without the shift
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": None, "model_type": "llama"},
    ],
)
def test_an_unknown_architecture(changes: dict[str, Any], folder: Path):
    with pytest.raises(ValueError) as error:
        load_denoiser(edit(folder, **changes))
    message = str(error.value)
    assert str(folder / "config.json") in message and "is no known family" in message
    assert all(known in message for known in ("LLaDAModelLM", "SDARForCausalLM", "save_denoiser"))
    assert str(changes["architectures"]) in message


@pytest.mark.parametrize("name", MASKED)
def test_a_folder_without_an_architecture_is_known_by_its_model_type(name: str, tmp_path: Path):
    model = build(name)
    save_denoiser(model, tmp_path / "hub", form="hub")
    loaded = load_denoiser(edit(tmp_path / "hub", architectures=None))
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llada", "alibi", True),
        ("llada", "include_bias", True),
        ("llada", "layer_norm_type", "low_precision"),
        ("llada", "scale_logits", True),
        ("llada_moe", "shared_expert_intermediate_size", 32),
        ("llada_moe", "clip_qkv", 8.0),
        ("llada_moe", "partial_rotary_factor", 0.5),
        ("llada2", "score_function", "softmax"),
        ("llada2", "norm_head", True),
        ("dream", "use_mrope", True),
        ("dream", "block_size", 32),
        ("sdar", "use_sliding_window", True),
    ],
)
def test_a_setting_that_no_stock_class_computes(name: str, key: str, value: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"config.json: `{key}` is .*{value!r}.*cannot be loaded"):
        load_denoiser(edit(hub_folder(name, tmp_path / "hub"), **{key: value}))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_missing_key(name: str, tmp_path: Path):
    key = {"llada": "d_model", NATIVE: "canvas_length"}.get(name, "hidden_size")
    with pytest.raises(ValueError, match=f"config.json: `{key}` is missing; take config.json from the original"):
        load_denoiser(edit(hub_folder(name, tmp_path / "hub"), **{key: None}))


def test_a_file_that_is_no_json(folder: Path):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_denoiser(folder)


def test_an_empty_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_denoiser(tmp_path)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKED)
def test_a_missing_tensor(name: str, tmp_path: Path):
    folder = hub_folder(name, tmp_path / "hub")
    values = tensors(folder)
    gone = sorted(values)[-2]
    del values[gone]
    with pytest.raises(ValueError, match=rf"model.safetensors: {gone} is missing.*download the checkpoint again"):
        load_denoiser(rewrite(folder, values))


@pytest.mark.parametrize("name", ["llada2", "sdar_moe"])
def test_a_missing_expert(name: str, tmp_path: Path):
    folder = hub_folder(name, tmp_path / "hub")
    values = {key: value for key, value in tensors(folder).items() if ".experts.2." not in key}
    with pytest.raises(ValueError, match=r"experts\.2\.\w+_proj\.weight"):
        load_denoiser(rewrite(folder, values))


def test_many_missing_tensors_are_counted(folder: Path):
    values = {key: value for key, value in tensors(folder).items() if ".layers.1." not in key}
    with pytest.raises(ValueError, match=r"layers\.1\..* and 6 more are missing"):
        load_denoiser(rewrite(folder, values))


@pytest.mark.parametrize("name", MASKED)
def test_an_extra_tensor(name: str, tmp_path: Path):
    folder = hub_folder(name, tmp_path / "hub")
    values = {**tensors(folder), "model.layers.0.q_proj.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"model.safetensors: model.layers.0.q_proj.bias is not in the model"):
        load_denoiser(rewrite(folder, values))


def test_the_configuration_of_a_smaller_model(folder: Path):
    with pytest.raises(ValueError, match=r"model.safetensors: model.layers.1\..*not in the model that config.json"):
        load_denoiser(edit(folder, num_hidden_layers=1))


def test_the_configuration_of_a_wider_model(folder: Path):
    with pytest.raises(ValueError, match=r"down_proj.weight is \[32, 64\], but config.json makes it \[32, 80\]"):
        load_denoiser(edit(folder, intermediate_size=80))


@pytest.mark.parametrize("name", ["diffusion_gemma", "llada", "llada2"])
def test_weights_of_a_stock_folder_that_are_not_those_it_describes(name: str, tmp_path: Path):
    """transformers alone would make up what is missing and leave out what is extra."""
    folder = tmp_path / "ours"
    save_denoiser(build(name), folder)
    values = tensors(folder)
    gone = next(key for key in sorted(values) if "norm" in key)
    with pytest.raises(ValueError, match=rf"{folder}: .*{gone}.* missing; use"):
        load_denoiser(rewrite(folder, {key: value for key, value in values.items() if key != gone}))
    with pytest.raises(ValueError, match=rf"{folder}: more.weight is not in the model"):
        load_denoiser(rewrite(folder, {**values, "more.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=rf"{folder}: .*{gone}.* of another shape"):
        load_denoiser(rewrite(folder, {**values, gone: torch.zeros(3)}))


def test_a_missing_file(folder: Path):
    rewrite(folder, tensors(folder), files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00003.safetensors is missing \(model.safetensors.index"
    ):
        load_denoiser(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing \(weights are read from safetensors"):
        load_denoiser(folder)


def test_quantized_weights(folder: Path):
    values = tensors(folder)
    values["lm_head.weight"] = values["lm_head.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"lm_head.weight is I8.*use the original one"):
        load_denoiser(rewrite(folder, values))


# --- the spec ---------------------------------------------------------------------------------------------------------


def test_a_mask_token_outside_the_vocabulary(folder: Path):
    with pytest.raises(ValueError, match=r"config.json: `mask_token_id` is 151669, but the embedding has 103 rows"):
        load_denoiser(edit(folder, mask_token_id=151669))
    with pytest.raises(ValueError, match=r"mask_token_id=151669 is no token id"):
        load_denoiser(edit(folder, mask_token_id=None), mask_token_id=151669)


def test_a_mask_token_that_ends_completions(folder: Path):
    with pytest.raises(ValueError, match=r"config.json: mask_token_id=1 is also in eos_token_ids"):
        load_denoiser(edit(folder, mask_token_id=1))


def test_files_that_disagree_about_the_mask_token(folder: Path):
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"config.json: `mask_token_id` is 9, .*tokenizer_config.json: `mask_token` is 2"
    ):
        load_denoiser(edit(folder, mask_token_id=9))


def test_a_user_who_disagrees_with_the_files(folder: Path):
    with pytest.raises(ValueError, match=r"mask_token_id=9 contradicts .*config.json: `mask_token_id`, which is 2"):
        load_denoiser(folder, mask_token_id=9)
    assert DiffusionSpec.of(load_denoiser(folder, mask_token_id=2)).mask_token_id == 2


def test_a_mask_token_that_no_file_states(folder: Path, tmp_path: Path):
    """The model can be run and saved; what needs the token says how to give it. A published id that fits is taken."""
    model = load_denoiser(edit(folder, mask_token_id=None))
    assert torch.equal(logits(model), logits(build("sdar")))
    with pytest.raises(ValueError, match=r"mask_token_id is not known.*mask_token_id=\.\.\. to load_denoiser"):
        DiffusionSpec.of(model)
    save_denoiser(model, tmp_path / "hub again", form="hub")
    save_denoiser(model, tmp_path / "ours")
    for path in ("hub again", "ours"):
        assert DiffusionSpec.of(load_denoiser(tmp_path / path, mask_token_id=5)).mask_token_id == 5
    save_denoiser(load_denoiser(folder, mask_token_id=5), tmp_path / "given", form="hub")
    assert json.loads((tmp_path / "given" / "config.json").read_text())["mask_token_id"] == 5


def test_a_tokenizer_without_the_mask_token(folder: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"no mask token.*`mask_token_id`.*<\|MASK\|>.*mask_token_id=\.\.\."):
        load_denoiser(edit(folder, mask_token_id=None))


@pytest.mark.parametrize(
    ("name", "key"),
    [("sdar", "block_size"), ("sdar_moe", "block_size"), ("fast_dllm", "bd_size"), (NATIVE, "canvas_length")],
)
def test_a_block_length_that_contradicts_the_checkpoint(name: str, key: str, tmp_path: Path):
    folder = hub_folder(name, tmp_path / "hub")
    with pytest.raises(ValueError, match=rf"block_length=8 contradicts .*config.json: `{key}` is 4.*change `{key}`"):
        load_denoiser(folder, block_length=8)
    save_denoiser(load_denoiser(folder, block_length=4), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"block_length=8 contradicts .*config.json: `diffusion.block_length` is 4"):
        load_denoiser(tmp_path / "ours", block_length=8)


@pytest.mark.parametrize("value", [0, "four"])
def test_a_block_length_that_is_none(value: Any, folder: Path):
    with pytest.raises(ValueError, match=rf"config.json: `block_size` is {value!r}; it must be a whole number"):
        load_denoiser(edit(folder, block_size=value))


@pytest.mark.parametrize("name", ["llada", "llada_moe", "dream"])
def test_blocks_of_a_model_with_full_attention(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"block_length=8 has no meaning.*attention is full.*decoding settings"):
        load_denoiser(hub_folder(name, tmp_path / "hub"), block_length=8)


def test_a_block_length_that_no_file_states(folder: Path, tmp_path: Path):
    """Published folders of longer blocks do not all say so; what the user says is kept in either form."""
    edit(folder, block_size=None)
    assert DiffusionSpec.of(load_denoiser(folder)).block_length == 4
    model = load_denoiser(folder, block_length=32)
    assert DiffusionSpec.of(model).block_length == 32
    for form in ("rl4dlm", "hub"):
        save_denoiser(model, tmp_path / form, form=form)
        assert DiffusionSpec.of(load_denoiser(tmp_path / form)).block_length == 32


def test_an_adapted_model_with_blocks(tmp_path: Path):
    """One configuration is published for full attention and for blocks; the user knows which."""
    folder = hub_folder("a2d_qwen3", tmp_path / "hub")
    assert DiffusionSpec.of(load_denoiser(folder)).attention == "full"
    spec = DiffusionSpec.of(load_denoiser(folder, block_length=32))
    assert (spec.attention, spec.block_length, spec.grid_origin) == ("block_causal", 32, "position_zero")


def test_a_mask_token_where_there_is_none(tmp_path: Path):
    with pytest.raises(ValueError, match=r"mask_token_id=3 has no meaning for DiffusionGemma"):
        load_denoiser(hub_folder(NATIVE, tmp_path / "hub"), mask_token_id=3)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_id(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is downloaded without code or pickles, and the model goes by its id."""
    asked = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options.pop("allow_patterns"), options))
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", download)
    model = load_denoiser("someone/SDAR-4B", revision="abc", cache_dir=str(tmp_path))
    assert asked[0][0] == "someone/SDAR-4B" and asked[0][2] == {"revision": "abc", "cache_dir": str(tmp_path)}
    assert "*.safetensors" in asked[0][1] and not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked[0][1])
    assert model.name_or_path == model.config._name_or_path == "someone/SDAR-4B"
    assert torch.equal(logits(model), logits(build("sdar")))
    with pytest.raises(ValueError, match="trust_remote_code=True is not supported"):
        load_denoiser("someone/SDAR-4B", trust_remote_code=True)


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_form_that_does_not_exist(tmp_path: Path):
    with pytest.raises(ValueError, match=r"form='gguf' is not allowed; choose one of rl4dlm, hub"):
        save_denoiser(tiny_llada(), tmp_path / "model", form="gguf")


def test_a_model_of_no_family(tmp_path: Path):
    model = tiny_llada()
    del model.config.hub_form
    save_denoiser(model, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"needs to know the family.*set it to \{'family'.*form='rl4dlm'"):
        save_denoiser(model, tmp_path / "hub", form="hub")
    assert not (tmp_path / "hub").exists()
    assert (tmp_path / "ours" / "model.safetensors").stat().st_mode & 0o044
    model.config.hub_form = {"family": "llada"}
    save_denoiser(model, tmp_path / "hub", form="hub")
    assert torch.equal(logits(load_denoiser(tmp_path / "hub"), IDS), logits(model))


def test_a_shard_of_a_model(tmp_path: Path):
    model = tiny_llada()
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="needs all weights in one process"):
        save_denoiser(model, tmp_path / "hub", form="hub")


def test_a_mask_token_outside_the_vocabulary_in_our_form(tmp_path: Path):
    save_denoiser(tiny_llada(), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    edit(tmp_path / "ours", diffusion={**config["diffusion"], "mask_token_id": 500})
    with pytest.raises(
        ValueError, match=r"config.json: `diffusion.mask_token_id` is 500, but the embedding has 103 rows"
    ):
        load_denoiser(tmp_path / "ours")


def test_safetensors_with_a_name_of_their_own(folder: Path):
    values = tensors(folder)
    (folder / "model.safetensors").unlink()
    save_file(values, folder / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        load_denoiser(folder)
