"""What the source of a test consists of: its functions, their bodies in a row, and the names that it expects.

Owns the reading of tests as they are published: bare asserts, `check(candidate)`, and functions and classes for pytest.
"""

from __future__ import annotations

import ast
import builtins
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rl4dlm.grading.code.parse import parse
from rl4dlm.grading.code.scorable import SOLUTION_MODULES, can_fail, names_of

BUILTINS = frozenset(dir(builtins))
MOST_STATEMENTS = 2000  # of a test with its loops unrolled


class CannotRewriteError(Exception):
    """A test is more than a row of asserts about calls."""


def test_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions of a module that are its tests: those called `test...` or `check...`."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and (node.name.startswith("test") or node.name.startswith("check"))
    ]


def straight_line(tree: ast.Module, entry_point: str | None) -> list[ast.stmt]:
    """The statements that a test consists of, with its functions' bodies in the place of their calls.

    Raises:
        CannotRewriteError: it has functions of other kinds.
    """
    functions = {node.name: node for node in test_functions(tree)}
    uncalled = dict(functions)
    body: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name in functions:
            continue
        if is_main_guard(statement):
            continue
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in functions:
            if call.keywords:
                raise CannotRewriteError
            body += _inlined(functions[call.func.id], call.args)
            uncalled.pop(call.func.id, None)
        else:
            body.append(statement)
    for function in uncalled.values():
        takes_program = function.args.args and entry_point is not None and function.name.startswith("check")
        body += _inlined(function, [ast.Name(str(entry_point), ast.Load())] if takes_program else [])
    return body


def is_main_guard(statement: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test)


def _inlined(function: ast.FunctionDef, arguments: Sequence[ast.expr]) -> list[ast.stmt]:
    """The statements of a function for each of its parameter sets, after assignments of its arguments."""
    spec = function.args
    if spec.vararg or spec.kwarg or spec.kwonlyargs or spec.posonlyargs or spec.defaults:
        raise CannotRewriteError
    names = [argument.arg for argument in spec.args]
    cases: list[dict[str, ast.expr]] = [{}]
    for decorator in reversed(function.decorator_list):
        rows = _parameter_sets(decorator)
        if len(rows) * len(cases) > MOST_STATEMENTS:
            raise CannotRewriteError
        cases = [{**case, **row} for row in rows for case in cases]
    body: list[ast.stmt] = []
    for case in cases:
        given = case | dict(zip([name for name in names if name not in case], arguments, strict=False))
        if set(given) != set(names) or len(body) > MOST_STATEMENTS:
            raise CannotRewriteError
        statements = copy.deepcopy(function.body)
        for name, value in given.items():
            if isinstance(value, ast.Name):  # a function is no data, so its name takes the argument's place
                renaming = _Renamed(name, value.id)
                statements = [renaming.visit(statement) for statement in statements]
            else:
                body.append(ast.Assign([ast.Name(name, ast.Store())], value))
        body += statements
    return body


def _parameter_sets(decorator: ast.expr) -> list[dict[str, ast.expr]]:
    """The rows of `pytest.mark.parametrize("a, b", [(1, 2), ...])`."""
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.parametrize":
        raise CannotRewriteError
    try:
        names = ast.literal_eval(decorator.args[0])
    except (ValueError, IndexError):
        raise CannotRewriteError from None
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    if len(decorator.args) < 2 or not isinstance(decorator.args[1], ast.List | ast.Tuple):
        raise CannotRewriteError
    rows = []
    for row in decorator.args[1].elts:
        cells = [row] if len(names) == 1 else row.elts if isinstance(row, ast.Tuple | ast.List) else []
        if len(cells) != len(names):
            raise CannotRewriteError
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


class _Renamed(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id != self.old:
            return node
        if not isinstance(node.ctx, ast.Load):
            raise CannotRewriteError
        return ast.copy_location(ast.Name(self.new, ast.Load()), node)


def free_names(source: str) -> set[str]:
    """Names that a test uses and nothing in it binds, without Python's own: what it expects of the program."""
    return names_of(source)[0] - BUILTINS


def implied_modules(tree: ast.Module) -> list[str]:
    """Modules of the standard library that a test uses without an import, as in `re.match`.

    The program is expected to have imported them. Here they are the test's: what they do is not the program's to say.
    """
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    owners = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.id for node in owners if isinstance(node, ast.Name)}
    return sorted((used & sys.stdlib_module_names) - bound)


def runnable(source: str, entry_point: str | None) -> str | None:
    """The statements of a test as they are run as a whole: with calls of its functions, without imports of the program.

    None where nothing in it can fail, it is no Python, or it needs pytest, which is not in a sandbox.
    """
    tree = parse(source)
    if tree is None or _needs_pytest(tree) or not can_fail(tree):
        return None
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    body: list[ast.stmt] = [node for node in tree.body if not _is_left_out(node) and not is_main_guard(node)]
    calls = []
    for function in test_functions(tree):
        if function.name not in called:
            takes_program = bool(function.args.args) and function.name.startswith("check")
            if function.args.args and not (takes_program and entry_point):
                return None  # it wants a fixture, or the function that is asked for, of which nothing is known
            calls.append(f"{function.name}({entry_point if takes_program else ''})")
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            for name in (name for name in names if name.startswith("test")):
                prepared = f"(lambda test: (test.setup_method(), test.{name}()))({node.name}())"
                alone = prepared if "setup_method" in names else f"{node.name}().{name}()"
                calls.append(f"{node.name}({name!r}).debug()" if node.bases else alone)
    imports = [f"import {name}" for name in implied_modules(tree)]
    whole = "\n".join([*imports, *(ast.unparse(node) for node in body), *calls]) + "\n"
    return whole if any(can_fail(node) for node in _reached(ast.parse(whole))) else None


def _reached(tree: ast.Module) -> list[ast.AST]:
    """The statements that are run, as far as names tell: outside of functions and classes, and those they name."""
    definitions = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    waiting: list[ast.AST] = [node for node in tree.body if node not in definitions.values()]
    reached: list[ast.AST] = []
    while waiting:
        reached.append(waiting.pop())
        found = list(ast.walk(reached[-1]))
        for name in {node.id for node in found if isinstance(node, ast.Name)} & definitions.keys():
            waiting.append(definitions.pop(name))
    return reached


def expected_first(node: ast.Compare, calls_program: Callable[[ast.expr], bool]) -> None:
    """Has an expected value worked out before the program is called: `sorted(xs) == f(xs)`.

    Then it is that of the numbers that are handed over, whatever the program makes of them.
    """
    left, right = node.left, node.comparators[0]
    symmetric = len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq | ast.NotEq)
    if symmetric and calls_program(left) and not calls_program(right):
        node.left, node.comparators = right, [left]


def with_expected_first(source: str, names: set[str]) -> str:
    """The statements of a test with `expected_first` done to its comparisons.

    Args:
        source: the statements.
        names: what of the program they use.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            expected_first(
                node, lambda side: any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(side))
            )
    return ast.unparse(tree) + "\n"


def _needs_pytest(tree: ast.Module) -> bool:
    imported = any(isinstance(node, ast.Import) and _imports_pytest(node) for node in ast.walk(tree))
    used = any(isinstance(node, ast.Name) and node.id == "pytest" for node in ast.walk(tree))
    from_it = any(isinstance(node, ast.ImportFrom) and node.module == "pytest" for node in ast.walk(tree))
    return from_it or (imported and used)


def _imports_pytest(node: ast.Import) -> bool:
    return any(alias.name == "pytest" for alias in node.names)


def _is_left_out(node: ast.stmt) -> bool:
    """Imports of the program, which is there, and of pytest where nothing of it is used."""
    if isinstance(node, ast.ImportFrom):
        return node.module in SOLUTION_MODULES
    return isinstance(node, ast.Import) and _imports_pytest(node)


def is_print(node: ast.Call) -> bool:
    """Whether a call prints, which says nothing of a program."""
    return isinstance(node.func, ast.Name) and node.func.id == "print"


def is_immutable(value: Any) -> bool:
    """Whether plain data cannot be changed by whom it is given to."""
    return isinstance(value, int | float | complex | str | bytes | None) or (
        isinstance(value, tuple | frozenset) and all(is_immutable(item) for item in value)
    )


def expected_error(node: ast.With | ast.Try) -> tuple[list[ast.stmt], ast.expr, str | None]:
    """What a statement expects to raise: its statements, the exception, and what its message contains.

    It is `with pytest.raises(ValueError, match="...")`, or `try: f(-1); assert False` with `except ValueError: pass`.

    Raises:
        CannotRewriteError: it is another statement.
    """
    if isinstance(node, ast.Try):
        return _expected_by_try(node)
    call = node.items[0].context_expr
    if len(node.items) > 1 or node.items[0].optional_vars is not None or not isinstance(call, ast.Call):
        raise CannotRewriteError
    if len(call.args) != 1 or ast.unparse(call.func) not in ("pytest.raises", "raises"):
        raise CannotRewriteError
    text = None
    for keyword in call.keywords:
        if keyword.arg != "match" or not isinstance(keyword.value, ast.Constant):
            raise CannotRewriteError
        text = str(keyword.value.value)
        if any(character in text for character in "\\^$.|?*+()[]{}"):
            raise CannotRewriteError  # a pattern, and patterns from a dataset can take forever
    return node.body, call.args[0], text


def _expected_by_try(node: ast.Try) -> tuple[list[ast.stmt], ast.expr, str | None]:
    *body, last = node.body
    asserts_false = isinstance(last, ast.Assert) and isinstance(last.test, ast.Constant) and not last.test.value
    if not (asserts_false or isinstance(last, ast.Raise)) or node.orelse or node.finalbody or len(node.handlers) != 1:
        raise CannotRewriteError
    kind = node.handlers[0].type
    if kind is None or ast.unparse(kind) in ("Exception", "BaseException", "AssertionError"):
        raise CannotRewriteError  # it would catch the assert as well
    for statement in node.handlers[0].body:
        test = statement.test if isinstance(statement, ast.Assert) else None
        if not isinstance(statement, ast.Pass) and not (isinstance(test, ast.Constant) and test.value):
            raise CannotRewriteError
    return body, kind, None


def bound_within(node: ast.expr) -> set[str]:
    """Names that comprehensions and lambdas inside an expression bind."""
    names: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            names.add(part.id)
        elif isinstance(part, ast.arg):
            names.add(part.arg)
    return names
