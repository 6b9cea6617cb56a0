"""What a family of published checkpoints is: the facts that turn its `config.json` into a stock class, and back.

Owns the form in which a family states itself (`Family`) and the mapping of configurations. The facts are in
`families/`, one file each; weights are `checkpoint.py`'s, special tokens `tokens.py`'s.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rl4dlm.models.layout import Layout, Shapes, per_expert

log = logging.getLogger(__name__)

RECORD = "hub_form"
"""Where a stock configuration keeps what it takes to write the hub form again: a plain dictionary."""

# Keys that mean the same in every published configuration and in every stock one.
COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

# Keys that no published model computes with: names, dtypes, ids, how to run and how to sample.
_INERT = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id generation_config id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty mask_token_id max_length max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens task_specific_params temperature
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
"""
INERT = frozenset(_INERT.split())
# Parts of the names of keys that change what is computed, whatever else they say.
_TELLING = ("rope", "rotary", "yarn", "scaling", "quantization", "compression", "softcap", "sliding_window", "alibi")


class HubConfig(Mapping[str, Any]):
    """A published `config.json` and where it was read, for errors that name both."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self.values_ = dict(values)
        self.path = path

    def __getitem__(self, key: str) -> Any:
        return self.values_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def need(self, key: str) -> Any:
        """The value of a key without which nothing can be built. Raises ValueError when it is absent or null."""
        if self.get(key) is None:
            raise ValueError(f"{self.path}: `{key}` is missing; take config.json from the original repository again")
        return self[key]


@dataclass(frozen=True)
class Family:
    """The facts of a family.

    Args:
        name: of the family in `config.hub_form`, in errors and in tests.
        covers: the published models it is for.
        stock: the transformers class that computes the same.
        architectures: class names that `config.json` may state; a family is recognised by them.
        model_types: recognised too, where `config.json` states no architecture.
        keys: hub key -> stock key of everything that carries over.
        needed: hub keys without which nothing can be built.
        inert: hub keys of its own that change nothing here. Others that are not known draw a warning, or an error where
            the name says that they change what is computed.
        rows: published numbers of embedding rows. A mask token that no file states is assumed for these alone.
        fixed: hub key -> the values under which the stock class computes the same; others are refused.
        template: what a `config.json` made from nothing says besides `keys`.
        mask_token, mask_token_id: the published mask token; the id is used only where no file says it.
        end_tokens: published tokens that end a completion -> id, used likewise.
        logit_shift, attention, grid_origin, noise: as in `DiffusionSpec`.
        block_length: of the published model; None for full attention.
        block_key: hub key of the block length, if there is one.
        blocks_optional: the same configuration is published for full and for block attention; a block length given
            by the user chooses the latter.
        adjust: changes the stock settings after `keys` were carried over.
        describe: hub values that `keys` cannot say, from a stock configuration.
        tensors: how the hub's tensors are made of the stock ones.
        native: the hub form is the stock form.
        config_class: stock configuration class, or the smallest subclass of it that can also read the published
            `config.json`: PEFT reads that of the base model with the class of the model's own, whenever it saves.
        tokenizer: stock tokenizer class for folders that state one of their own.
    """

    name: str
    covers: str
    stock: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    keys: Mapping[str, str]
    mask_token: str | None
    mask_token_id: int | None
    end_tokens: Mapping[str, int]
    needed: tuple[str, ...] = SIZES
    inert: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    logit_shift: int = 0
    attention: str = "full"
    block_length: int | None = None
    block_key: str | None = None
    blocks_optional: bool = False
    grid_origin: str = "response"
    noise: str = "mask"
    adjust: Callable[[HubConfig, dict[str, Any]], None] | None = None
    describe: Callable[[PreTrainedConfig], dict[str, Any]] | None = None
    tensors: Callable[[Shapes], Layout] = per_expert
    native: bool = False
    config_class: type[PreTrainedConfig] | None = None
    tokenizer: str | None = None

    @property
    def model_class(self) -> Any:
        """The transformers class."""
        return getattr(transformers, self.stock)

    def stock_config(self, hub: HubConfig) -> PreTrainedConfig:
        """The stock configuration of a published one; bidirectional, without cache, and without a spec yet.

        Raises:
            ValueError: a key is missing, is of a wrong type, or has a value under which the stock class would compute
                something else; a key is unknown and its name says that it changes what is computed.
        """
        for key in self.needed:
            hub.need(key)
        for key, allowed in self.fixed.items():
            if key in hub and hub[key] not in allowed:
                raise ValueError(
                    f"{hub.path}: `{key}` is {hub[key]!r}, but {self.stock} computes the same as {self.name} only with "
                    f"{' or '.join(repr(value) for value in allowed)}; this checkpoint cannot be loaded"
                )
        self._check_keys(hub)
        settings = {stock: hub[key] for key, stock in self.keys.items() if hub.get(key) is not None}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # stock defaults are ids of other vocabularies
            settings.setdefault(name, None)
        settings["rope_parameters"] = _rope_parameters(hub)
        if self.adjust is not None:
            self.adjust(hub, settings)
        try:
            config = (self.config_class or self.model_class.config_class)(**settings)
        except Exception as error:  # transformers' own errors have several types and name no file
            raise ValueError(f"{hub.path} is no configuration of {self.stock}: {said(error)}") from error
        config.architectures = [self.stock]
        config.is_causal = False
        config.use_cache = False
        return config

    def stock_shapes(self, config: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Shapes of the stock model's tensors, and the names of those that are tied to others."""
        with torch.device("meta"):
            model = self.model_class(config)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        tied = set(model._tied_weights_keys or ()) if config.get_text_config().tie_word_embeddings else set()
        return shapes, tied

    def _check_keys(self, hub: HubConfig) -> None:
        """Nothing in a configuration is left out in silence that may change what is computed."""
        for key in self.needed:
            if any(self.keys.get(key, key) == size for size in SIZES) and not _is_whole(hub[key]):
                raise ValueError(f"{hub.path}: `{key}` is {hub[key]!r}; it must be a whole number, 1 or larger")
        windowed = [kind for kind in hub.get("layer_types") or () if kind != "full_attention"]
        if windowed:
            raise ValueError(
                f"{hub.path}: `layer_types` names {windowed[0]!r}, but {self.stock} computes the same as {self.name} "
                "only with 'full_attention'; this checkpoint cannot be loaded"
            )
        known = {*self.keys, *self.needed, *self.fixed, *self.template, *self.inert, *INERT, self.block_key}
        known |= {"rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"}
        unknown = {key: value for key, value in hub.items() if key not in known and value not in (None, False, {}, [])}
        for key, value in unknown.items():
            if any(part in key.lower() for part in _TELLING):
                raise ValueError(
                    f"{hub.path}: `{key}` is {value!r}, which changes what a model computes, and {self.stock} is not "
                    f"known to compute the same; this checkpoint cannot be loaded as {self.name}. Remove the key if it "
                    "has no effect"
                )
        if unknown:
            log.warning(
                "%s: %s not known to %s and has no effect here; make sure that the model does not depend on it",
                hub.path,
                ", ".join(f"`{key}`" for key in unknown) + (" is" if len(unknown) == 1 else " are"),
                self.name,
            )

    def hub_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The inverse of `stock_config`: the published configuration, changed only where the model was changed.

        Args:
            config: of a model of this family; with the configuration it was loaded from in its record, or made from
                nothing.
        """
        record = getattr(config, RECORD, None) or {}
        values, original = self._values(config), record.get("config")
        if original is None:
            return {**copy.deepcopy(dict(self.template)), **values, **self._diffusion_values(config)}
        before = self._values(self.stock_config(HubConfig(original, "config.json")))
        changed = {key: value for key, value in values.items() if before[key] != value}
        changed.pop("pad_token_id", None)  # TRL sets it to the tokenizer's; the model does not depend on it
        given = record.get("given", ())  # what the user said because no file does
        spec = self._diffusion_values(config)
        changed |= {key: value for key, value in spec.items() if key in given or original.get(key) not in (None, value)}
        return {**copy.deepcopy(original), **changed}

    def _values(self, config: PreTrainedConfig) -> dict[str, Any]:
        values = {key: getattr(config, stock, None) for key, stock in self.keys.items()}
        values["rope_theta"] = config.rope_parameters["rope_theta"]
        if self.describe is not None:
            values |= self.describe(config)
        return values

    def _diffusion_values(self, config: PreTrainedConfig) -> dict[str, Any]:
        spec = getattr(config, "diffusion", None) or {}
        values = {"mask_token_id": spec.get("mask_token_id")}
        if self.block_key is not None:
            values[self.block_key] = spec.get("block_length")
        return values


def same_names(*names: str) -> dict[str, str]:
    """Keys that carry over under their own name."""
    return {name: name for name in names}


def said(error: Exception) -> str:
    """The first line of an error's text and what it says next, in one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _rope_parameters(hub: HubConfig) -> dict[str, Any]:
    """Rotary settings in the form of transformers 5, from either form."""
    key = "rope_parameters" if hub.get("rope_parameters") is not None else "rope_scaling"
    scaling = hub.get(key) or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"{hub.path}: `{key}` is {scaling!r}; it must be a mapping, or null")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    allowed = ("default", *ROPE_INIT_FUNCTIONS)
    if kind not in allowed:
        raise ValueError(f"{hub.path}: `{key}` has the type {kind!r}, which is none of {', '.join(allowed)}")
    if key == "rope_parameters":
        return dict(scaling)
    scaling = {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
    return {"rope_type": kind, "rope_theta": hub.need("rope_theta"), **scaling}
