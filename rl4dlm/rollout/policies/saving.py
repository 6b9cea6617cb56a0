"""The file of an unmasking policy, beside the model it was trained with.

One safetensors file, `unmasking_policy.safetensors`, whose metadata says the kind and the settings of the network.
Nothing in it is executed; it is complete or not there. Owns the kinds, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from rl4dlm.models.unmasking import POLICY_FILE as POLICY_FILE, policy_file
from rl4dlm.rollout.policies.policy import FORMAT, UnmaskingPolicy, attach_policy, attached_policy

P = TypeVar("P", bound=type[UnmaskingPolicy])

_kinds: dict[str, type[UnmaskingPolicy]] = {}


def register(cls: P) -> P:
    """Registers a class of policies under its `kind`. Raises ValueError if that is taken."""
    if cls.kind in _kinds:
        raise ValueError(f"a kind of unmasking policies named {cls.kind!r} is registered already")
    _kinds[cls.kind] = cls
    return cls


def kinds() -> list[str]:
    """All registered kinds, sorted."""
    return sorted(_kinds)


def build_policy(kind: str, settings: dict[str, Any]) -> UnmaskingPolicy:
    """A policy of a kind, without weights. Raises ValueError for an unknown kind, and for settings it refuses."""
    if kind not in _kinds:
        raise ValueError(f"kind={kind!r} of unmasking policies is unknown; choose one of {', '.join(kinds())}")
    try:
        return _kinds[kind](**settings)
    except TypeError as error:
        raise ValueError(f"settings={settings!r} are not those of unmasking policies of kind {kind!r}: {error}") from (
            error
        )


def policy_path(path: str | os.PathLike[str]) -> Path:
    """The file of a policy: the path itself, or `POLICY_FILE` in the folder that it is."""
    return Path(path, POLICY_FILE) if os.path.isdir(path) else Path(path)


def save_policy(policy: UnmaskingPolicy, folder: str | os.PathLike[str]) -> Path:
    """Writes `POLICY_FILE` into a folder; returns its path."""
    path = Path(folder, POLICY_FILE)
    policy.save(path)
    return path


def load_policy(path: str | os.PathLike[str], *, device: Any = None) -> UnmaskingPolicy:
    """Reads a policy, in the dtype that it was saved in.

    Args:
        path: the file, or the folder that it is in. device: where to put it; None: the CPU.

    Raises:
        ValueError: there is no such file; it is not a policy's, of an unknown kind, damaged, of weights that do not
            belong together or are not numbers.
    """
    file = policy_path(path)
    if not file.is_file():
        raise ValueError(f"{file} is missing: no unmasking policy was saved there")
    try:
        with safe_open(file, framework="pt") as opened:
            about: dict[str, str] = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as a safetensors file: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{file} does not hold an unmasking policy: its metadata is {about}")
    try:
        settings = json.loads(about.get("settings", ""))
        if not isinstance(settings, dict):
            raise ValueError(f"its settings are {settings!r}")
        policy = build_policy(about.get("kind", ""), settings)
    except ValueError as error:
        raise ValueError(f"{file} does not hold an unmasking policy that this version knows: {error}") from error
    _give(policy, weights, file)
    return policy.to(device)


def load_weights(policy: UnmaskingPolicy, path: str | os.PathLike[str]) -> None:
    """Reads the weights of a saved policy into one that exists, in place, so that optimizers keep what they hold.

    Raises ValueError as `load_policy` does, and where it is of another kind or has other settings.
    """
    saved = load_policy(path)
    if (saved.kind, saved.settings) != (policy.kind, policy.settings):
        raise ValueError(
            f"{policy_path(path)} holds an unmasking policy of kind {saved.kind!r} with settings={saved.settings}; "
            f"here it is {policy.kind!r} with settings={policy.settings}"
        )
    with torch.no_grad():
        own = dict(policy.named_parameters())
        for name, value in saved.named_parameters():
            own[name].copy_(value)


def policy_of(model: Any) -> UnmaskingPolicy | None:
    """The policy of a model: that on it, or else that in the folder it was loaded from, which is then put there.

    None if there is neither. Raises ValueError for a file that cannot be used.
    """
    found = attached_policy(model)
    if found is not None:
        return found
    file = policy_file(model)
    return None if file is None else attach_policy(model, load_policy(file).requires_grad_(False))


def _give(policy: UnmaskingPolicy, weights: dict[str, torch.Tensor], file: Path) -> None:
    """Weights of a file for a policy that has none. Raises ValueError where they do not fit."""
    wanted = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != given:
        names = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
        name = names[0]
        raise ValueError(
            f"{file} does not fit its settings {policy.settings}: {len(names)} weights are missing, too many or of "
            f"another shape, among them {name!r}, which is {given.get(name)} and should be {wanted.get(name)}"
        )
    for name, value in weights.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{file} holds numbers that are not finite, in {name!r}")
    policy.load_state_dict(weights, assign=True)
