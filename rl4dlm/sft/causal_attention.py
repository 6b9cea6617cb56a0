"""Supervision of attention by causes: tokens of an effect should attend to those of its causes.

Owns the loss, its settings, and how spans of text become spans of tokens. The idea is that of C²DLM (Causal
Concept-guided Diffusion Language Models, arXiv 2511.22146): a teacher marks concepts of a sample and the edges between
causes and effects, and fine-tuning pushes the attention of a denoiser, in which everything sees everything, towards
them; attention is weighed by the norms of values first ("V-aware"). Neither the paper's formulas nor its code could be
read, so that the definition is ours. With the head-mean a_ij of a layer's attention (before dropout) and the norm v_j
of its values at j, all heads together,

    m_ij = a_ij v_j / sum_k a_ik v_k
    ratio_i = mean of m_ij over the causes j of i / mean of m_ij over all other tokens j that are no padding
    loss = mean over i of max(0, rho - ratio_i)

where i runs over the tokens of effects in all accumulated micro-batches, chosen layers and views; the causes of i are
the tokens of all spans that cause a span that i is in. Where attention and values are uniform, ratios are 1. Tokens
count whether they are hidden or not. The loss is added with a weight that falls linearly to 0.

Attention is computed again from the queries and keys of the chosen layers, for the tokens of effects only and a chunk
of them at a time, so that no `[B, H, T, T]` exists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from rl4dlm.models.adapters import base_model
from rl4dlm.models.recorded import Recorded, check_layers, recorded_attention
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.sft.data import text_of

COLUMN = "causal_edges"
"""Column of pairs of an effect and its cause, each a pair of start and stop in characters of the text."""

TOKENS = "causal_tokens"
"""Column of the same in tokens: start and stop of the effect, start and stop of the cause."""

CHUNK_ELEMENTS = 2**24
"""Attention weights held at once, in elements."""

_LEAST = 1e-12  # a mean of m that is smaller counts as this much; m adds up to 1


@dataclass
class CausalAttentionSettings:
    """What `DiffusionSFTConfig` offers for it; off by default. Evaluation is not affected.

    Args:
        causal_weight: gamma, weight of the loss at the first step. 0: off. It needs the column `causal_edges`: a list
            of pairs of an effect and its cause, each `[start, stop]` in characters of the text: of the column `text`,
            of prompt and completion together, or of the messages as the chat template renders them.
        causal_layers: numbers of the layers whose attention is supervised, from 0 on. JSON on the command line.
        causal_ratio: rho, what is asked for: how much more attention a cause gets than another token, 1 or larger.
        causal_decay_steps: optimizer steps in which the weight falls to 0. None: all steps of the run.
        causal_value_grad: False: norms of values are taken as they are, without gradient.
    """

    causal_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss that draws attention to causes (column causal_edges). 0: off."},
    )
    causal_layers: list | str | None = field(
        default=None, metadata={"help": "Numbers in JSON of the layers whose attention is drawn to causes, from 0 on."}
    )
    causal_ratio: float = field(
        default=1.5, metadata={"help": "How much more attention a cause should get than another token."}
    )
    causal_decay_steps: int | None = field(
        default=None, metadata={"help": "Steps in which causal_weight falls to 0. Default: all of the run."}
    )
    causal_value_grad: bool = field(
        default=True, metadata={"help": "Whether the norms of values are trained towards it, too."}
    )

    def check_causal(self) -> None:
        """Raises ValueError naming the setting, the value and what is allowed; reads the layers from JSON."""
        if not (math.isfinite(self.causal_weight) and self.causal_weight >= 0):
            raise ValueError(f"causal_weight={self.causal_weight} is not allowed; it must be 0 or larger")
        self.causal_layers = _layers(self.causal_layers)
        if self.causal_weight == 0:
            for name, default in (
                ("causal_layers", None),
                ("causal_ratio", 1.5),
                ("causal_decay_steps", None),
                ("causal_value_grad", True),
            ):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)} has no effect with causal_weight=0; set it")
            return
        if self.causal_layers is None:
            raise ValueError(f"causal_weight={self.causal_weight} needs causal_layers, such as [4, 8]")
        if not (math.isfinite(self.causal_ratio) and self.causal_ratio >= 1):
            raise ValueError(f"causal_ratio={self.causal_ratio} is not allowed; it must be 1 or larger")
        steps = self.causal_decay_steps
        if steps is not None and steps < 1:
            raise ValueError(f"causal_decay_steps={steps} is not allowed; it must be 1 or larger, or None")

    def check_causal_model(self, spec: DiffusionSpec) -> None:
        """Raises ValueError for a model in which not every token sees every other."""
        if self.causal_weight and spec.attention != "full":
            raise ValueError(
                f"causal_weight={self.causal_weight} needs a model in which every token sees every other (attention "
                f"'full'): where causes cannot be seen, nothing can attend to them; this one has attention="
                f"{spec.attention!r}"
            )

    def causal_weight_at(self, step: int, max_steps: int) -> float:
        """The weight at an optimizer step of a run of `max_steps`: it falls linearly to 0."""
        return self.causal_weight * max(0.0, 1.0 - step / max(1, self.causal_decay_steps or max_steps))


def _layers(value: Any) -> list[int] | None:
    """Numbers of layers, from a list or JSON. Raises ValueError for anything else."""
    if value is None:
        return None
    said = f"causal_layers={value!r} is not allowed; give different numbers of layers, such as [4, 8]"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{said}: it is not JSON ({error})") from None
    numbers = list(value) if isinstance(value, list | tuple) else []
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
    if not numbers or not whole or len({*numbers}) < len(numbers):
        raise ValueError(said)
    return numbers


# --- spans ------------------------------------------------------------------------------------------------------------


def edges_to_tokens(
    row: Mapping[str, Any], tokenizer: Any, text_column: str = "text", chat_template: str | None = None
) -> dict[str, list[list[int]]]:
    """The edges of an example in tokens: those that share a character with the span.

    Args:
        row: an example with `causal_edges`, what its text comes from, and its `input_ids`.
        tokenizer: the one that made them.
        text_column: of examples that are a text.
        chat_template: None: the tokenizer's own.

    Returns:
        `causal_tokens`: for each edge start and stop of the effect and of the cause.

    Raises:
        ValueError: a tokenizer that does not say where its tokens come from, a text that has become other tokens, an
            edge that is no pair of spans of the text or has no tokens, or causes beside which there is no other token.
    """
    edges = row.get(COLUMN) or []
    if not edges:
        return {TOKENS: []}
    where = f"example {row['example_id']}"
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{COLUMN} needs a fast tokenizer, which says where its tokens are; {type(tokenizer)} is none")
    text = text_of(row, tokenizer, text_column, chat_template)
    plain = isinstance(row.get("prompt", row.get(text_column)), str)
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
    ids = list(row["input_ids"])
    if encoded["input_ids"][: len(ids)] != ids:
        raise ValueError(
            f"{where}: its tokens are not those that its text starts with, so that {COLUMN} cannot be placed; with "
            "truncation_mode='keep_end' and with `labels` of your own, give the column causal_tokens"
        )
    offsets = encoded["offset_mapping"]
    found = []
    for edge in edges:
        spans = _spans(edge, len(text), where)
        tokens = []
        for start, stop in spans:
            places = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
            said = f"{where}: the span [{start}, {stop}] of {COLUMN} ({text[start:stop]!r:.60})"
            if not places:
                raise ValueError(f"{said} has no token")
            if places[-1] >= len(ids):
                raise ValueError(
                    f"{said} is behind the {len(ids)} tokens that are kept of the example; raise max_length, or leave "
                    "the edge out"
                )
            tokens += [places[0], places[-1] + 1]
        found.append(tokens)
    _check_causes(found, len(ids), f"{where}: in {COLUMN}")
    return {TOKENS: found}


def checked_tokens(row: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """The edges of an example that came in tokens.

    Args:
        row: an example with `causal_tokens` and its `input_ids`.

    Returns:
        `causal_tokens`; none where there was nothing.

    Raises:
        ValueError: an edge that is no pair of spans of the tokens, or causes beside which there is no other token.
    """
    edges, length, where = row.get(TOKENS) or [], len(row["input_ids"]), f"example {row['example_id']}"
    for edge in edges:
        whole = isinstance(edge, list | tuple) and len(edge) == 4 and all(isinstance(place, int) for place in edge)
        if not whole or not all(0 <= first < stop <= length for first, stop in (edge[:2], edge[2:])):
            raise ValueError(
                f"{where}: {edge!r} in {TOKENS} is no edge; give [start, stop, start, stop] of effect and cause among "
                f"its {length} tokens, 0 <= start < stop <= {length} (max_length may have cut some off)"
            )
    _check_causes(edges, length, f"{where}: in {TOKENS}")
    return {TOKENS: edges}


def _check_causes(edges: Sequence[Sequence[int]], length: int, where: str) -> None:
    """Raises ValueError where all of `length` tokens cause one, so that there are no others to compare them with."""
    causes: dict[int, set[int]] = {}
    for first, stop, *cause in edges:
        for place in range(first, stop):
            causes.setdefault(place, set()).update(range(*cause))
    for place, seen in causes.items():
        if len(seen) == length:
            raise ValueError(f"{where} the whole text is the cause of token {place}; name parts of it")


def _spans(edge: Any, length: int, where: str) -> list[list[int]]:
    """The effect and the cause of an edge. Raises ValueError unless both are spans of a text of that length."""
    spans = [list(span) for span in edge if isinstance(span, list | tuple)] if isinstance(edge, list | tuple) else []
    whole = all(len(span) == 2 and all(isinstance(place, int) for place in span) for span in spans)
    if len(spans) != 2 or len(edge) != 2 or not whole:
        raise ValueError(
            f"{where}: {edge!r} in {COLUMN} is no edge; give [[start, stop], [start, stop]] of effect and cause"
        )
    for start, stop in spans:
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"{where}: the span [{start}, {stop}] of {COLUMN} is none of its text, which has {length} characters; "
                "it must be 0 <= start < stop <= that"
            )
    return spans


# --- the loss ---------------------------------------------------------------------------------------------------------


def effects(tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The tokens of effects and causes, bool `[B, E, T]` each, from `causal_tokens` (long `[B, E, 4]`, -1: none)."""
    place = torch.arange(width, device=tokens.device)

    def of(first: int) -> Tensor:
        return (place >= tokens[..., first, None]) & (place < tokens[..., first + 1, None])

    return of(0), of(2)


def count_effects(tokens: Tensor | None, width: int) -> int:
    """Tokens that are in an effect, over all rows."""
    return 0 if tokens is None else int(effects(tokens, width)[0].any(1).sum())


def cause_ratios(
    recorded: Recorded, real: Tensor, tokens: Tensor, *, value_grad: bool = True, chunk: int = CHUNK_ELEMENTS
) -> Tensor:
    """How much more attention causes get than other tokens, for each token of an effect.

    Args:
        recorded: of a layer, with R = B K rows, the K views of a row one after another.
        real: bool `[B, T]`, tokens that are no padding.
        tokens: long `[B, E, 4]`, see `effects`.
        value_grad: whether gradients flow into norms of values.
        chunk: attention weights held at once, in elements.

    Returns:
        float `[n]` in float32 or wider, by fed row and then in the order of tokens; with gradients.
    """
    effect, cause = effects(tokens, real.shape[1])
    views = len(recorded.query) // len(real)
    dtype = torch.promote_types(recorded.query.dtype, torch.float32)
    found = [recorded.query.new_zeros(0, dtype=dtype)]
    for fed, (query, key, value) in enumerate(
        zip(recorded.query, recorded.key, recorded.value, strict=True)
    ):  # [H, T, D]
        row = fed // views
        places = effect[row].any(0).nonzero().squeeze(-1)
        norms = value.to(dtype).square().sum((0, 2)).sqrt()
        norms = norms if value_grad else norms.detach()
        size = max(1, chunk // (query.shape[0] * query.shape[1]))
        for part in places.split(size):
            # Summed as numbers: a token may be in several effects.
            causes = (effect[row][:, part].T.to(dtype) @ cause[row].to(dtype)) > 0  # [c, T]
            given = query[:, part], key, norms, recorded.scaling, causes, real[row]
            if torch.is_grad_enabled():
                found.append(checkpoint(_ratios, *given, use_reentrant=False))
            else:
                found.append(_ratios(*given))
    return torch.cat(found)


def _ratios(query: Tensor, key: Tensor, norms: Tensor, scaling: float, causes: Tensor, real: Tensor) -> Tensor:
    """Of c tokens: `[c]` from query `[H, c, D]`, key `[G, T, D]`, norms `[T]`, causes bool `[c, T]`, real `[T]`."""
    grouped = query.to(norms.dtype).unflatten(0, (len(key), -1))  # [G, H / G, c, D]
    with torch.autocast(query.device.type, enabled=False):
        products = torch.einsum("ghcd,gtd->ghct", grouped, key.to(norms.dtype)) * scaling
    attention = products.masked_fill(~real, -torch.inf).softmax(-1).mean((0, 1))  # [c, T]
    mass = attention * norms
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=_LEAST)
    causes, others = causes & real, ~causes & real

    def mean(which: Tensor) -> Tensor:
        return (mass * which).sum(-1) / which.sum(-1)

    return mean(causes) / mean(others).clamp(min=_LEAST)


def hinges(
    recorded: Mapping[int, Recorded], real: Tensor, tokens: Tensor, ratio: float, value_grad: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """`max(0, rho - ratio)` and the ratios of each layer, `[n]` each.

    Raises:
        ValueError: gradients are wanted and none would reach a layer's queries and keys.
    """
    for layer, each in recorded.items():
        if torch.is_grad_enabled() and not (each.query.requires_grad or each.key.requires_grad):
            raise ValueError(
                f"causal_layers: no gradient reaches the attention of layer {layer}; nothing before it is trained, or "
                "activation checkpointing is re-entrant (set its use_reentrant to False)"
            )
        found = cause_ratios(each, real, tokens, value_grad=value_grad)
        yield (ratio - found).clamp(min=0), found


class Causes(dict[int, Recorded]):
    """What was recorded of layers for a micro-batch, and the weight it is for."""

    def __init__(self, weight: float = 0.0, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.weight, self.layers = weight, layers


class CausalAttentionTrainer(Trainer):
    """A trainer on examples with edges between their causes and effects."""

    _metrics: Any
    _num_effects = 1

    def check_causal_run(self) -> None:
        """Raises ValueError where attention is to be drawn to causes and cannot: no such layers, no edges, a sharded
        model."""
        args: Any = self.args
        if not args.causal_weight:
            return
        check_layers(base_model(self.model), args.causal_layers, "causal_layers")
        dataset: Any = self.train_dataset
        columns: Any = dataset.column_names or next(iter(dataset), {})
        if TOKENS not in columns:
            raise ValueError(
                f"causal_weight={args.causal_weight} needs the column `{COLUMN}` in train_dataset, or, where it is "
                f"tokenized, `{TOKENS}`; its columns are {sorted(columns)}"
            )
        if self.holds_part_of_the_model():
            raise ValueError(
                f"causal_weight={args.causal_weight} is not supported with FSDP or ZeRO-3; use DDP or ZeRO-2"
            )

    def count_effects_of_step(self, samples: Sequence[Any], device: torch.device) -> None:
        """Counts the tokens of effects in the micro-batches of an optimizer step, over all processes."""
        args: Any = self.args
        if not args.causal_weight:
            return
        count = sum(count_effects(sample.get(TOKENS), sample["input_ids"].shape[1]) for sample in samples)
        if args.average_tokens_across_devices:
            count = int(self.accelerator.gather(torch.tensor([count], device=device)).sum())
        self._num_effects = max(1, count)

    @contextmanager
    def recorded_causes(self, inputs: Mapping[str, Any]) -> Iterator[Causes]:
        """Records the chosen layers of the forward of a micro-batch; none where there is nothing to supervise."""
        args: Any = self.args
        guided = args.causal_weight and self.model.training
        weight = args.causal_weight_at(self.state.global_step, self.state.max_steps) if guided else 0.0
        if not (weight and count_effects(inputs.get(TOKENS), inputs["input_ids"].shape[1])):
            yield Causes(weight)
            return
        causes = Causes(weight, args.causal_layers)
        with recorded_attention(base_model(self.model), causes.layers) as recorded:
            yield causes
        causes.update(recorded)

    def causal_loss(self, causes: Causes, inputs: Mapping[str, Any], views: int, *, in_step: bool) -> Tensor | None:
        """The weighted loss of a micro-batch of `views` copies of each row, None where there is none; and its metrics.

        It is per token of an effect in the optimizer step (`in_step`) or in this micro-batch, view and layer.
        """
        args: Any = self.args
        if not (args.causal_weight and self.model.training):
            return None
        loss, sums = None, torch.zeros(3, dtype=torch.float64, device=inputs["input_ids"].device)
        if causes:
            tokens, real = inputs[TOKENS], inputs["attention_mask"].bool()
            found = list(hinges(causes, real, tokens, args.causal_ratio, args.causal_value_grad))
            missing, ratios = (torch.cat(column) for column in zip(*found, strict=True))
            count = self._num_effects if in_step else count_effects(tokens, real.shape[1])
            loss = causes.weight * missing.sum() / (count * views * len(found))
            sums += torch.stack([missing.detach().sum(), ratios.detach().sum(), missing.new_tensor(len(missing))])
        hinge, ratio, number = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train"]
        metrics["diffusion/causal_weight"].append(causes.weight)
        if number:
            metrics["diffusion/causal_loss"].append(hinge / number)
            metrics["diffusion/causal_ratio"].append(ratio / number)
        return loss
