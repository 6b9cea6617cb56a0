"""Whether a call of the engine can be decoded: its prompts, row ids, hints, choices and parts, before any forward."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rows import Choices
from rl4dlm.rollout.schedules.parts import CanvasSchedule, Schedule
from rl4dlm.rollout.state import State


def check_call(
    model: Any,
    spec: DiffusionSpec,
    prompts: Sequence[Sequence[int]],
    rows: list[list[int]],
    row_ids: list[int],
    hints: Sequence[Mapping[int, int]] | None,
    choices: Sequence[Mapping[int, Collection[int]]] | None,
    config: DecodingConfig,
) -> None:
    """Whether prompts, row ids, hints and choices fit the model and the settings."""
    text = model.config.get_text_config()
    mask, vocabulary = spec.mask_token_id, text.vocab_size
    limit = getattr(text, "max_position_embeddings", None)
    for name in ("suppress_token_ids", "defer_token_ids"):
        outside = [i for i in getattr(config, name) if i >= vocabulary]
        if outside:
            raise ValueError(f"{name} has ids {outside} outside 0..{vocabulary - 1}, the model's vocabulary")
    if len({*config.suppress_token_ids, mask}) == vocabulary:
        raise ValueError("suppress_token_ids leaves nothing to draw but the mask token")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty; a prompt has at least one token")
        if mask in prompt:
            raise ValueError(f"prompts[{i}] contains the mask token (id {mask}); prompts hold written text only")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompts[{i}] has a token id outside 0..{vocabulary - 1}, the model's vocabulary")
        if limit is not None and len(prompt) + config.canvas_length > limit:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, which with canvas_length={config.canvas_length} exceeds "
                f"the model's {limit} positions; at most {limit - config.canvas_length} are allowed"
            )
    if len(row_ids) != len(rows) or len(set(row_ids)) != len(row_ids):
        raise ValueError(f"row_ids must be {len(rows)} different integers (prompts x num_generations)")
    if choices is not None:
        _check_choices(model, spec, choices, len(rows), config)
    if hints is None:
        return
    if spec.noise != "mask":
        raise ValueError(f"hints are not supported for noise={spec.noise!r}, where every token may change")
    if len(hints) != len(rows):
        raise ValueError(f"hints has {len(hints)} entries; one per row is needed: {len(rows)}")
    for row, given in enumerate(hints):
        for offset, token in given.items():
            if not 0 <= offset < config.canvas_length or not 0 <= token < vocabulary or token == mask:
                raise ValueError(
                    f"hints[{row}] maps offset {offset} to token {token}; allowed: offsets 0.."
                    f"{config.canvas_length - 1}, ids 0..{vocabulary - 1} except the mask token {mask}"
                )


def check_parts(
    model: Any,
    spec: DiffusionSpec,
    schedule: Schedule | CanvasSchedule,
    config: DecodingConfig,
    cache: CachePolicy,
    hints: object,
    choices: object,
    constraint: object,
    on_step: object,
    in_step: object,
) -> None:
    """Whether the schedule can do with this model what it is asked to."""
    if isinstance(schedule, CanvasSchedule):
        given = {"choices": choices, "constraint": constraint, "on_step": on_step, "in_step": in_step}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is not supported for noise={spec.noise!r}; leave it None")
        return
    if schedule.check is not None:
        schedule.check(model)
    if constraint is not None and schedule.replace is not None:
        raise ValueError(
            f"constraint is not supported for schedule={config.schedule!r}, which replaces written tokens; "
            "leave it None"
        )
    if constraint is not None and cache.foresees:
        raise ValueError(
            f"constraint is not supported for cache={cache.name!r}, which looks at no other slots than those "
            "that are written next; leave it None, or choose another cache"
        )
    if constraint is not None and not spec.eos_token_ids:
        raise ValueError(
            "constraint needs an end-of-sequence token, which fills what is open in a row that cannot go on; the "
            "model's spec has eos_token_ids=()"
        )
    if schedule.moves:
        does = "changes the length of the canvas" if schedule.edit is None else "takes slots out and puts others in"
        for name, value in (("hints", hints), ("choices", choices), ("constraint", constraint)):
            if value is not None:
                raise ValueError(
                    f"{name} is not supported for schedule={config.schedule!r}, which {does}; leave it None"
                )
    if schedule.resize is not None and not spec.eos_token_ids:
        raise ValueError(
            f"schedule={config.schedule!r} changes the length of the canvas, which needs an end-of-sequence token; the "
            "model's eos_token_ids is empty"
        )
    if schedule.verify is not None:
        _check_verified(spec, config, cache, constraint)
    if schedule.shadow and spec.attention != "full":
        raise ValueError(
            f"schedule={config.schedule!r} feeds masked copies of slots beside the row, which needs full "
            f"attention; it cannot be used with attention={spec.attention!r}"
        )
    if schedule.shadow and spec.logit_shift:
        raise ValueError(
            f"schedule={config.schedule!r} verifies tokens at their own slot; it cannot be used with logit_shift="
            f"{spec.logit_shift}"
        )


def _check_verified(spec: DiffusionSpec, config: DecodingConfig, cache: CachePolicy, constraint: object) -> None:
    """What a second forward of a step, from left to right, is not for."""
    kinds = (*BLOCK_KINDS, "full")
    for name, value, allowed in (
        ("attention", spec.attention, kinds),
        ("logit_shift", spec.logit_shift, (0,)),
        ("cfg_scale", config.cfg_scale, (0,)),
        ("constraint", constraint, (None,)),
    ):
        if value not in allowed:
            raise ValueError(
                f"schedule={config.schedule!r} checks its drafts from left to right, which is not supported with "
                f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}"
            )
    if spec.attention not in cache.exact_for:
        raise ValueError(
            f"schedule={config.schedule!r} checks its drafts from left to right, which is not supported with cache="
            f"{cache.name!r}; allowed: auto, and caches that are exact for attention={spec.attention!r}"
        )


def as_choices(
    model: Any, choices: Sequence[Mapping[int, Collection[int]]], length: int, device: torch.device
) -> Choices:
    """Which tokens may be drawn where, as rows look it up."""
    vocabulary = model.config.get_text_config().vocab_size
    numbers: dict[frozenset[int], int] = {}
    index = torch.full((len(choices), length), -1)
    for row, given in enumerate(choices):
        for offset, tokens in given.items():
            index[row, offset] = numbers.setdefault(frozenset(tokens), len(numbers))
    sets = torch.zeros(max(1, len(numbers)), vocabulary, dtype=torch.bool)
    for allowed, number in numbers.items():
        sets[number, list(allowed)] = True
    return Choices(sets.to(device), index.to(device))


def _check_choices(
    model: Any,
    spec: DiffusionSpec,
    choices: Sequence[Mapping[int, Collection[int]]],
    rows: int,
    config: DecodingConfig,
) -> None:
    vocabulary, mask = model.config.get_text_config().vocab_size, spec.mask_token_id
    if len(choices) != rows:
        raise ValueError(f"choices has {len(choices)} entries; one per row is needed: {rows}")
    checked: set[frozenset[int]] = set()  # one may be as large as the vocabulary and bind every slot of every row
    for row, given in enumerate(choices):
        for offset, tokens in given.items():
            if not 0 <= offset < config.canvas_length:
                raise ValueError(f"choices[{row}] has offset {offset}; allowed: offsets 0..{config.canvas_length - 1}")
            if isinstance(tokens, frozenset) and tokens in checked:
                continue
            checked.add(frozenset(tokens))
            left = set(tokens) - {mask, *config.suppress_token_ids}
            if not left or not all(0 <= token < vocabulary for token in tokens):
                raise ValueError(
                    f"choices[{row}] allows {sorted(tokens)[:8]} at offset {offset}; it takes at least one token "
                    f"that can be drawn, and ids 0..{vocabulary - 1}"
                )


def check_no_text(prompts: Any) -> None:
    """Raises ValueError for prompts that are text where token ids are needed."""
    for i, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        if isinstance(prompt, str) or any(isinstance(token, str) for token in prompt):
            name = "prompts" if isinstance(prompts, str) else f"prompts[{i}]"
            raise ValueError(
                f"{name}={prompt!r} is text; the engine takes lists of token ids, such as tokenizer.encode(text) gives"
            )


def check_start(
    start: State,
    rows: int,
    config: DecodingConfig,
    spec: DiffusionSpec,
    vocabulary: int,
    schedule: Schedule | CanvasSchedule,
) -> None:
    """Raises ValueError for a state that a call cannot go on from, before any compute."""
    if isinstance(schedule, CanvasSchedule):
        raise ValueError(
            f"start is not supported for noise={spec.noise!r}, where every token may change; leave it None"
        )
    if not (schedule.monotone and schedule.memoryless):
        raise ValueError(
            f"start is not supported for schedule={config.schedule!r}, whose steps follow from more than the tokens "
            "that are written; leave it None"
        )
    shape = (rows, config.canvas_length)
    for name in ("canvas", "commit_step", "hinted", "raw_log_prob", "confidence", "log_prob", "entropy", "block_stop"):
        value = getattr(start, name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"start.{name} has shape {tuple(value.shape)}; {shape} is needed: rows x canvas_length")
    if tuple(start.steps.shape) != (rows,):
        raise ValueError(f"start.steps has shape {tuple(start.steps.shape)}; {(rows,)} is needed, one per row")
    if start.log_prob is None and config.temperature > 0:
        raise ValueError(
            f"start.log_prob is None, so what is written was drawn at temperature 0; temperature={config.temperature} "
            "would leave no log-probability of it"
        )
    if start.entropy is None and "entropy" in config.record:
        raise ValueError(
            f"start.entropy is None, but record={config.record!r} asks for it; leave 'entropy' out of `record`, or "
            "record it from the start"
        )
    drawn = start.commit_step >= 0
    token, known = start.canvas, drawn | start.hinted
    if bool((known & ((token < 0) | (token >= vocabulary) | (token == spec.mask_token_id))).any()):
        raise ValueError(
            f"start.canvas holds something else than ids 0..{vocabulary - 1}, the mask token {spec.mask_token_id} "
            "excepted, in a slot that is written"
        )
    if bool((drawn & (start.hinted | (start.commit_step >= start.steps[:, None]))).any()):
        raise ValueError("start.commit_step must be below start.steps, and -1 where start.hinted is true")
