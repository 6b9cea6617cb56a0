"""How rollouts and what is asked for travel: tensors as safetensors, the rest as JSON in their header. No pickles.

Owns the form of both directions. What is allowed is the server's and the engine's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Events, Refinement, Rollout, StopReason, Trace
from rl4dlm.rollout.state import State

FORMAT = 1
"""Of what travels; another number is refused."""

_KEY = "rl4dlm"


def pack(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """JSON and tensors of any device as one message."""
    # Copies: safetensors takes no two tensors that share memory.
    kept = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    return save(kept, {_KEY: json.dumps({"format": FORMAT, **about}, default=_plain)})


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `pack`. ValueError for anything else."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][_KEY])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("the message is no safetensors message of rl4dlm") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise ValueError(f"the message has format={found!r}; {FORMAT} is needed: both sides need the same rl4dlm")
    return about, tensors


@dataclass(frozen=True)
class Wanted:
    """What a rollout is asked for, before it is known whether it can be decoded.

    Args:
        weights: name of those that it is to be decoded with.
        config: settings of `DecodingConfig` by name.
        prompts, row_ids, seed, hints, start: of `RolloutEngine.generate`.
    """

    weights: str
    config: dict[str, Any]
    prompts: list[list[int]]
    row_ids: list[int]
    seed: int
    hints: list[dict[int, int]] | None = None
    start: State | None = None


def pack_request(
    weights: str,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    row_ids: Sequence[int],
    seed: int,
    hints: Sequence[Mapping[int, int]] | None,
    start: State | None,
) -> bytes:
    """What `unpack_request` reads."""
    about = {
        "weights": weights,
        "config": asdict(config),
        "prompts": [list(map(int, prompt)) for prompt in prompts],
        "row_ids": list(map(int, row_ids)),
        "seed": seed,
        "hints": None if hints is None else [[[int(k), int(v)] for k, v in given.items()] for given in hints],
        "exact": None if start is None else start.exact,
    }
    return pack(about, {} if start is None else _flat(start, "start."))


def unpack_request(data: bytes) -> Wanted:
    """What is asked for. ValueError, with the field, for what is none; whether it can be decoded is not looked at."""
    about, tensors = unpack(data)
    about.pop("format")
    _check_names("fields", set(about), {"weights", "config", "prompts", "row_ids", "seed", "hints", "exact"})
    hints, exact = about["hints"], about["exact"]
    pairs = _lists(hints) and all(_lists(row) and all(_ids(pair) and len(pair) == 2 for pair in row) for row in hints)
    kinds = {
        "weights": isinstance(about["weights"], str),
        "config": isinstance(about["config"], dict),
        "prompts": _lists(about["prompts"]) and all(map(_ids, about["prompts"])),
        "row_ids": _ids(about["row_ids"]),
        "seed": _ids([about["seed"]]),
        "hints": hints is None or pairs,
        "exact": exact is None or isinstance(exact, bool),
    }
    bad = [name for name, fits in kinds.items() if not fits]
    if bad:
        raise ValueError(f"{bad[0]}={_shown(about[bad[0]])} is not allowed; it has another form")
    state = {name.removeprefix("start."): value for name, value in tensors.items()}
    optional = ("log_prob", "entropy")
    if exact is None:
        _check_names("tensors", set(state), set())
    else:
        _check_names("tensors of start", {*state, *optional}, {f.name for f in fields(State)} - {"exact"})
        for name, value in state.items():
            wanted = torch.bool if name == "hinted" else torch.long if name in _WHOLE else None
            if value.dtype != wanted if wanted is not None else not value.is_floating_point():
                raise ValueError(f"start.{name} has dtype {value.dtype}, which is another one than a state's")
    return Wanted(
        weights=about["weights"],
        config=about["config"],
        prompts=about["prompts"],
        row_ids=about["row_ids"],
        seed=about["seed"],
        hints=None if hints is None else [dict(row) for row in hints],
        start=None if exact is None else State(**{**dict.fromkeys(optional), **state}, exact=exact),  # type: ignore[arg-type]
    )


def pack_rollout(rollout: Rollout, weights: str) -> bytes:
    """A rollout and the name of the weights that it was decoded with; what the asker knows is left out."""
    about = {
        "weights": weights,
        "stop_reason": [str(reason) for reason in rollout.stop_reason],
        **{name: getattr(rollout, name) for name in ("schedule", "cache", "exact", "mask_token_id")},
    }
    return pack(about, _flat(rollout, ""))


def unpack_rollout(
    data: bytes,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    row_ids: Sequence[int],
    seed: int,
    device: Any = "cpu",
) -> tuple[Rollout, str]:
    """The rollout of what was asked for, without a `weight_version`, and the name of its weights.

    Raises ValueError for what is none, or is one of other rows or of another canvas.
    """
    about, tensors = unpack(data)
    moved = {name: value.to(device) for name, value in tensors.items()}
    try:
        trace = _under(moved, "trace.")
        events, refinement = _under(trace, "events."), _under(trace, "refinement.")
        own = {name: value for name, value in trace.items() if "." not in name}
        rollout = Rollout(
            prompt_ids=[list(map(int, prompt)) for prompt in prompts],
            trace=Trace(
                **{"log_prob": None, **own},  # type: ignore[arg-type]
                events=Events(**events) if events else None,
                refinement=Refinement(**refinement) if refinement else None,
            ),
            stop_reason=[StopReason(reason) for reason in about["stop_reason"]],
            row_ids=list(map(int, row_ids)),
            seed=seed,
            decoding=config,
            **{name: about[name] for name in ("schedule", "cache", "exact", "mask_token_id")},
            **{name: value for name, value in moved.items() if "." not in name},  # type: ignore[arg-type]
        )
        weights = str(about["weights"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answer is no rollout: {type(error).__name__}") from None
    shape = (len(rollout.prompt_ids), config.canvas_length)
    if tuple(rollout.canvas.shape) != shape or len(rollout.stop_reason) != shape[0]:
        raise ValueError(f"the answer has a canvas {list(rollout.canvas.shape)}; asked for was {list(shape)}")
    return rollout, weights


_WHOLE = ("canvas", "commit_step", "steps", "block_stop")


def _flat(value: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of a dataclass and of those in it, by dotted names."""
    found: dict[str, Tensor] = {}
    for entry in fields(value):
        part = getattr(value, entry.name)
        if isinstance(part, Tensor):
            found[prefix + entry.name] = part
        elif isinstance(part, Trace | Events | Refinement):
            found |= _flat(part, f"{prefix}{entry.name}.")
    return found


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_names(what: str, found: set[str], needed: set[str]) -> None:
    if found != needed:
        raise ValueError(
            f"the message has {what} {sorted(found - needed)} that are not known and lacks {sorted(needed - found)}"
        )


def _lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list) for one in value)


def _ids(value: Any) -> bool:
    """Whether something is a list of integers of 64 bits."""
    return isinstance(value, list) and all(type(one) is int and -(2**63) <= one < 2**63 for one in value)


def _plain(value: Any) -> Any:
    """What JSON has no form of: settings that are dataclasses, and sets."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
