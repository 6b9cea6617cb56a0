"""Which precision a run computes in where its settings do not say, what a device cannot do, and names that changed.

Owns these choices, for RL and for supervised training. TRL's default, bf16 everywhere, ends on a CPU; and it sets the
checkpointing of activations by the name that transformers gives up.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import is_torch_bf16_gpu_available


def settle(config: Any) -> None:
    """`settle_precision` and `settle_checkpointing`, before `__post_init__`."""
    settle_precision(config)
    settle_checkpointing(config)


def settle_precision(config: Any) -> None:
    """Sets `bf16` where it is None: on for a GPU that has it, off elsewhere and with `fp16`. Before `__post_init__`."""
    if config.bf16 is None:
        config.bf16 = not config.fp16 and not config.use_cpu and is_torch_bf16_gpu_available()


def settle_checkpointing(config: Any) -> None:
    """Sets `activation_checkpointing` where it is None from the older names, as transformers does, without its warning
    on every run: the older default is TRL's, not the user's. Before `__post_init__`."""
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if getattr(config, new) is None:
            setattr(config, new, getattr(config, old))


def check_precision(config: Any) -> None:
    """Raises ValueError for `fp16` on a CPU, where nothing would come of it. After `__post_init__`."""
    for name in ("fp16", "fp16_full_eval"):
        if getattr(config, name) and config.device.type == "cpu":
            raise ValueError(
                f"{name}=True is not supported on a CPU, where it has no effect; leave it out there, or train on a GPU"
            )
