"""Parses Python that others wrote, at a bounded cost.

Owns the limits within which `ast.parse` is fast and cannot crash the interpreter. Nothing is compiled or run.
"""

from __future__ import annotations

import ast
import re
import warnings

LONGEST_SOURCE = 1 << 16  # characters

_ENDLESS_NAME = re.compile(r"(?:\.[\w\s\\]{1,64}+){200}+")  # the parser's time is quadratic in a dotted name's length


def parse(source: str) -> ast.Module | None:
    """The syntax tree of a module; None where the text is no Python, or longer or deeper than a program needs to be.

    A tree that is given is shallow enough for functions that call themselves for each level. The deepest that the
    interpreter takes has some 200 brackets or 100 indents; `ast.parse` refuses what is deeper with one of the errors
    that are caught here.
    """
    if len(source) > LONGEST_SOURCE or _ENDLESS_NAME.search(source):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes, which are the program's affair
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if _depth_within(tree, 400) else None


def parse_expression(source: str) -> ast.expr | None:
    """The syntax tree of one expression; None where the text is none, under the limits of `parse`."""
    tree = parse(source.strip())
    if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
        return None
    return tree.body[0].value


def defined_names(tree: ast.Module) -> set[str]:
    """What the statements of a module bind at its top level: functions, classes, imports, and assigned names."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # what is within is its own
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return names


def _depth_within(tree: ast.AST, limit: int) -> bool:
    level = [tree]
    for _ in range(limit):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return True
    return False
