"""Makes a denoiser to start training from out of an autoregressive model.

Owns the mask token, the spec and the switch from causal attention; weights stay what they are, so that the result
denoises badly until it has been trained. Training is `rl4dlm.sft.trainer`'s, published denoisers are `loading.py`'s.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedTokenizerBase

from rl4dlm.models import loading, tokens
from rl4dlm.models.adapters import experts_of
from rl4dlm.models.attention import BLOCK_KINDS, check_attention
from rl4dlm.models.family import HubConfig
from rl4dlm.models.spec import DiffusionSpec

log = logging.getLogger(__name__)

CAUSAL_MODELS = (
    *("llama", "qwen2", "qwen3", "qwen3_moe"),
    *("gemma3_text", "mistral", "olmo2", "phi", "phi3", "smollm3"),
)
"""`model_type` of the causal models whose stock class computes the same with another mask."""

BLOCK_LENGTH = 32
"""Length of the attention blocks where neither kind nor length is asked for: Fast-dLLM v2's (arXiv 2509.26328)."""

SHORTEST_WINDOW = 512
"""Sliding windows from this length on are lifted; within a window nothing is computed differently without it."""

MASK_TOKEN = "<|mask|>"
"""What a tokenizer without a mask token gets unless another one is asked for."""


def adapt_causal_lm(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    attention: str | None = None,
    block_length: int | None = None,
    grid_origin: str = "position_zero",
    logit_shift: int = 1,
    mask_token: str | None = None,
    pad_to_multiple_of: int | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a causal model as a denoiser that has yet to be trained.

    Args:
        path: folder or hub id of a causal model: a stock class of `CAUSAL_MODELS`, and no `diffusion` entry in
            config.json. A sliding window of `SHORTEST_WINDOW` tokens or more is lifted, with a warning.
        tokenizer: of the model; it gets the mask token. None: the one in the folder.
        attention: a kind of `DiffusionSpec`: `"full"`, `"block_causal"`, `"context_causal"`, `"causal"` or
            `"written_first"`. None: `"block_causal"` with blocks of `block_length`, or of `BLOCK_LENGTH` where that is
            None too.
        block_length: of the attention blocks in tokens, for the kinds that have blocks.
        grid_origin: where the block grid starts: at `"position_zero"`, at the `"response"`, or there behind the
            `"whole_prompt"` as one block.
        logit_shift: 1: the logits at position i - 1 go on predicting token i, as they were trained to; 0: those at i.
        mask_token: text of the mask token. One that the vocabulary has is used as it is. A new one takes the next free
            id, for which the embedding often has a spare row (in Qwen2.5, 151665) and is extended otherwise; its rows
            of embedding and head become the mean of those of the tokens before it. None: the tokenizer's own, else
            `MASK_TOKEN`.
        pad_to_multiple_of: the embedding gets rows until their number is a multiple of it; the rows that no token has
            get the same mean. None: no more rows than the mask token needs.
        dtype, device, attn_implementation, revision, kwargs: as for `load_denoiser`; with `gguf_file`, the name of a
            file in the folder, transformers reads configuration, tokenizer and weights from it and dequantizes them.

    Returns:
        The model, with `config.diffusion`, and the tokenizer. `save_denoiser(model, folder, tokenizer)` writes both. An
        adapter (LoRA) must be trained on such a folder, which its files can name as their base.

    Raises:
        ValueError: another kind of model, a sliding window, a setting that is not allowed, a mask token that
            contradicts the tokenizer, or quantization, which would have to come after.
        FileNotFoundError: `path` looks like a local path and is not there.
    """
    path = os.fspath(path)
    if attention is None:
        attention, block_length = "block_causal", BLOCK_LENGTH if block_length is None else block_length
    if attention in BLOCK_KINDS and block_length is None:
        raise ValueError(f"attention={attention!r} needs block_length, the length of its blocks in tokens")
    if attention not in BLOCK_KINDS and block_length is not None:
        raise ValueError(f"block_length={block_length} has no meaning for attention={attention!r}; leave it out")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of} is not allowed; it must be 1 or larger, or None")
    for name in ("quantization_config", "trust_remote_code"):
        if kwargs.pop(name, None):
            raise ValueError(f"{name} is not supported here: adapt, save with `save_denoiser`, then load the result")
    one_file = {"gguf_file": kwargs["gguf_file"]} if kwargs.get("gguf_file") else {}
    if one_file:
        kwargs["quantization_config"] = GgufConfig(dequantize=True)  # weights that stay packed could not be trained
    folder = loading.local_folder(path, revision, more_files=tuple(one_file.values()))
    config = _causal_config(folder, one_file)
    if tokenizer is None:
        tokenizer = tokens.load_tokenizer(folder, None, None, one_file)
    text, is_new = _mask_token(tokenizer, mask_token)

    ends = _end_ids(folder, config, tokenizer)
    # Everything is checked before the tokenizer is changed and weights are read; a new token's id is the next one.
    mask = len(tokenizer) if is_new else tokenizer.convert_tokens_to_ids(text)
    spec = DiffusionSpec(mask, ends, logit_shift, attention, block_length, grid_origin)
    check_attention(spec, attn_implementation)
    if tokenizer.mask_token != text:
        tokenizer.add_special_tokens({"mask_token": text})
    loading.check_tokenizer(tokenizer, spec)

    config.is_causal, config.use_cache, config.diffusion = False, False, spec.to_dict()
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}
    options = {name: value for name, value in options.items() if value is not None}
    model = loading._load_stock(AutoModelForCausalLM, folder, config, options)
    loading.check_finite(model, path)
    dequantized(model)
    _make_rows(model, mask if is_new else None, pad_to_multiple_of)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=list(ends)
    )
    tokens.train_end_tokens(model)
    if model.dtype == torch.float64 and experts_of(model):
        model.set_experts_implementation("eager")  # the grouped matrix product has no float64
    model.config._name_or_path = model.name_or_path = ""  # the folder it came from does not hold this model
    log.info("%s adapted: %s attention, mask token %s (id %d)", path, attention, text, mask)
    return (model if device is None else model.to(device)), tokenizer


def dequantized(model: Any) -> Any:
    """Lets a model whose weights came dequantized out of a GGUF file be saved, which transformers refuses.

    The model, changed in place. Any other one stays as it is.

    Raises:
        ValueError: the weights are still packed: load with `quantization_config=GgufConfig(dequantize=True)`.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer.quantization_config.quant_method, "value", "") != "gguf":
        return model
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError("the weights are packed; load with quantization_config=GgufConfig(dequantize=True)")
    quantizer.remove_quantization_config(model)
    return model


def _causal_config(folder: Path, one_file: dict[str, str]) -> Any:
    """The configuration of a causal model. Raises ValueError for anything else, naming file, key and remedy."""
    if one_file:
        config = AutoConfig.from_pretrained(folder, **one_file)
        hub = HubConfig(config.to_dict(), os.path.join(folder, *one_file.values()))
    else:
        hub = loading._read_config(folder)
    if hub.get("diffusion") is not None:
        raise ValueError(f"{hub.path} has a `diffusion` entry: the model is a denoiser; load it with `load_denoiser`")
    architectures = hub.get("architectures") or []
    is_lm = all(name.endswith("ForCausalLM") for name in architectures)
    if hub.get("model_type") not in CAUSAL_MODELS or "auto_map" in hub or not is_lm:
        raise ValueError(
            f"{hub.path}: `model_type` is {hub.get('model_type')!r} and `architectures` {architectures}; causal models "
            f"of the stock types {', '.join(CAUSAL_MODELS)} can be adapted. A published denoiser loads with "
            "`load_denoiser` as it is"
        )
    if not one_file:
        config = loading._stock_config(folder)
    _lift_window(config, hub.path)
    return config


def _lift_window(config: Any, path: str) -> None:
    """Lets every layer see as far as the mask says. Raises ValueError for a window that usual sequences exceed."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return
    if window < SHORTEST_WINDOW:
        raise ValueError(
            f"{path}: a sliding window is not supported where it is as short as {window} tokens (from "
            f"{SHORTEST_WINDOW} on it is lifted); set `use_sliding_window` to false, or `sliding_window` to null"
        )
    if window < config.max_position_embeddings:
        log.warning(
            "%s: the sliding window of %d tokens is lifted; what a layer sees beyond it, it has never been trained on",
            path,
            window,
        )
    if config.model_type == "gemma3_text":  # whose kinds of layers also differ in their rotary frequencies
        config.sliding_window = max(window, config.max_position_embeddings)
        return
    config.sliding_window = None
    if kinds is not None:
        config.layer_types = ["full_attention"] * len(kinds)
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = False


def _mask_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> tuple[str, bool]:
    """Text of the mask token, and whether the vocabulary lacks it."""
    own = tokenizer.mask_token
    if own is not None and wanted not in (None, own):
        raise ValueError(f"mask_token={wanted!r} contradicts the tokenizer, whose mask token is {own!r}; leave it out")
    text = own or wanted or MASK_TOKEN
    return text, text not in tokenizer.get_vocab()


def _end_ids(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a completion, as generation_config.json, config.json and the tokenizer state them."""
    found: list[int] = []
    for value in (tokens._generation(folder).get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id):
        found += value if isinstance(value, list) else [] if value is None else [value]
    if not found:
        raise ValueError(f"{folder}: no file states an `eos_token_id`; add it to config.json")
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def _make_rows(model: Any, mask: int | None, multiple: int | None) -> None:
    """Rows of embedding and head for a new token, and for those that fill up: the mean of those of the tokens."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    needed = rows if mask is None else max(rows, mask + 1)
    if multiple is not None:
        needed = -(-needed // multiple) * multiple
    known = rows if mask is None else min(rows, mask)
    if needed > rows:
        with torch.random.fork_rng(devices=[]):  # transformers draws the new rows, which are overwritten
            model.resize_token_embeddings(needed, mean_resizing=False)
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    values = [value for part in parts for value in (part.weight, getattr(part, "bias", None)) if value is not None]
    for value in {id(value): value for value in values}.values():
        mean = value[:known].mean(0)
        value[rows:] = mean
        if mask is not None:
            value[mask] = mean
