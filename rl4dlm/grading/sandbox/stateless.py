"""Whether a program keeps anything from one call to the next, as far as its module tells.

Owns the look at what a loaded program defines. Where everything is a constant, a function without memory or a class of
such, several calls can be made in one process and each still sees the program as freshly loaded. What is not understood
counts as memory: then each call has a process of its own, which is slower and never wrong.
"""

from __future__ import annotations

import functools
import random
from types import (
    BuiltinFunctionType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    UnionType,
)
from typing import Any

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), type(NotImplemented))
_NO_MEMORY = (ModuleType, BuiltinFunctionType, GenericAlias, UnionType, GetSetDescriptorType, MemberDescriptorType)
_CONSTANT_OBJECTS = ("typing", "re")  # modules of types whose objects never change


class Watch:
    """What a program has defined, and whether it is still the same.

    Args:
        names: the program's module.
    """

    def __init__(self, names: dict[str, Any]) -> None:
        self._seen: list[tuple[Any, dict[str, Any]]] = [(names, dict(names))]
        self._visited: set[int] = set()
        module = names.get("__name__")
        self._stateless = all(
            self._is_constant(value, module) for name, value in names.items() if not name.startswith("__")
        )

    def unchanged(self) -> bool:
        """Whether the program is as it was when it was loaded."""
        if not self._stateless:
            return False
        for place, before in self._seen:
            now = place if type(place) is dict else vars(place)
            if len(now) != len(before) or any(now.get(name, self) is not value for name, value in before.items()):
                return False
        return True

    def _is_constant(self, value: Any, module: Any) -> bool:
        kind = type(value)
        if kind in _CONSTANTS or kind in _NO_MEMORY or id(value) in self._visited:
            return True
        self._visited.add(id(value))
        if kind is tuple or kind is frozenset:
            return all(self._is_constant(item, module) for item in value)
        if kind is FunctionType:
            return value.__module__ != module or self._keeps_nothing(value, module)
        if kind is staticmethod or kind is classmethod:
            return self._is_constant(value.__func__, module)
        if kind is property:
            return all(self._is_constant(part, module) for part in (value.fget, value.fset, value.fdel))
        if kind is functools._lru_cache_wrapper:  # remembers what the function would say again
            return self._is_constant(value.__wrapped__, module)
        if kind is type:
            if value.__module__ != module:
                return True
            self._seen.append((value, dict(vars(value))))
            return all(
                self._is_constant(part, module)
                for name, part in vars(value).items()
                if not name.startswith("__") or callable(part)
            )
        if kind is MethodType:
            return value.__self__ is random._inst  # set anew for each call
        return kind.__module__ in _CONSTANT_OBJECTS

    def _keeps_nothing(self, function: FunctionType, module: Any) -> bool:
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # one that is not set yet
            return False
        kept = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *cells]
        if vars(function) and set(vars(function)) != {"__wrapped__"}:
            return False
        self._seen.append((function, dict(vars(function))))
        return all(self._is_constant(item, module) for item in kept)
