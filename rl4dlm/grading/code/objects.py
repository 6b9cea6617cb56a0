"""Which variables of a test hold an object of the program, where the test alone can tell.

A class has a capital letter by custom, and a call of one makes an object. Where a program's class has none, or one of
its functions makes the object, the test shows it by how the variable is used: with nothing but attributes, one of which
no plain data has. What such an object's methods give comes back as data, and is compared outside, as any call's.
"""

from __future__ import annotations

import ast

from rl4dlm.grading.code.evaluate import METHODS

_DATA = (str, bytes, int, float, complex, bool, list, tuple, dict, set, frozenset, type(None))
_OF_DATA = frozenset(name for kind in _DATA for name in dir(kind))
_QUESTIONS = ("isdigit", "isalpha", "isalnum", "isnumeric", "isspace", "isupper", "islower")
_WITHOUT_ARGUMENTS = frozenset([*_QUESTIONS, "upper", "lower", "title", "keys", "values", "items"])
_OPTIONAL = frozenset(["strip", "lstrip", "rstrip", "split", "splitlines"])
_WITH_ARGUMENTS = frozenset(METHODS) - _WITHOUT_ARGUMENTS - _OPTIONAL


def shown_by_use(tree: ast.Module) -> frozenset[str]:
    """Names of variables that a test uses as objects of the program and as nothing else."""
    owners: dict[str, list[ast.Attribute]] = {}
    counts: dict[str, int] = {}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owners.setdefault(node.value.id, []).append(node)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            counts[node.id] = counts.get(node.id, 0) + 1
    return frozenset(
        name
        for name, uses in owners.items()
        if len(uses) == counts[name] and any(not _fits_data(use, calls.get(id(use))) for use in uses)
    )


def _fits_data(use: ast.Attribute, call: ast.Call | None) -> bool:
    """Whether plain data could be used so."""
    given = call is not None and bool(call.args or call.keywords)
    if call is None or use.attr not in METHODS:
        return use.attr in _OF_DATA
    return not given if use.attr in _WITHOUT_ARGUMENTS else given or use.attr not in _WITH_ARGUMENTS
