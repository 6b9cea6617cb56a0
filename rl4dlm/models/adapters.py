"""What LoRA and quantization reach in a mixture of experts.

Owns the check of a PEFT configuration against a model whose experts are fused into parameters. Wrapping is PEFT's.
"""

from __future__ import annotations

import re
from typing import Any

from rl4dlm.models.layout import EXPERTS_DOWN, EXPERTS_UP

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def base_model(model: Any) -> Any:
    """The `PreTrainedModel` inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_adapter(model: Any, peft_config: Any) -> None:
    """Raises ValueError when `target_modules` name expert projections, which are no modules here.

    The experts of a layer are two parameters, `experts.gate_up_proj` and `experts.down_proj`. What PEFT makes of module
    names for them depends on its version: it leaves the experts out, or adapts them with twice the rank and leaves out
    the dense and shared layers of the same name. Neither is what was asked for.

    Args:
        model: unwrapped, or a `PeftModel`.
        peft_config: what is to be applied to it; one without `target_modules` passes.
    """
    base = base_model(model)
    containers = experts_of(base)
    targets = getattr(peft_config, "target_modules", None)
    if not containers or not targets:
        return
    named = sorted(leaf for leaf in _PROJECTIONS if _matches(targets, f"{containers[0]}.0.{leaf}"))
    named += sorted(leaf for leaf in _PROJECTIONS if leaf not in named and _matches(targets, f"{containers[0]}.{leaf}"))
    if not named:
        return
    raise ValueError(
        f"target_modules={targets if isinstance(targets, str) else sorted(targets)!r} names {', '.join(named)}, but "
        f"the experts of {type(base).__name__} are fused into parameters, which module names do not reach. Leave these "
        f"names out, and to adapt the experts set target_parameters=['{EXPERTS_UP}', '{EXPERTS_DOWN}']; dense and "
        "shared layers are reached in the same way, e.g. 'shared_experts.up_proj.weight'"
    )


def experts_of(model: Any) -> list[str]:
    """Names of the modules that hold the fused experts of a layer; empty for a dense model."""
    return [name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith(EXPERTS_UP)]


def quantized_share(model: Any) -> tuple[int, int]:
    """How many parameters are stored in less than 16 bits, and how many there are. Counts weights, not bytes."""
    quantized = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        quantized += count if state is not None or parameter.element_size() == 1 else 0
    return quantized, total


def _matches(targets: Any, module: str) -> bool:
    """Whether PEFT would take a module of this name: a name or its end for a list, the whole name for a pattern."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)
