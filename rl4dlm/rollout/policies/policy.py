"""What an unmasking policy is, and how one rides on the model that it was trained with.

Owns the base class of the networks, how they get their first weights, and the place on the model where they are looked
for. Their file is `saving.py`'s.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save as packed
from torch import Tensor, nn

from rl4dlm.files import writing
from rl4dlm.models.adapters import base_model
from rl4dlm.models.unmasking import ATTRIBUTE

FORMAT = "rl4dlm.unmasking_policy"
"""What the metadata of a policy's file says it is."""


@dataclass(frozen=True)
class Seen:
    """What a policy sees of R rows with W slots before a step.

    Args:
        features: `[R, W, F]`, of each slot: what they are is the policy's kind's to say.
        masked: bool `[R, W]`, slots that are not written.
        inside: bool `[R, W]`, slots of the active block.
        exists: bool `[R, W]`, slots that there are.
        time: `[R]`, the share of the row's steps that is done, in [0, 1).
    """

    features: Tensor
    masked: Tensor
    inside: Tensor
    exists: Tensor
    time: Tensor


class UnmaskingPolicy(nn.Module, ABC):
    """A network from what is seen of slots to a utility of each, which a density makes a choice of.

    It is made without weights, on the meta device, whatever the device at the time: `fresh` and `load_policy` give it
    some. As part of a model it is in no state dictionary of it, so that folders with models stay what stock classes
    load; its own `state_dict()` has everything.

    Attributes:
        kind: the name that its file says, see `register`.
    """

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_not_missing)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Keywords of the constructor that make this one; values are what JSON knows."""

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Fills all weights in place; whatever is random comes from the generator, which is one of the CPU."""

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Utilities `[R, W]` in float32 or wider; those of slots that nothing can be written to mean nothing.

        A row's result must not depend on the other rows.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes its file, which `rl4dlm.rollout.policies.saving` reads; that is complete or not there."""
        about = {"format": FORMAT, "kind": self.kind, "settings": json.dumps(self.settings)}
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with writing(Path(path)) as file:
            file.write(packed(weights, about))

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Its weights; nothing where it is asked as part of a model."""
        return super().state_dict(*args, **kwargs) if destination is None else destination


P = TypeVar("P", bound=UnmaskingPolicy)


def _not_missing(module: nn.Module, keys: Any) -> None:
    """Weights of a policy are not missed in the state dictionary of its model."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if f"{ATTRIBUTE}." not in key]


def fresh(policy: P, *, seed: int, dtype: torch.dtype = torch.float32, device: Any = None) -> P:
    """Gives a policy its first weights, which depend on the seed alone; returns it."""
    policy.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        policy.initialise(torch.Generator().manual_seed(seed))
    return policy.to(device)


def attach_policy(model: Any, policy: P) -> P:
    """Puts a policy on a model, wrapped in an adapter or not, and on its device; an earlier one is replaced.

    Attach it before the model is wrapped in anything that looks at parameters (DDP, an optimizer), and behind adapters,
    which would otherwise adapt it.
    """
    base = base_model(model)
    setattr(base, ATTRIBUTE, policy.to(base.get_input_embeddings().weight.device))
    return policy


def attached_policy(model: Any) -> UnmaskingPolicy | None:
    """The policy on a model; None if it has none."""
    found: UnmaskingPolicy | None = getattr(base_model(model), ATTRIBUTE, None)
    return found
