"""Every family, small: built, run, saved and loaded in both forms, trained through its wrappers."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from rl4dlm.cli.convert import add_convert_parser
from rl4dlm.models import checkpoint
from rl4dlm.models.adapters import check_adapter, quantized_share
from rl4dlm.models.convert import convert
from rl4dlm.models.families import FAMILIES
from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_tokenizer
from tests.models.families import (
    BUILDERS,
    IDS,
    MASKED,
    MIXTURES,
    aligned,
    build,
    hub_folder,
    inputs,
    logits,
    rewrite,
    tensors,
)

each_family = pytest.mark.parametrize("name", BUILDERS)
each_mixture = pytest.mark.parametrize("name", MIXTURES)


def test_every_family_has_a_builder():
    assert list(BUILDERS) == list(FAMILIES)


@each_family
def test_weights_depend_on_the_seed_alone(name: str, global_rng_untouched: None, tmp_path: Path):
    first, again, other = (build(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
    load_denoiser(hub_folder(name, tmp_path / "hub"))


@each_family
def test_every_position_is_seen_from_every_other(name: str):
    """Unless a block mask is passed: stock attention is bidirectional, and DiffusionGemma's canvas is."""
    model = build(name)
    first = 4 if name == "diffusion_gemma" else 0
    for changed in (first, IDS.shape[1] - 1):
        ids = IDS.clone()
        ids[:, changed] = 50
        assert bool(((logits(model) - logits(model, ids)).abs().amax(-1) > 1e-4).all())


# --- there and back ---------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("form", ["rl4dlm", "hub"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_model_is_the_same(name: str, form: str, dtype: torch.dtype, tmp_path: Path):
    model = build(name, dtype=dtype)
    save_denoiser(model, tmp_path / "model", form=form)
    loaded = load_denoiser(tmp_path / "model", dtype="auto")
    assert type(loaded) is type(model) and loaded.dtype == dtype
    assert DiffusionSpec.of(loaded) == DiffusionSpec.of(model)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    if name == "diffusion_gemma":  # its embedding scale is kept in another precision when it was loaded
        torch.testing.assert_close(
            logits(loaded), logits(model), rtol=0, atol=2e-2 if dtype is torch.bfloat16 else 1e-5
        )
    else:
        assert torch.equal(logits(aligned(loaded)), logits(model))


@pytest.mark.parametrize("name", MASKED)
def test_our_form_is_a_stock_model(name: str, tmp_path: Path):
    """Also of a model that came from the published form, whose names must not find their way into it."""
    model = load_denoiser(hub_folder(name, tmp_path / "hub"))
    save_denoiser(model, tmp_path / "ours")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(stock) is type(model) and stock.config.is_causal is False
    assert torch.equal(logits(aligned(stock)), logits(aligned(model)))


@each_family
def test_what_changed_since_loading_is_written(name: str, tmp_path: Path):
    """Trained weights and a larger vocabulary reach the published form; everything else in it stays."""
    folder = hub_folder(name, tmp_path / "hub")
    model, before = load_denoiser(folder), json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1.0
    save_denoiser(model, tmp_path / "trained", form="hub")
    assert json.loads((tmp_path / "trained" / "config.json").read_text()) == before
    assert torch.equal(logits(aligned(load_denoiser(tmp_path / "trained"))), logits(aligned(model)))
    if name != "diffusion_gemma":
        rows = model.config.vocab_size + 5
        with torch.random.fork_rng():
            model.resize_token_embeddings(rows, mean_resizing=False)
        save_denoiser(model, tmp_path / "larger", form="hub")
        after = json.loads((tmp_path / "larger" / "config.json").read_text())
        assert {key for key in after if after[key] != before.get(key)} <= {"vocab_size", "embedding_size"}
        assert torch.equal(logits(aligned(load_denoiser(tmp_path / "larger"))), logits(aligned(model)))


@pytest.mark.parametrize("name", ["llada", "llada2", "a2d_qwen3"])
def test_weights_in_several_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = hub_folder(name, tmp_path / "hub")
    model, values = load_denoiser(folder), tensors(folder)
    loaded = load_denoiser(rewrite(folder, values, files=3))
    assert torch.equal(logits(aligned(loaded)), logits(aligned(model)))
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_denoiser(loaded, tmp_path / "again", form="hub")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert all(file.stat().st_size < 30_000 for file in (tmp_path / "again").glob("*.safetensors"))
    written = tensors(tmp_path / "again")
    assert set(written) == set(values) and all(torch.equal(written[key], value) for key, value in values.items())


def test_dtypes_that_differ_come_back(tmp_path: Path):
    """The bias that chooses experts is published in float32 beside bfloat16 weights."""
    folder = hub_folder("llada2", tmp_path / "hub", dtype=torch.bfloat16)
    values = {name: value.float() if name.endswith("expert_bias") else value for name, value in tensors(folder).items()}
    bias = next(name for name in values if name.endswith("expert_bias"))
    values[bias] += 0.123456789  # not a bfloat16
    rewrite(folder, values)
    for dtype in ("auto", "float32"):
        save_denoiser(load_denoiser(folder, dtype=dtype), tmp_path / dtype, form="hub")
        written = tensors(tmp_path / dtype)
        assert {key: value.dtype for key, value in written.items()} == {k: v.dtype for k, v in values.items()}
        assert all(torch.equal(written[key], value) for key, value in values.items())


def test_a_tied_head_that_was_stored_is_stored_again(tmp_path: Path):
    folder = hub_folder("a2d_qwen3", tmp_path / "hub")
    values = tensors(folder)
    assert "lm_head.weight" not in values
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    model = load_denoiser(rewrite(folder, values))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_denoiser(model, tmp_path / "again", form="hub")
    assert set(tensors(tmp_path / "again")) == set(values)


@pytest.mark.parametrize("name", MASKED)
def test_the_layout_holds_every_weight_once(name: str):
    """Each row of each stock tensor is in exactly one published tensor; a tied head is the embedding again."""
    shapes = {key: tuple(value.shape) for key, value in build(name).state_dict().items()}
    seen = {key: torch.zeros(shape[:2], dtype=torch.int) for key, shape in shapes.items()}
    for parts in FAMILIES[name].tensors(shapes).values():
        for part in parts:
            if part.expert is None:
                seen[part.tensor][part.start : part.stop] += 1
            else:
                seen[part.tensor][part.expert, part.start : part.stop] += 1
    assert all(bool((count == 1).all()) for count in seen.values())


def test_llada_with_more_rows_than_tokens_and_fewer_key_heads(tmp_path: Path):
    values = {"vocab_size": 100, "embedding_size": 103, "n_kv_heads": 2}
    folder = hub_folder("llada", tmp_path / "hub")
    weights = {
        name: value[:16] if ".k_proj." in name or ".v_proj." in name else value
        for name, value in tensors(folder).items()
    }
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    model = load_denoiser(rewrite(folder, {name: value.contiguous() for name, value in weights.items()}))
    assert type(model) is LlamaForCausalLM and logits(model).shape[-1] == 103
    save_denoiser(model, tmp_path / "again", form="hub")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_llada_moe_with_dense_layers_and_the_model_type_it_shares(tmp_path: Path):
    """The published folders say `model_type: llada` like the dense model; the architecture tells them apart."""
    folder = hub_folder("llada_moe", tmp_path / "hub")
    values, generator = tensors(folder), torch.Generator().manual_seed(0)
    for name in [name for name in values if name.startswith("model.layers.0.mlp.")]:
        del values[name]
    for leaf, shape in (("gate_proj", (48, 32)), ("up_proj", (48, 32)), ("down_proj", (32, 48))):
        values[f"model.layers.0.mlp.{leaf}.weight"] = torch.randn(shape, generator=generator)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llada", "moe_layer_freq": [0, 1], "dense_intermediate_size": 48, "norm_topk_prob": True}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_denoiser(rewrite(folder, values))
    assert model.config.mlp_only_layers == [0] and model.config.norm_topk_prob is False
    save_denoiser(model, tmp_path / "again", form="hub")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    written = tensors(tmp_path / "again")
    assert set(written) == set(values) and all(torch.equal(written[key], value) for key, value in values.items())


@each_family
def test_conversion_both_ways(name: str, tmp_path: Path):
    folder = hub_folder(name, tmp_path / "hub", dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text("# the family's own code\n")
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "hub")
    convert(folder, tmp_path / "copy", "hub")
    for target in ("back", "copy"):
        written, original = tensors(tmp_path / target), tensors(folder)
        assert set(written) == set(original)
        assert all(v.dtype == original[k].dtype and torch.equal(v, original[k]) for k, v in written.items())
        assert json.loads((tmp_path / target / "config.json").read_text()) == json.loads(
            (folder / "config.json").read_text()
        )
        assert (tmp_path / target / "tokenizer.json").is_file()
    assert (tmp_path / "copy" / "modeling_own.py").is_file()
    with pytest.raises(ValueError, match="is the source"):
        convert(folder, folder)
    with pytest.raises(ValueError, match="form='gguf'.*rl4dlm, hub"):
        convert(folder, tmp_path / "other", "gguf")


def test_conversion_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = hub_folder("llada2", tmp_path / "hub")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"mask_token_id": 2', '"x": 2'))
    parser = argparse.ArgumentParser()
    add_convert_parser(parser.add_subparsers())
    parsed = parser.parse_args(["convert", str(folder), str(tmp_path / "ours"), "--mask-token-id", "5"])
    assert parsed.command(parsed) == 0 and "ours" in capsys.readouterr().out
    assert DiffusionSpec.of(load_denoiser(tmp_path / "ours")).mask_token_id == 5
    with pytest.raises(SystemExit):
        parser.parse_args(["convert", "a", "b", "--form", "gguf"])


def test_the_command_line_is_read_without_torch():
    code = "import sys, rl4dlm.cli.convert; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- training through wrappers ----------------------------------------------------------------------------------------


@each_family
def test_gradient_checkpointing_changes_nothing(name: str):
    def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.train()
        loss = model(**inputs(model)).logits.logsumexp(-1).sum()
        loss.backward()
        return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain = build(name)
    checkpointed = build(name)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert checkpointed.is_gradient_checkpointing
    (loss, expected), (again, found) = gradients(plain), gradients(checkpointed)
    assert torch.equal(loss, again) and set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@each_family
def test_an_adapter_is_attached_saved_and_loaded(name: str, tmp_path: Path):
    save_denoiser(build(name), tmp_path / "base", form="hub")
    base = load_denoiser(tmp_path / "base")
    plain = logits(base)
    where = r"model\.decoder" if name == "diffusion_gemma" else r"model"
    targets = rf"{where}\.layers\.\d+\.self_attn\.(q|v)_proj"
    settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    check_adapter(base, settings)
    with torch.random.fork_rng():
        model = get_peft_model(base, settings).eval()
    adapted = logits(model)
    assert not torch.allclose(adapted, plain, atol=1e-4)
    save_denoiser(model, tmp_path / "adapter")
    loaded = load_denoiser(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), adapted)
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_denoiser(loaded, tmp_path / "merged", form="hub")
    if (
        name == "diffusion_gemma"
    ):  # encoder and decoder share weights but not adapters, so there is nothing to merge into
        return
    save_denoiser(loaded.merge_and_unload(), tmp_path / "merged", form="hub")
    torch.testing.assert_close(logits(load_denoiser(tmp_path / "merged")), adapted, rtol=1e-4, atol=1e-4)


@each_mixture
@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "up_proj"],
        ["gate_proj", "up_proj", "down_proj"],
        "all-linear",
        r".*\.(q_proj|up_proj)",
        "(.*)down_proj",
    ],
    ids=str,
)
def test_module_names_do_not_reach_experts(name: str, targets: Any):
    with pytest.raises(ValueError, match=r"fused into parameters.*target_parameters=\['experts.gate_up_proj'"):
        check_adapter(build(name), LoraConfig(r=2, target_modules=targets))


@each_mixture
def test_experts_are_adapted_by_the_names_the_error_gives(name: str):
    model = build(name)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    settings = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    check_adapter(model, settings)
    with torch.random.fork_rng():
        adapted = get_peft_model(model, settings)
    adapted(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    trained = [key for key, p in adapted.named_parameters() if p.requires_grad]
    assert any(".experts." in key for key in trained)
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_names_of_a_dense_model_are_no_experts():
    for name in set(BUILDERS) - set(MIXTURES) - {"diffusion_gemma"}:
        check_adapter(build(name), LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
        check_adapter(build(name), LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llada", "dream", "sdar", "fast_dllm", "a2d_qwen3", "a2d_qwen2", "a2d_llama"])
def test_four_bits_with_an_adapter(name: str, tmp_path: Path):
    """Dense families: every projection is quantized, and a step on the adapter lowers the loss."""
    pytest.importorskip("bitsandbytes")
    folder = hub_folder(name, tmp_path / "hub", hidden_size=64, dtype=torch.bfloat16)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = load_denoiser(folder, dtype="bfloat16", quantization_config=quantization, device_map={"": 0})
    layers = sum(p.numel() for key, p in build(name, hidden_size=64).named_parameters() if key.endswith("_proj.weight"))
    assert quantized_share(model)[0] == layers
    with pytest.raises(ValueError, match="quantized"):
        save_denoiser(model, tmp_path / "again", form="hub")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS.cuda()).logits.float().log_softmax(-1)[..., 9].mean().neg()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_configuration_can_be_copied_and_printed():
    for name in BUILDERS:
        config = build(name).config
        assert json.loads(config.to_json_string())["diffusion"] == config.diffusion
        assert copy.deepcopy(config).diffusion == config.diffusion
