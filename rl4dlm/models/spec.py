"""What makes a stock transformer a denoiser: the few facts that its weights alone do not tell.

Owns `DiffusionSpec` and its place in a model's configuration (`config.diffusion`, a plain dictionary so that it
survives `save_pretrained`). Knows nothing about weights, tokenizers or decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ATTENTION_KINDS = ("full", "block_causal", "context_causal", "causal", "written_first")
GRID_ORIGINS = ("response", "position_zero", "whole_prompt")
NOISE_KINDS = ("mask", "uniform")


@dataclass(frozen=True)
class DiffusionSpec:
    """How a model denoises.

    Args:
        mask_token_id: id of the token that stands for "not yet written"; None where `noise` is `"uniform"` and there is
            no such token. Code for `"mask"` noise may rely on an id.
        eos_token_ids: ids that end a completion; the first of any of them does.
        logit_shift: 0 if the logits at position i predict token i (LLaDA), 1 if those at i - 1 do (Dream).
        attention: which positions see which: `"full"`, `"block_causal"`, `"context_causal"`, `"causal"` or
            `"written_first"`, see `rl4dlm.models.attention`.
        block_length: length of the attention blocks in tokens; `None` where attention has none.
        grid_origin: where the block grid starts: at the `"response"`, from where it goes on to the left through the
            prompt, at `"position_zero"`, or at the response with the `"whole_prompt"` as one block before it.
        noise: what corruption the model was trained on: `"mask"` or `"uniform"`.
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    logit_shift: int = 0
    attention: str = "full"
    block_length: int | None = None
    grid_origin: str = "response"
    noise: str = "mask"

    def __post_init__(self) -> None:
        ids: Any = self.eos_token_ids
        if isinstance(ids, int):
            raise ValueError(f"eos_token_ids={ids} is not allowed; it must be a tuple of token ids")
        object.__setattr__(self, "eos_token_ids", tuple(int(i) for i in ids))
        mask: Any = self.mask_token_id
        if mask is None:
            if self.noise == "mask":
                raise ValueError(
                    "mask_token_id is not known: no file of the checkpoint states it. Pass mask_token_id=... to "
                    "load_denoiser, or add `mask_token_id` to the checkpoint's config.json"
                )
        elif mask < 0:
            raise ValueError(f"mask_token_id={self.mask_token_id} is not a token id; it must be 0 or larger")
        if self.mask_token_id in self.eos_token_ids:
            raise ValueError(f"mask_token_id={self.mask_token_id} is also in eos_token_ids={self.eos_token_ids}")
        if self.logit_shift not in (0, 1):
            raise ValueError(f"logit_shift={self.logit_shift!r} is not allowed; choose 0 or 1")
        for name, allowed in (("attention", ATTENTION_KINDS), ("grid_origin", GRID_ORIGINS), ("noise", NOISE_KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; choose one of {', '.join(allowed)}")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length={self.block_length} is not allowed; it must be 1 or larger, or None")

    def to_dict(self) -> dict[str, Any]:
        """The plain dictionary that `config.diffusion` holds."""
        return {**asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionSpec:
        """The inverse of `to_dict`. Raises ValueError on unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"mask_token_id", "eos_token_ids"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"config.diffusion has unknown keys {unknown} and lacks {missing}; allowed keys: {sorted(known)}"
            )
        return cls(**values)

    @classmethod
    def of(cls, model: Any) -> DiffusionSpec:
        """Reads the spec of a model or of its configuration. Raises ValueError if it carries none."""
        config = getattr(model, "config", model)
        values = getattr(config, "diffusion", None)
        if values is None:
            raise ValueError(
                f"{type(model).__name__} has no `config.diffusion`, so it is not known how it denoises. Load it with "
                "`rl4dlm.load_denoiser`, or set `model.config.diffusion = DiffusionSpec(mask_token_id=..., "
                "eos_token_ids=...).to_dict()`."
            )
        return cls.from_dict(values)


def lacks_mask_token(config: Any) -> bool:
    """Whether a configuration comes from files that state no mask token: the model can be run and saved, no more."""
    spec = getattr(config, "diffusion", None) or {}
    return "mask_token_id" in spec and spec["mask_token_id"] is None and spec.get("noise", "mask") == "mask"
