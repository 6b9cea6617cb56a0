"""Faults M1-M4, M6, P4, P6 and R11 of the list of repairs: what a user's folder can do to the loader."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rl4dlm.files import writing
from rl4dlm.models import loading
from rl4dlm.models.convert import convert
from rl4dlm.models.families import FAMILIES
from rl4dlm.models.loading import load_denoiser, load_tokenizer, save_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.models.families import MASKED, build, edit, hub_folder, logits, rewrite, tensors
from tests.models.test_families_tokens import own_class, published

SETTINGS = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", ["sdar", "sdar_moe", "llada2"])
def test_m1_a_stock_class_beside_an_auto_map(name: str, stated: str, tmp_path: Path):
    """As SDAR and TraDo are published: the class is transformers', and a copy of its code is named as well."""
    folder = own_class(hub_folder(name, tmp_path / "hub"), stated)
    if stated == "PreTrainedTokenizerFast":
        for file in ("vocab.json", "merges.txt", "added_tokens.json"):
            (folder / file).unlink()
        auto_map = {"AutoTokenizer": [f"tokenization_own.{stated}", None]}
        tiny_tokenizer().save_pretrained(folder)
        edit(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class=stated)
        edit(folder, mask_token_id=2)
    else:
        edit(folder, mask_token_id=98, eos_token_id=96)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.mask_token_id == DiffusionSpec.of(load_denoiser(folder)).mask_token_id
    assert tokenizer.decode(tokenizer("2+2=4")["input_ids"]) == "2+2=4"
    convert(folder, tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", MASKED)
def test_m2_what_is_saved_or_converted_is_read_again(name: str, tmp_path: Path):
    """Both forms, written with the tokenizer, by conversion and there and back; an auto_map does not travel along."""
    own = "Qwen2Tokenizer" if FAMILIES[name].tokenizer is None else "DreamTokenizer"
    folder = own_class(hub_folder(name, tmp_path / "hub"), own)
    edit(folder, mask_token_id=98, eos_token_id=96)
    tokenizer, model = load_tokenizer(folder), load_denoiser(folder)
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenization_own.X", None]}  # as transformers would read it
    for form in ("rl4dlm", "hub"):
        save_denoiser(model, tmp_path / f"saved {form}", tokenizer, form=form)
        convert(folder, tmp_path / f"converted {form}", form)
        convert(tmp_path / f"converted {form}", tmp_path / f"back {form}")
    for again in sorted(tmp_path.glob("* *")):
        found = load_tokenizer(again)
        assert (found.mask_token_id, found.get_vocab()) == (98, tokenizer.get_vocab()), again.name
        stated = json.loads((again / "tokenizer_config.json").read_text())
        assert "auto_map" not in stated or again.name == "converted hub", again.name


def test_m2_what_a_trainer_saves_has_no_auto_map(tmp_path: Path):
    """It calls `save_pretrained` of the tokenizer itself."""
    folder = own_class(hub_folder("dream", tmp_path / "hub"), "DreamTokenizer")
    edit(folder, mask_token_id=98, eos_token_id=96)
    load_denoiser(folder).save_pretrained(tmp_path / "ours")
    load_tokenizer(folder).save_pretrained(tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").mask_token_id == 98
    # One that an earlier version wrote, or whose files were copied.
    edit(tmp_path / "ours", "tokenizer_config.json", **json.loads((folder / "tokenizer_config.json").read_text()))
    assert load_tokenizer(tmp_path / "ours").mask_token_id == 98


# --- what is not guessed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows"), [("llada", 155136), ("llada2", 157312), ("sdar", 152000)])
def test_m3_no_mask_token_is_guessed(name: str, rows: int, tmp_path: Path):
    """A folder may have the format and not the vocabulary of LLaDA: 126336 is a word of iLLaDA's."""
    folder = hub_folder(name, tmp_path / "hub", vocab_size=rows, hidden_size=8)
    edit(folder, mask_token_id=None, eos_token_id=None, pad_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = load_denoiser(folder)
    assert model.config.diffusion["mask_token_id"] is None and model.config.diffusion["eos_token_ids"] == []
    with pytest.raises(ValueError, match="mask_token_id is not known"):
        DiffusionSpec.of(model)
    assert DiffusionSpec.of(load_denoiser(folder, mask_token_id=5)).mask_token_id == 5


def test_m3_nor_from_a_token_that_happens_to_have_the_published_id(tmp_path: Path):
    folder, _, _ = published("llada", tmp_path / "hub")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        {**entry, "content": entry["content"].replace("mdm_mask", "other")} for entry in tokenizer["added_tokens"]
    ]
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 126336, "content": "<|word|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no mask token"):
        load_denoiser(folder)


def test_m3_the_published_vocabulary_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = hub_folder("llada", tmp_path / "hub", vocab_size=126464, hidden_size=8)
    edit(folder, mask_token_id=None)
    with caplog.at_level(logging.WARNING):
        assert DiffusionSpec.of(load_denoiser(folder)).mask_token_id == 126336
    assert "states no mask token" in caplog.text and "126336" in caplog.text


@pytest.mark.parametrize("name", [name for name in MASKED if not name.startswith("llada2")])
@pytest.mark.parametrize(
    "change",
    [
        {"yarn": {"factor": 4.0}},
        {"rope_scaling_factor": 4.0},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"attn_logit_softcapping": 30.0},
        {"layer_types": ["sliding_attention", "full_attention"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_m4_a_key_that_changes_the_computation(name: str, change: dict[str, Any], tmp_path: Path):
    key = next(iter(change))
    with pytest.raises(ValueError, match=rf"config.json: `{key}` .*cannot be loaded"):
        load_denoiser(edit(hub_folder(name, tmp_path / "hub"), **change))


def test_m4_rope_scaling_that_the_published_code_does_not_have(tmp_path: Path):
    folder = edit(hub_folder("llada", tmp_path / "hub"), rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="config.json: `rope_scaling` is .*cannot be loaded"):
        load_denoiser(folder)


def test_m4_an_unknown_key_is_said_and_a_known_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = edit(hub_folder("sdar", tmp_path / "hub"), torch_dtype="bfloat16", debug=False, use_deepep=True)
    with caplog.at_level(logging.WARNING):
        load_denoiser(folder)
        assert "not known" not in caplog.text
        load_denoiser(edit(folder, residual_multiplier=2.0))
    assert "config.json: `residual_multiplier` is not known to sdar" in caplog.text


# --- weights and files ------------------------------------------------------------------------------------------------


def trained(name: str, folder: Path) -> Any:
    """A model loaded from bfloat16 files and changed in float32."""
    save_denoiser(build(name), folder, form="hub", dtype="bfloat16")
    model = load_denoiser(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4)
    return model


@pytest.mark.parametrize("name", ["llada", "llada2", "diffusion_gemma"])
def test_m6_rounding_is_said_and_can_be_avoided(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = trained(name, tmp_path / "hub")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        save_denoiser(load_denoiser(tmp_path / "hub"), tmp_path / "same", form="hub")
        assert "rounds" not in caplog.text
        save_denoiser(model, tmp_path / "wide", form="hub", dtype="float32")
        assert "rounds" not in caplog.text
        save_denoiser(model, tmp_path / "rounded", form="hub")
    assert "rounds" in caplog.text and "from float32 to the bfloat16" in caplog.text
    again = load_denoiser(tmp_path / "wide").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert {value.dtype for value in tensors(tmp_path / "wide").values()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype='float8' is not allowed"):
        save_denoiser(model, tmp_path / "x", form="hub", dtype="float8")
    with pytest.raises(ValueError, match="with form='rl4dlm'"):
        save_denoiser(model, tmp_path / "x", dtype="float32")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["rl4dlm", "hub"])
def test_p6_weights_that_are_not_finite(form: str, bad: float, tmp_path: Path):
    model = tiny_llada()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    save_denoiser(model, tmp_path / "model", form=form)
    with pytest.raises(ValueError, match=r"model: model.layers.1.mlp.up_proj.weight is NaN or infinite"):
        load_denoiser(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is NaN or infinite"):
        attach_scoring(model)


def test_p6_an_adapter_that_is_not_finite(tmp_path: Path):
    save_denoiser(tiny_llada(), tmp_path / "base")
    model: Any = get_peft_model(load_denoiser(tmp_path / "base"), SETTINGS)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0] = float("nan")
    save_denoiser(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter: .*lora_B.* NaN or infinite"):
        load_denoiser(tmp_path / "adapter")


@pytest.mark.parametrize("form", ["rl4dlm", "hub"])
def test_m6_a_file_that_was_cut_short(form: str, tmp_path: Path):
    save_denoiser(tiny_llada(), tmp_path / "model", form=form)
    file = tmp_path / "model" / "model.safetensors"
    for size in (file.stat().st_size - 100, 20, 0):
        os.truncate(file, size)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or was cut short"):
            load_denoiser(tmp_path / "model")


@pytest.mark.parametrize("form", ["rl4dlm", "hub"])
@pytest.mark.parametrize("elsewhere", ["../other.safetensors", "/tmp/other.safetensors", "sub/../../other.safetensors"])
def test_m6_an_index_that_points_out_of_the_folder(form: str, elsewhere: str, tmp_path: Path):
    save_denoiser(tiny_llada(), tmp_path / "model", form=form)
    folder = rewrite(tmp_path / "model", tensors(tmp_path / "model"), files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = elsewhere
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: `weight_map` says that .* outside of the folder"):
        load_denoiser(folder)


def test_m6_pickles_are_not_told_to_be_downloaded_again(tmp_path: Path):
    folder = hub_folder("llada", tmp_path / "hub")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model.bin is a pickle.*Convert a file that you trust"
    ) as error:
        load_denoiser(folder)
    assert "again" not in str(error.value)


@pytest.mark.parametrize("name", ["llada", "sdar", "llada_moe"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, "`rope_parameters` has the type 'bogus'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": [1]}, "`rope_parameters` is"),
        ({"d_model": "64", "hidden_size": "64"}, "`(d_model|hidden_size)` is '64'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_m6_settings_that_are_none_name_the_file(name: str, change: dict[str, Any], said: str, tmp_path: Path):
    folder = hub_folder(name, tmp_path / "hub")
    with pytest.raises(ValueError, match=rf"{folder / 'config.json'}.*{said}"):
        load_denoiser(edit(folder, **change))


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, {"hidden_size": "64"}, {"model_type": "mystery"}],
    ids=str,
)
def test_m6_also_in_our_form(change: dict[str, Any], tmp_path: Path):
    save_denoiser(tiny_llada(), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"ours/config.json"):
        load_denoiser(edit(tmp_path / "ours", **change))


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_m6_json_that_is_none_is_named(file: str, tmp_path: Path):
    folder, _, _ = published("llada", tmp_path / "hub")
    for text in ("{", "[]"):
        (folder / file).write_text(text)
        with pytest.raises(ValueError, match=file):
            load_denoiser(folder)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    asked: list[str] = []

    def download(repository: str, **_: Any) -> str:
        asked.append(repository)
        raise OSError("401 Client Error. Repository Not Found")

    monkeypatch.setattr(loading, "snapshot_download", download)
    yield asked


@pytest.mark.parametrize("load", [load_denoiser, load_tokenizer])
def test_p4_a_model_that_is_nowhere_is_named(load: Any, offline: list[str]):
    for name in ("someone/model", "model"):
        with pytest.raises(FileNotFoundError, match=rf"no model '{name}'.*no folder.*the hub did not give it"):
            load(name)
    assert offline == ["someone/model", "model"]


def test_p4_a_name_with_one_slash_may_be_a_folder(offline: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no model folder 'runs/model'.*pass revision='main'"):
        load_denoiser("runs/model")
    assert not offline
    with pytest.raises(FileNotFoundError):
        load_denoiser("runs/model", revision="main")
    assert offline == ["runs/model"]


def test_p4_an_adapter_whose_base_is_gone(offline: list[str], tmp_path: Path):
    save_denoiser(tiny_llada(), tmp_path / "base")
    save_denoiser(get_peft_model(load_denoiser(tmp_path / "base"), SETTINGS), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    for base in (str(tmp_path / "base"), "someone/base"):
        edit(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=base)
        for load in (load_denoiser, load_tokenizer):
            with pytest.raises(FileNotFoundError, match=rf"adapter_config.json: `base_model_name_or_path` is '{base}'"):
                load(tmp_path / "adapter")


@pytest.mark.parametrize("saved_by", ["us", "peft"])
def test_p4_an_adapter_of_a_relative_base_is_evaluated_elsewhere(
    saved_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    save_denoiser(tiny_llada(initializer_range=0.4), "runs/base", tiny_tokenizer())
    model: Any = get_peft_model(load_denoiser("runs/base"), SETTINGS)
    expected = logits(model.eval())
    if saved_by == "us":
        save_denoiser(model, "runs/adapter")
    else:
        model.save_pretrained("runs/adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_denoiser("../work/runs/adapter")
    assert torch.equal(logits(again.eval()), expected)
    assert load_tokenizer("../work/runs/adapter").mask_token_id == 2
    # One that was saved before, with the name as it was given.
    edit(tmp_path / "work" / "runs" / "adapter", "adapter_config.json", base_model_name_or_path="runs/base")
    again = load_denoiser("../work/runs/adapter")
    assert torch.equal(logits(again.eval()), expected)
    save_denoiser(again, "copied")
    assert torch.equal(logits(load_denoiser("copied").eval()), expected)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_r11_the_umask_is_honoured(umask: int, tmp_path: Path):
    with writing(tmp_path / "deep" / "file") as file:
        file.write(b"text")
    assert mode(tmp_path / "deep" / "file") == 0o666 & ~umask
    for form in ("rl4dlm", "hub"):
        for _ in range(2):  # anew, and over what is there
            save_denoiser(tiny_llada(), tmp_path / form, tiny_tokenizer(), form=form)
        assert mode(tmp_path / form) == 0o777 & ~umask
        assert {mode(file) for file in (tmp_path / form).iterdir()} == {0o666 & ~umask}
    assert sorted(os.listdir(tmp_path)) == ["deep", "hub", "rl4dlm"] and os.listdir(tmp_path / "deep") == ["file"]


def test_r11_what_appears_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every file is synced before its name, or its folder's, is put in place."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def replaced(source: Any, target: Any) -> None:
        done.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with writing(tmp_path / "file") as file:
        file.write(b"text")
    assert [what for what, _ in done] == ["sync", "replace", "sync"]
    done.clear()
    save_denoiser(tiny_llada(), tmp_path / "model")
    before = {name for what, name in done[: done.index(("replace", "model"))] if what == "sync"}
    assert {"config.json", "model.safetensors"} <= before
