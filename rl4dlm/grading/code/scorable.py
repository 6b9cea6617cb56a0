"""Whether a test says anything of a program. One that every program passes, or that none can, is not scored.

Owns the reading of tests for that: which names they expect of the program, what they import, and whether something in
them can fail without being caught at once. What is only seen when a test runs, that nothing of the program is called,
is said by the process that runs it (`rl4dlm.grading.sandbox.part`).
"""

from __future__ import annotations

import ast
import symtable
import sys
from collections.abc import Iterator

from rl4dlm.grading.code.parse import defined_names, parse

SOLUTION_MODULES = ("solution", "candidate", "main", "your_module", "__main__")  # where tests import programs from
_CATCHES = ("AssertionError", "Exception", "BaseException")
_ALWAYS_TRUE = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Lambda, ast.GeneratorExp, ast.JoinedStr)


def names_of(source: str) -> tuple[set[str], set[str]]:
    """Names that statements use and do not bind, as Python's scopes have it, and names that they bind as globals.

    Both are empty where they do not compile.
    """
    try:
        table = symtable.symtable(source, "<test>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return set(), set()
    bound: set[str] = set()
    used: set[str] = set()
    waiting = [table]
    while waiting:
        scope = waiting.pop()
        waiting += scope.get_children()
        for symbol in scope.get_symbols():
            name = symbol.get_name()
            top = scope is table
            if (top or symbol.is_declared_global()) and (
                symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
            ):
                bound.add(name)
            if symbol.is_referenced() and (top or symbol.is_global()):
                used.add(name)
    return used - bound, bound


def with_program_by_name(source: str, *, alone: bool = True) -> str | None:
    """A test with the functions of the program under their own names, however it imports them.

    `import solution` and `from solution import f as g` become uses of `f`, for the test has no such module: what it
    means by it is the program. None where it cannot be scored: it is no Python, it binds a name that it takes from the
    module, or it imports what is not there.

    Args:
        source: the test.
        alone: whether there is the standard library and nothing else.
    """
    tree = parse(source)
    if tree is None:
        return None
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    if alone and not all(_is_there(node) for node in imports):
        return None
    modules = {alias.asname or alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names
               if alias.name in SOLUTION_MODULES}  # fmt: skip
    if not modules and not any(map(_of_program, imports)):
        return source
    put = _ByName(modules)
    tree = ast.fix_missing_locations(put.visit(tree))
    _, bound = names_of(ast.unparse(tree))
    local = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    return None if put.taken & (bound | local) else ast.unparse(tree) + "\n"


class _ByName(ast.NodeTransformer):
    def __init__(self, modules: set[str]) -> None:
        self.modules = modules
        self.taken: set[str] = set()

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        node.names = [alias for alias in node.names if (alias.asname or alias.name) not in self.modules]
        return node if node.names else ast.Pass()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | list[ast.stmt]:
        if not _of_program(node):
            return node
        renamed = [alias for alias in node.names if alias.asname not in (None, alias.name)]
        if not renamed:
            return ast.Pass()
        self.taken |= {alias.name for alias in renamed}
        return [ast.Assign([ast.Name(str(a.asname), ast.Store())], ast.Name(a.name, ast.Load())) for a in renamed]

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            self.taken.add(node.attr)
            return ast.Name(node.attr, node.ctx)
        return self.generic_visit(node)


def _of_program(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and (
        node.module in SOLUTION_MODULES or (node.level > 0 and not node.module)
    )


def _is_there(node: ast.Import | ast.ImportFrom) -> bool:
    if _of_program(node):
        return True
    if isinstance(node, ast.ImportFrom):
        modules = [str(node.module)] if not node.level else [""]
    else:
        modules = [alias.name for alias in node.names if alias.name not in SOLUTION_MODULES]
    return all(_installed(module.partition(".")[0]) for module in modules)


def _installed(module: str) -> bool:
    # A sandbox on this machine has the standard library and nothing else.
    return module == "pytest" or module in sys.stdlib_module_names


def binds(source: str, name: str | None) -> bool:
    """Whether statements bind a name as a global: a test that defines what is asked for does not ask the program."""
    return name is not None and name in names_of(source)[1]


def setup_binds(tree: ast.Module | None, name: str | None) -> bool:
    """Whether a set-up defines what is asked for."""
    return tree is not None and name in defined_names(tree)


def can_fail(tree: ast.AST) -> bool:
    """Whether something in a test raises where the program is wrong, and is not caught where it stands."""
    return any(_may_fail(node) for node in _not_caught(tree))


def _not_caught(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, ast.Try) and child in tree.body and any(map(_swallows, tree.handlers)):
            continue
        if isinstance(tree, ast.With) and child in tree.body and any(map(_suppresses, tree.items)):
            continue
        yield from _not_caught(child)


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler takes an AssertionError and does nothing but to go on, or to print."""
    kinds = [] if handler.type is None else handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    if handler.type is not None and not any(ast.unparse(kind).endswith(_CATCHES) for kind in kinds):
        return False
    return all(
        isinstance(node, ast.Pass | ast.Continue)
        or (isinstance(node, ast.Assert) and _always_true(node.test))
        or (isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or _prints(node.value)))
        for node in handler.body
    )


def _prints(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("print", "logging.", "traceback.print"))


def _suppresses(item: ast.withitem) -> bool:
    call = item.context_expr
    return (
        isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith("suppress")
        and any(ast.unparse(kind).endswith(_CATCHES) for kind in call.args)
    )


def _always_true(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return bool(node.value)
    inner = getattr(node, "elts", None) or getattr(node, "keys", None) or getattr(node, "values", None)
    return isinstance(node, _ALWAYS_TRUE) and (isinstance(node, ast.Lambda | ast.GeneratorExp) or bool(inner))


def _may_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not _always_true(node.test)
    asserts = isinstance(node, ast.Attribute) and (node.attr.startswith("assert") or node.attr == "raises")
    return asserts or isinstance(node, ast.Raise)
