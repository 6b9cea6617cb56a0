"""Special tokens: which ids a checkpoint's files state, the spec that follows from them, and its tokenizer.

Owns where ids come from and what happens when files disagree or say nothing. What the ids are used for is elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rl4dlm.models.checkpoint import read_json
from rl4dlm.models.family import Family, HubConfig, said
from rl4dlm.models.spec import DiffusionSpec

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class FolderTokens:
    """What the tokenizer files of a folder say about special tokens."""

    folder: Path

    @cached_property
    def files(self) -> dict[str, Any]:
        """The files that are there, by name."""
        found = (name for name in TOKENIZER_FILES if (self.folder / name).is_file())
        return {name: read_json(self.folder / name) for name in found}

    @cached_property
    def ids(self) -> dict[str, tuple[int, str]]:
        """Added token -> its id and the file that says so."""
        ids: dict[str, tuple[int, str]] = {}
        for index, entry in self.files.get("tokenizer_config.json", {}).get("added_tokens_decoder", {}).items():
            ids[_text(entry)] = (int(index), "tokenizer_config.json")
        for entry in self.files.get("tokenizer.json", {}).get("added_tokens") or ():
            ids[_text(entry)] = (int(entry["id"]), "tokenizer.json")
        for text, index in self.files.get("added_tokens.json", {}).items():
            ids[text] = (int(index), "added_tokens.json")
        return ids

    def find(self, token: str) -> tuple[int, str] | None:
        """Id of a token and the file that says so; also of a token of the plain vocabulary."""
        if token in self.ids:
            return self.ids[token]
        vocabulary = self.files.get("tokenizer.json", {}).get("model", {}).get("vocab")
        if isinstance(vocabulary, dict) and token in vocabulary:
            return int(vocabulary[token]), "tokenizer.json"
        return None

    def named(self, role: str) -> tuple[int, str] | None:
        """Id of the token that a file names in a role (`"mask_token"`, `"eos_token"`), and that file."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            text = _text(self.files.get(name, {}).get(role))
            found = self.find(text) if text else None
            if found is not None:
                return found[0], name
        return None


def resolve_spec(
    family: Family, hub: HubConfig, folder: Path, rows: int, given: Mapping[str, int | None]
) -> dict[str, Any]:
    """What `config.diffusion` is to say about a published checkpoint.

    Args:
        family: of the checkpoint.
        hub: its `config.json`.
        folder: where it is.
        rows: of its embedding; ids must be smaller.
        given: `mask_token_id` and `block_length` as the user gave them, or None.

    Returns:
        A dictionary for `DiffusionSpec.from_dict`. Its `mask_token_id` is None if no file states one and the published
        one does not fit the vocabulary; `DiffusionSpec.of` then says what to do.

    Raises:
        ValueError: files disagree with each other or with the user, or an id is not one of the vocabulary.
    """
    tokens = FolderTokens(folder)
    spec: dict[str, Any] = {
        "mask_token_id": None,
        "logit_shift": family.logit_shift,
        "attention": family.attention,
        "block_length": _block_length(family, hub, given.get("block_length")),
        "grid_origin": family.grid_origin,
        "noise": family.noise,
    }
    if family.blocks_optional and spec["block_length"] is not None:
        spec["attention"] = "block_causal"
    if family.noise == "mask":
        spec["mask_token_id"] = _mask_token_id(family, hub, tokens, rows, given.get("mask_token_id"))
    elif given.get("mask_token_id") is not None:
        raise ValueError(
            f"mask_token_id={given['mask_token_id']} has no meaning for {family.covers}: it replaces tokens by random "
            "ones, not by a mask token"
        )
    spec["eos_token_ids"] = _end_ids(family, hub, tokens, rows)
    if spec["mask_token_id"] is not None or family.noise != "mask":
        check_spec(hub.path, spec)
    return spec


def check_spec(path: str, spec: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the file, when a dictionary is no valid spec."""
    try:
        DiffusionSpec.from_dict(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_tokenizer(
    folder: Path, family: Family | None, mask_token_id: int | None, given: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with its mask token in place and padding on the left; never remote code.

    Args:
        folder: a checkpoint, published or ours.
        family: of a published one.
        mask_token_id: of the spec; None for a model without.
        given: further options of `from_pretrained`.

    Raises:
        ValueError: it cannot be read or needs remote code; the tokenizer has no such token, or names another one as
            mask token.
    """
    stated = FolderTokens(folder).files.get("tokenizer_config.json", {})
    stock: Any = AutoTokenizer
    if "AutoTokenizer" in (stated.get("auto_map") or {}):
        # The files are those of a class that transformers has: the named one, or the one it was copied from.
        names = (stated.get("tokenizer_class"), family.tokenizer if family else None)
        stock = next((found for name in names if (found := _stock_class(name)) is not None), None)
    if stock is None:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: `auto_map` asks for remote code, which is not run, and "
            f"`tokenizer_class` {stated.get('tokenizer_class')!r} is none of transformers'; pass a tokenizer that "
            "transformers knows"
        )
    # Left open, transformers would ask on the terminal whether to run the code that config.json names.
    options = {"trust_remote_code": False} if stock is AutoTokenizer else {}
    try:
        tokenizer = stock.from_pretrained(folder, padding_side="left", **options, **({} if given is None else given))
    except Exception as error:
        raise ValueError(f"{folder}: its tokenizer cannot be read: {said(error)}") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # else saving would name remote code that the new folder does not need
    if mask_token_id is not None and tokenizer.mask_token_id is None:
        text = tokenizer.convert_ids_to_tokens(mask_token_id) if mask_token_id < len(tokenizer) else None
        if text is None:
            raise ValueError(
                f"{folder}: the tokenizer has no token with id {mask_token_id}, the model's mask token. Use the "
                "tokenizer files of the original repository"
            )
        tokenizer.add_special_tokens({"mask_token": text})
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_end_tokens(model: Any) -> None:
    """Lets the embeddings of end tokens be trained where a checkpoint pads with one of them.

    Stock classes make the padding id the `padding_idx` of their embedding, which then gets no gradient. A denoiser sees
    ends of sequence as it sees any token, and padding never: its attention mask hides it. `config.pad_token_id` stays.
    """
    ends = (getattr(model.config, "diffusion", None) or {}).get("eos_token_ids", ())
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx in ends:
            module.padding_idx = None


def _mask_token_id(family: Family, hub: HubConfig, tokens: FolderTokens, rows: int, given: int | None) -> int | None:
    stated = _stated_mask_ids(family, hub, tokens)
    for key, value in stated.items():
        if not 0 <= value < rows:
            raise ValueError(f"{key} is {value}, but the embedding has {rows} rows; set it to the id of the mask token")
    distinct = sorted(set(stated.values()))
    if len(distinct) > 1:
        listed = ", ".join(f"{key} is {value}" for key, value in stated.items())
        raise ValueError(f"the mask token is stated differently: {listed}; correct the file that is wrong")
    if given is not None:
        if distinct and given != distinct[0]:
            raise ValueError(
                f"mask_token_id={given} contradicts {next(iter(stated))}, which is {distinct[0]}; leave it out"
            )
        if not 0 <= given < rows:
            raise ValueError(f"mask_token_id={given} is no token id: the embedding of {tokens.folder} has {rows} rows")
        return given
    if distinct:
        return distinct[0]
    if tokens.files:
        published = f" The published code takes {family.mask_token_id}." if family.mask_token_id is not None else ""
        nameless = f" and no token {family.mask_token!r}" if family.mask_token else ""
        raise ValueError(
            f"{tokens.folder}: no mask token. config.json has no `mask_token_id`, and the tokenizer files have no "
            f"`mask_token`{nameless}.{published} Add `mask_token_id` to config.json, or pass "
            "mask_token_id=... when loading"
        )
    default = family.mask_token_id
    if default is not None and rows in family.rows:
        log.warning(
            "%s states no mask token and has no tokenizer; taking that of %s, %s with id %d, since its embedding has "
            "the published %d rows. Pass mask_token_id=... if it is another one",
            tokens.folder,
            family.covers,
            family.mask_token,
            default,
            rows,
        )
        return default
    log.warning(
        "%s states no mask token, and its vocabulary of %d is not that of %s: the model can be run, but not decode or "
        "be trained until mask_token_id=... is passed when loading",
        tokens.folder,
        rows,
        family.covers,
    )
    return None


def _stated_mask_ids(family: Family, hub: HubConfig, tokens: FolderTokens) -> dict[str, int]:
    stated = {}
    if hub.get("mask_token_id") is not None:
        stated[f"{hub.path}: `mask_token_id`"] = int(hub["mask_token_id"])
    generation = _generation(tokens.folder).get("mask_token_id")
    if generation is not None:
        stated[f"{tokens.folder / 'generation_config.json'}: `mask_token_id`"] = int(generation)
    named = tokens.named("mask_token")
    found = named or (tokens.find(family.mask_token) if family.mask_token else None)
    if found is not None:
        what = "mask_token" if named else family.mask_token
        stated[f"{tokens.folder / found[1]}: `{what}`"] = found[0]
    return stated


def _block_length(family: Family, hub: HubConfig, given: int | None) -> int | None:
    stated = hub.get(family.block_key) if family.block_key else None
    if stated is not None and (not isinstance(stated, int) or stated < 1):
        raise ValueError(f"{hub.path}: `{family.block_key}` is {stated!r}; it must be a whole number, 1 or larger")
    if given is None:
        return stated if stated is not None else family.block_length
    if family.attention == "full" and not family.blocks_optional:
        raise ValueError(
            f"block_length={given} has no meaning for {family.covers}: its attention is full. To decode in blocks, set "
            "block_length of the decoding settings"
        )
    if stated is not None and given != stated:
        raise ValueError(
            f"block_length={given} contradicts {hub.path}: `{family.block_key}` is {stated}. Leave block_length out, "
            f"or change `{family.block_key}` if the model is to be trained with other blocks"
        )
    return given


def _end_ids(family: Family, hub: HubConfig, tokens: FolderTokens, rows: int) -> list[int]:
    text_config = hub.get("text_config") or {}
    stated = [hub.get("eos_token_id"), text_config.get("eos_token_id"), _generation(tokens.folder).get("eos_token_id")]
    named = tokens.named("eos_token")
    stated.append(named[0] if named else None)
    ids: list[int] = []
    for value in stated:
        ids += value if isinstance(value, list) else [] if value is None else [value]
    for value in ids:
        if not 0 <= value < rows:
            raise ValueError(f"{hub.path}: `eos_token_id` is {value}, but the embedding has {rows} rows; correct it")
    ids += [found[0] for text in family.end_tokens if (found := tokens.find(text)) is not None]
    if not tokens.files and not ids and rows in family.rows:
        ids = [index for index in family.end_tokens.values() if index < rows]
    return list(dict.fromkeys(ids))


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _stock_class(name: Any) -> Any:
    """The tokenizer class of transformers with a name, or None."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase) else None


def _text(entry: Any) -> str:
    return entry.get("content", "") if isinstance(entry, dict) else entry or ""
