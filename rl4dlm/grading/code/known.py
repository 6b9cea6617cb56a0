"""What a test works out by itself, and what of it a program may be told.

Owns the line between the two processes: a test's own expressions are worked out in the trainer's process and reach the
program as literals of what they give, and what Python does with a program's values is not done in the program's
process, where its functions could be others.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from typing import Any

from rl4dlm.grading.code.evaluate import CannotEvaluateError, evaluate, is_within
from rl4dlm.grading.code.parse import parse_expression
from rl4dlm.grading.code.source import CannotRewriteError, is_immutable

_WORK = (
    ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.IfExp, ast.JoinedStr, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp,
)  # fmt: skip


def worked_out(value: ast.expr, known: Mapping[str, Any]) -> tuple[Any, ast.expr]:
    """What an expression of the test's own gives, and a literal of it, which tells nothing of what it was made of.

    Args:
        value: the expression.
        known: the test's variables.

    Raises:
        CannotRewriteError: it is not worked out in this process, or it gives a part of a variable that can be changed,
            so that there would be two names of one list.
    """
    if not is_within(value, set(known)):
        raise CannotRewriteError
    try:
        result = evaluate(value, known)
        if _parts(result) & {number for each in known.values() for number in _parts(each)}:
            raise CannotRewriteError
        literal = parse_expression(repr(result))
        if literal is not None and is_within(literal, set()) and repr(evaluate(literal, {})) == repr(result):
            return result, literal
    except (CannotEvaluateError, RecursionError):
        raise CannotRewriteError from None
    if any(isinstance(part, ast.Name) and part.id in known for part in ast.walk(value)):
        raise CannotRewriteError
    return result, value  # float("nan"), and what is too long to be written out


def with_results(node: ast.expr, own: set[str], known: Mapping[str, Any]) -> ast.expr:
    """An expression with the test's own parts worked out, such as the `len(xs)` of `f(len(xs))`.

    A variable alone stays one, and so do those in a display: the program is handed the list itself, and may change it.

    Args:
        node: the expression.
        own: names that it binds itself.
        known: the test's variables.

    Raises:
        CannotRewriteError: the program would be told more than is handed over.
    """

    class Put(ast.NodeTransformer):
        def visit(self, part: ast.AST) -> Any:
            if isinstance(part, ast.expr) and not isinstance(part, ast.Name | ast.Starred | ast.Constant):
                used = {name.id for name in ast.walk(part) if isinstance(name, ast.Name)}
                if used & known.keys() and not used & own and is_within(part, set(known)):
                    try:
                        return worked_out(part, known)[1]
                    except CannotRewriteError:  # it has the lists themselves in it
                        if not isinstance(part, ast.List | ast.Tuple | ast.Dict):
                            raise
            return self.generic_visit(part)

    put: ast.expr = Put().visit(copy.deepcopy(node))
    return put


def refuse_work(node: ast.AST, about_program: Callable[[ast.expr], bool], known: Mapping[str, Any]) -> None:
    """Refuses what is done with a program's value on its way into a call: `out.append(f(2) == 4)`.

    The program's process would do it. Only calls of the program, items of what they give and displays of it are left to
    it, and methods of the test's own lists.

    Raises:
        CannotRewriteError: there is such a thing.
    """
    if isinstance(node, ast.Lambda):
        return  # which the program calls, if it likes
    if isinstance(node, ast.expr) and about_program(node):
        works = isinstance(node, _WORK)
        if isinstance(node, ast.Call):
            owner = node.func.value if isinstance(node.func, ast.Attribute) else node.func
            is_list = isinstance(owner, ast.Name) and owner.id in known and not is_immutable(known[owner.id])
            works = not about_program(owner) and not is_list and ast.unparse(node.func) not in ("list", "tuple")
        if works:
            raise CannotRewriteError
    for child in ast.iter_child_nodes(node):
        refuse_work(child, about_program, known)


def _parts(value: Any) -> set[int]:
    """The ids of what a value is made of and can be changed."""
    if is_immutable(value):
        return set()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {id(value)}.union(*(_parts(item) for item in inner))
