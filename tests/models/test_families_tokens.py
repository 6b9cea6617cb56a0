"""Special tokens and tokenizers of published folders: found in whichever file states them, set where they belong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from rl4dlm.models.convert import convert
from rl4dlm.models.families import FAMILIES
from rl4dlm.models.loading import check_tokenizer, load_denoiser, load_tokenizer, save_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import CHAT_TEMPLATE, tiny_llada, tiny_tokenizer
from tests.models.families import MASKED, build, edit, hub_folder

NAMES = [name for name in MASKED if FAMILIES[name].mask_token]


def published(name: str, folder: Path, *, role: bool = False) -> tuple[Path, int, list[int]]:
    """A folder as published: the family's own special tokens, and `config.json` without them.

    Returns the folder and the ids of the mask token and of the tokens that end a completion.
    """
    family, tokenizer = FAMILIES[name], tiny_tokenizer()
    tokenizer.mask_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.end_tokens, family.mask_token]})
    if role:
        tokenizer.mask_token = family.mask_token
    ids = tokenizer.convert_tokens_to_ids([family.mask_token, *family.end_tokens])
    save_denoiser(build(name, vocab_size=len(tokenizer) + 3), folder, form="hub")
    tokenizer.save_pretrained(folder)
    edit(folder, mask_token_id=None, eos_token_id=None)
    return folder, ids[0], [tokenizer.eos_token_id, *ids[1:]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", [True, False], ids=["named", "unnamed"])
def test_special_tokens_come_from_the_tokenizer(name: str, role: bool, tmp_path: Path):
    """Most published tokenizers hold the mask token without naming it as such."""
    folder, mask, ends = published(name, tmp_path / "hub", role=role)
    spec = DiffusionSpec.of(load_denoiser(folder))
    assert spec.mask_token_id == mask and set(spec.eos_token_ids) == set(ends)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, spec)
    assert tokenizer.mask_token == FAMILIES[name].mask_token and tokenizer.padding_side == "left"
    assert tokenizer.decode([20, mask, ends[0]], skip_special_tokens=True) == tokenizer.decode([20])
    message = [{"role": "user", "content": "2+2?"}]
    assert tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False).endswith("<|assistant|>")


def test_special_tokens_come_from_every_file(tmp_path: Path):
    """Of config.json, generation_config.json and the tokenizer; the first is the configuration's."""
    folder, mask, ends = published("sdar", tmp_path / "hub")
    edit(folder, eos_token_id=50)
    edit(folder, "generation_config.json", eos_token_id=[51, 50], mask_token_id=mask)
    spec = DiffusionSpec.of(load_denoiser(folder))
    assert spec.eos_token_ids[0] == 50 and set(spec.eos_token_ids) == {50, 51, *ends}
    with pytest.raises(ValueError, match=r"generation_config.json: `mask_token_id` is 9, .*<\|MASK\|>"):
        load_denoiser(edit(folder, "generation_config.json", mask_token_id=9))


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer.json"])
def test_any_one_file_is_enough(file: str, tmp_path: Path):
    folder, mask, _ = published("sdar", tmp_path / "hub")
    whole = json.loads((folder / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    if file == "tokenizer.json":
        (folder / file).write_text(json.dumps(whole))
    else:
        (folder / file).write_text(json.dumps({"<|MASK|>": mask}))
    assert DiffusionSpec.of(load_denoiser(folder)).mask_token_id == mask


def test_published_ids_are_taken_where_no_file_has_any(tmp_path: Path):
    """A folder without tokenizer and ids, as the LLaDA2 configurations are, with the published vocabulary."""
    folder = hub_folder("llada2", tmp_path / "hub", vocab_size=157184, hidden_size=8)
    edit(folder, mask_token_id=None, eos_token_id=None, pad_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    spec = DiffusionSpec.of(load_denoiser(folder))
    assert spec.mask_token_id == 156895 and spec.eos_token_ids == (156892, 156900)


def test_conversion_names_the_mask_token(tmp_path: Path):
    """Our form needs nothing of ours: a stock tokenizer has its mask token."""
    folder, mask, _ = published("llada", tmp_path / "hub")
    convert(folder, tmp_path / "ours")
    stock = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert stock.mask_token_id == mask and stock.chat_template == CHAT_TEMPLATE
    assert load_tokenizer(tmp_path / "ours").get_vocab() == stock.get_vocab()


def own_class(folder: Path, name: str) -> Path:
    """Byte-level files as Qwen's, and a tokenizer class of the repository's own."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    special = {text: len(vocabulary) + i for i, text in enumerate(["<|endoftext|>", "<|im_end|>", "<|mask|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(special))
    (folder / "tokenization_own.py").write_text("raise SystemExit('remote code was run')\n")
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": name,
        "auto_map": {"AutoTokenizer": [f"tokenization_own.{name}", None]},
        "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in special.items()},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_tokenizer_class_of_the_repository_s_own(tmp_path: Path):
    """Dream's is Qwen2's under another name: the stock class reads the same files."""
    folder = own_class(hub_folder("dream", tmp_path / "hub"), "DreamTokenizer")
    edit(folder, mask_token_id=98, eos_token_id=96)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (98, 96, 96)
    ids = tokenizer("2 + 2 = 4<|im_end|>")["input_ids"]
    assert ids[-1] == 97 and tokenizer.decode(ids, skip_special_tokens=True) == "2 + 2 = 4"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert DiffusionSpec.of(load_denoiser(folder)).eos_token_ids == (96, 97)
    assert not any(name.endswith("tokenization_own") for name in sys.modules)
    convert(folder, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").mask_token_id == 98


def test_remote_code_is_not_run(tmp_path: Path):
    folder = own_class(hub_folder("sdar", tmp_path / "hub"), "OwnTokenizer")
    edit(folder, mask_token_id=98)
    with pytest.raises(ValueError, match="tokenizer_config.json: `auto_map` asks for remote code"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", MASKED)
def test_nobody_is_asked_to_run_remote_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Published configurations name code of their own; transformers asks on the terminal unless it is told not to."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tiny_tokenizer().save_pretrained(hub_folder(name, tmp_path / "hub"))
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    folder = edit(tmp_path / "hub", auto_map=own)
    assert load_tokenizer(folder).get_vocab() == tiny_tokenizer().get_vocab()
    save_denoiser(load_denoiser(folder), tmp_path / "ours", load_tokenizer(folder))
    folder = edit(tmp_path / "ours", auto_map=own)
    assert load_tokenizer(folder).mask_token_id == DiffusionSpec.of(load_denoiser(folder)).mask_token_id


def test_a_vocabulary_without_the_model_s_mask_token(tmp_path: Path):
    folder = hub_folder("llada", tmp_path / "hub", vocab_size=200)
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no token with id 150, the model's mask token"):
        load_tokenizer(edit(folder, mask_token_id=150))


@pytest.mark.parametrize("own", [True, False], ids=["with", "without"])
def test_the_tokenizer_of_an_adapter(own: bool, tmp_path: Path):
    """It is the adapter folder's, or else the base model's."""
    folder, mask, _ = published("llada", tmp_path / "hub")
    model: Any = get_peft_model(load_denoiser(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    save_denoiser(model, tmp_path / "adapter", load_tokenizer(folder) if own else None)
    assert (tmp_path / "adapter" / "tokenizer_config.json").exists() is own
    assert load_tokenizer(tmp_path / "adapter").mask_token_id == mask


@pytest.mark.parametrize("name", MASKED)
def test_an_end_token_that_pads_is_trained(name: str, tmp_path: Path):
    """LLaDA's and Dream's configurations do this; an embedding has no gradient for its padding index."""
    hub = hub_folder(name, tmp_path / "hub", pad_token_id=1, eos_token_id=1)
    edit(hub, pad_token_id=1, eos_token_id=1)
    save_denoiser(load_denoiser(hub), tmp_path / "ours")
    save_denoiser(load_denoiser(hub), tmp_path / "again", form="hub")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pad_token_id"] == 1
    for folder in (hub, tmp_path / "ours", tmp_path / "again"):
        model = load_denoiser(folder)
        assert 1 in DiffusionSpec.of(model).eos_token_ids
        model(input_ids=torch.tensor([[20, 1, 2]])).logits[:, :, 30:].sum().backward()
        gradient = model.get_input_embeddings().weight.grad
        assert bool((gradient[[20, 1]].abs().amax(-1) > 0).all()) and not gradient[21, 0]


def test_the_tokenizer_of_our_form(tmp_path: Path):
    save_denoiser(tiny_llada(), tmp_path / "ours", tiny_tokenizer())
    assert load_tokenizer(tmp_path / "ours").mask_token_id == tiny_tokenizer().mask_token_id
    save_denoiser(tiny_llada(mask_token_id=5), tmp_path / "other", tiny_tokenizer())
    with pytest.raises(ValueError, match="mask_token_id=2, but the model was trained with mask_token_id=5"):
        load_tokenizer(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        load_tokenizer("./nowhere")
