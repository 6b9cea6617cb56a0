"""Makes a small causal model out of a larger one: fewer layers, and the tokens that some texts need.

Owns which layers matter least, the rows of the embedding, and the tokenizer that goes with them. What is left is a
stock causal model; `rl4dlm.sft.adapt` makes a denoiser of it, and training has to make up for what was cut.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


@torch.no_grad()
def cut_vocabulary(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Leaves a causal model the tokens that texts need, and those of single bytes, so that any text can be encoded.

    The texts become the same tokens as before, with other ids, and the logits of these tokens are the same numbers as
    before. Other texts may become more and shorter tokens. Special and added tokens stay.

    Args:
        model: a causal model, changed in place; no denoiser, whose spec states ids: cut first, then adapt.
        tokenizer: of the model: a fast one with byte-level BPE (GPT-2's, Llama 3's, Qwen's, SmolLM's). It stays as it
            is.
        texts: what the model will read and write; the ids of their tokens are kept, and what BPE makes them from.

    Returns:
        The model, and a new tokenizer. Ids keep their order.

    Raises:
        ValueError: a denoiser, a tokenizer of another kind, one with a token that the model has no row for, or texts
            that the new tokenizer would split differently.
    """
    if getattr(model.config, "diffusion", None) is not None:
        raise ValueError("the model is a denoiser, and its spec states token ids; cut the causal model, then adapt it")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = (
        json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    )
    kind = state["model"]["type"]
    if kind != "BPE" or "ByteLevel" not in json.dumps([state.get("pre_tokenizer"), state.get("decoder")]):
        raise ValueError(f"the tokenizer is {kind} without byte-level pieces; only byte-level BPE can be cut")
    texts = list(dict.fromkeys(texts))
    encoded: list[list[int]] = tokenizer(texts)["input_ids"] if texts else []
    vocabulary: dict[str, int] = state["model"]["vocab"]
    merges: list[list[str]] = state["model"]["merges"]
    names = {index: token for token, index in vocabulary.items()}
    added = {entry["id"] for entry in state["added_tokens"]}

    ids = {token for row in encoded for token in row} | added | _stated_ids(model)
    kept = {names[index] for index in ids if index in names} | (set(ByteLevel.alphabet()) & set(vocabulary))
    if state["model"].get("unk_token") in vocabulary:
        kept.add(state["model"]["unk_token"])
    for left, right in reversed(merges):  # a token is made of older ones, so that one pass finds all of them
        if left + right in kept:
            kept |= {left, right}
    order = sorted(ids | {vocabulary[token] for token in kept})
    rows = model.get_input_embeddings().weight.shape[0]
    if order and order[-1] >= rows:
        raise ValueError(f"the tokenizer has a token with id {order[-1]}, but the embedding has {rows} rows")
    new_id = {old: new for new, old in enumerate(order)}

    state["model"]["vocab"] = {token: new_id[vocabulary[token]] for token in kept}
    state["model"]["merges"] = [merge for merge in merges if {*merge, "".join(merge)} <= kept]
    for entry in state["added_tokens"]:
        entry["id"] = new_id[entry["id"]]
    _renumber(state.get("post_processor"), new_id)
    cut = _with_state(tokenizer, state, new_id)
    again: list[list[int]] = cut(texts)["input_ids"] if texts else []
    for text, old, new in zip(texts, encoded, again, strict=True):
        if [new_id[index] for index in old] != new:
            raise ValueError(f"the cut tokenizer splits {text!r:.80} differently; this tokenizer cannot be cut")

    _keep_rows(model, torch.tensor(order))
    for config in (model.config, getattr(model, "generation_config", None)):
        for role in _ROLES:
            value = getattr(config, role, None)
            if isinstance(value, list):
                setattr(config, role, [new_id[index] for index in value])
            elif value is not None:
                setattr(config, role, new_id[value])
    return model, cut


def keep_layers(model: Any, layers: Sequence[int]) -> Any:
    """Leaves a causal model some of its layers, in their order; it is changed in place and returned.

    Args:
        model: of a stock class whose decoder layers are `model.model.layers`, all of one kind.
        layers: their numbers from 0 on, rising.

    Raises:
        ValueError: no such layers, or none.
    """
    decoder, config = model.model, model.config
    count = len(decoder.layers)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
        raise ValueError(f"layers={list(layers)} is not allowed; give rising numbers of its layers, 0 to {count - 1}")
    decoder.layers = nn.ModuleList([decoder.layers[i] for i in layers])
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    config.num_hidden_layers = len(layers)
    return model


@torch.no_grad()
def choose_layers(model: Any, ids: Tensor, count: int) -> list[int]:
    """Which layers to keep: those that are left when the one whose loss costs least is taken away, again and again.

    The loss is that of the next token, without training in between. A search of this kind is greedy, and its number of
    forwards of a layer about a third of the cube of the number of layers, halved by what removals have in common.

    Args:
        model: a causal model as for `keep_layers`; not changed.
        ids: long `[B, T]`, texts to measure the loss on, without padding.
        count: layers to keep.

    Returns:
        Their numbers, rising.

    Raises:
        ValueError: `count` is not between 1 and the number of layers.
    """
    decoder, layers = model.model, model.model.layers
    if not 1 <= count <= len(layers):
        raise ValueError(f"count={count} is not allowed; the model has {len(layers)} layers, keep 1 to {len(layers)}")
    left, training = list(range(len(layers))), model.training
    model.eval()
    try:
        while len(left) > count:
            decoder.layers = nn.ModuleList([layers[i] for i in left])
            entering = _entering(model, ids)
            losses = []
            for place in range(len(left)):  # the layers before it need not be computed again
                decoder.layers = nn.ModuleList([layers[i] for i in left[place + 1 :]])
                losses.append(_loss(model(inputs_embeds=entering[place], use_cache=False).logits, ids))
            del left[losses.index(min(losses))]
    finally:
        decoder.layers = layers
        model.train(training)
    return left


@torch.no_grad()
def next_token_loss(model: Any, ids: Tensor) -> float:
    """Mean cross-entropy of the tokens of `ids` [B, T] behind the first, in nats, by a causal model."""
    return _loss(model(input_ids=ids, use_cache=False).logits, ids)


def _loss(logits: Tensor, ids: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))


def _entering(model: Any, ids: Tensor) -> list[Tensor]:
    """What each layer gets, [B, T, hidden]."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in model.model.layers]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _stated_ids(model: Any) -> set[int]:
    """The ids that configurations name."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        for role in _ROLES:
            value = getattr(config, role, None)
            found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return found


def _renumber(part: Any, new_id: dict[int, int]) -> None:
    """The ids in a post-processor that puts special tokens around a text."""
    if isinstance(part, list):
        for entry in part:
            _renumber(entry, new_id)
    elif isinstance(part, dict):
        if isinstance(part.get("ids"), list):
            part["ids"] = [new_id[index] for index in part["ids"]]
        for name in ("sep", "cls"):
            if isinstance(part.get(name), list):
                part[name][1] = new_id[part[name][1]]
        for entry in part.values():
            _renumber(entry, new_id)


def _with_state(tokenizer: PreTrainedTokenizerBase, state: Any, new_id: dict[int, int]) -> PreTrainedTokenizerBase:
    """A tokenizer like another one, with a backend of another state; by way of the files that both are saved as."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):  # the older form of the same
            Path(folder, name).unlink(missing_ok=True)
        file = Path(folder, "tokenizer_config.json")
        settings = json.loads(file.read_text(encoding="utf-8"))
        named = settings.get("added_tokens_decoder")
        if named:
            settings["added_tokens_decoder"] = {str(new_id[int(index)]): entry for index, entry in named.items()}
            file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        return type(tokenizer).from_pretrained(folder)


def _keep_rows(model: Any, rows: Tensor) -> None:
    """The given rows of embedding and head, and a configuration that says how many there are."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[rows].clone())
    embedding.num_embeddings = len(rows)
    if embedding.padding_idx is not None:
        embedding.padding_idx = rows.tolist().index(embedding.padding_idx)
    head.weight = embedding.weight if tied else nn.Parameter(head.weight[rows].clone())
    head.out_features = len(rows)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[rows].clone())
    model.config.vocab_size = model.vocab_size = len(rows)
