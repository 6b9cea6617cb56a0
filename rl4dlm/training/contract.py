"""Checks, when a trainer is imported, that the TRL and transformers installed have the private names it builds on.

Owns the check only. The names are listed by the one file that uses them, next to the class that it extends.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import CodeType, ModuleType
from typing import Any


class ContractError(ImportError):
    """The installed TRL or transformers lacks something that a trainer builds on."""


def check_contract(
    cls: type,
    *,
    parameters: Mapping[str, Iterable[str]],
    attributes: Iterable[str] = (),
    keys: Mapping[str, Iterable[str]] | None = None,
    module: ModuleType | None = None,
    names: Iterable[str] = (),
) -> None:
    """Raises `ContractError` naming everything that is missing.

    Args:
        cls: the class that is extended.
        parameters: method name -> parameters it must accept.
        attributes: instance attributes that its `__init__` must set.
        keys: method name -> strings (dictionary keys) that must occur in its code.
        module: where `names` must exist. names: functions that are used or replaced there.
    """
    missing = [f"{module.__name__}.{name}" for name in names if not hasattr(module, name)] if module else []
    for name, wanted in parameters.items():
        method = getattr(cls, name, None)
        if method is None:
            missing.append(f"{cls.__name__}.{name}")
            continue
        accepted = inspect.signature(method).parameters
        missing += [f"{cls.__name__}.{name}({p})" for p in wanted if p not in accepted]
    set_here = _code(cls.__init__).co_names  # type: ignore[misc]
    missing += [f"{cls.__name__}().{name}" for name in attributes if name not in set_here]
    for name, strings in (keys or {}).items():
        constants = _strings(_code(getattr(cls, name)))
        missing += [f"{cls.__name__}.{name}: {key!r}" for key in strings if key not in constants]
    if missing:
        import transformers
        import trl

        raise ContractError(
            f"trl {trl.__version__} with transformers {transformers.__version__} lacks what this trainer builds on: "
            f"{', '.join(missing)}. It was tested with trl 1.16 and transformers 5.24."
        )


def _code(function: Any) -> CodeType:
    return inspect.unwrap(function).__code__


def _strings(code: CodeType) -> set[str]:
    found: set[str] = set()
    stack: list[Any] = list(code.co_consts)
    while stack:
        constant = stack.pop()
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, tuple):
            stack.extend(constant)
    return found
