"""Tests as data sets publish them, source of Python, cut into the tests of a `Problem`.

Owns the reading of that source. Nothing is run here: sources are parsed, literals are read. What is one assertion
becomes one test, so that a program that passes half of them earns half; what cannot be cut stays whole.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Sequence
from typing import Any

from rl4dlm.grading.code.rewrite import rewritten

Test = dict[str, str]

PYTEST = '''
import contextlib, math
class pytest:
    """What tests use of pytest."""
    @staticmethod
    @contextlib.contextmanager
    def raises(kind, match=None):
        try:
            yield
        except kind:
            return
        raise AssertionError("did not raise")
    class approx:
        def __init__(self, wanted, rel=1e-6, abs=1e-12):
            self.wanted, self.rel, self.abs = wanted, rel, abs
        def __eq__(self, found):
            if isinstance(self.wanted, (list, tuple)):
                return len(found) == len(self.wanted) and all(
                    pytest.approx(w, self.rel, self.abs) == f for w, f in zip(self.wanted, found))
            return math.isclose(found, self.wanted, rel_tol=self.rel, abs_tol=self.abs)
'''
"""Stands in the place of `import pytest`, which the sandbox may not have, in tests that are run as a whole."""


def asserts(sources: Sequence[str]) -> list[Test]:
    """A test for each source, such as `assert f(2) == 4`; empty ones are left out."""
    return [{"source": source.strip()} for source in sources if source.strip()]


def check_function(source: str, entry_point: str) -> list[Test]:
    """The tests of HumanEval's `def check(candidate)`.

    With `inputs` and `results` of literals, as EvalPlus writes them, they are calls with expected values. A body of
    assertions gives a test for each of them that asks something of the candidate. Anything else is one test.
    """
    tree = _parsed(source)
    check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None) if tree else None
    if tree is None or check is None:
        return [{"source": f"{source}\ncheck({entry_point})"}]
    pairs = _pairs(check.body, entry_point) or _pairs(tree.body, entry_point)
    if pairs:
        return pairs
    body = [node for node in check.body if not (_is_text(node) or isinstance(node, ast.Pass))]
    helpers = [node for node in tree.body if node is not check and not _is_metadata(node)]
    if body and not helpers and all(isinstance(node, ast.Assert) for node in body):
        candidate = check.args.args[0].arg if check.args.args else "candidate"
        renamed = [ast.unparse(_Rename(candidate, entry_point).visit(node)) for node in body if _names(node, candidate)]
        if renamed:
            return asserts(renamed)
    return [{"source": f"{source}\ncheck({entry_point})"}]


def inputs_and_results(source: str, entry_point: str) -> list[Test]:
    """The tests of MBPP+, which lie outside of a function: calls with expected values, or one test."""
    tree = _parsed(source)
    return (_pairs(tree.body, entry_point) if tree else []) or [{"source": source}]


def pytest_functions(source: str) -> list[Test]:
    """The tests of KodCode: functions `test_…`, with everything else in the file before each of them.

    A function of assertions alone gives a test for each; so do methods of test classes. `pytest.mark.parametrize` with
    literals gives one for each of its rows. Functions that need fixtures cannot be run without pytest and are left out,
    as is a file that does not parse.
    """
    tree = _parsed(source)
    if tree is None:
        return []
    shared: list[str] = []
    functions: list[ast.FunctionDef] = []
    classes: list[ast.ClassDef] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            functions.append(node)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            classes.append(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "solution":
            continue
        elif isinstance(node, ast.Import) and any(alias.name in ("pytest", "solution") for alias in node.names):
            shared += [f"import {a.name}" for a in node.names if a.name != "solution" and not a.asname]
        elif not _is_main(node):
            shared.append(ast.unparse(node))
    before = "\n".join(shared)
    tests = [test for node in functions for test in _of_function(node, before)]
    return tests + [test for node in classes for test in _of_class(node, before)]


def entry_point_of(sources: Sequence[str]) -> str | None:
    """The function that assertions call: the first call in them of something that is no builtin."""
    for source in sources:
        tree = _parsed(source)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id):
                return node.func.id
    return None


def signature_of(source: str, entry_point: str | None) -> str:
    """`f(a, b)` of the function in a program; empty where there is none."""
    tree = _parsed(source)
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            return f"{node.name}({ast.unparse(node.args)})"
    return ""


def before_function(source: str, entry_point: str) -> str:
    """What a prompt of source has before its function: imports and helpers."""
    tree = _parsed(source) or _parsed(f"{source}\n    pass\n")
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(source.splitlines()[: first - 1]).strip()
    return ""


def docstring_of(source: str, entry_point: str) -> str:
    """The docstring of a prompt's function, up to its examples; the whole source where there is none."""
    tree = _parsed(source) or _parsed(f"{source}\n    pass\n")
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef) and node.name == entry_point and ast.get_docstring(node):
            return (ast.get_docstring(node) or "").partition(">>>")[0].strip() or source
    return source


def _of_function(node: ast.FunctionDef, before: str) -> list[Test]:
    calls = _calls(node)
    if calls is None:
        return []
    body = [statement for statement in node.body if not _is_text(statement)]
    if calls == [f"{node.name}()"] and body and all(isinstance(statement, ast.Assert) for statement in body):
        head = f"{before}\n" if before else ""
        return [_whole(f"{head}{ast.unparse(statement)}") for statement in body]
    bare = ast.FunctionDef(
        node.name, node.args, node.body, [], node.returns, node.type_comment, lineno=node.lineno, col_offset=0
    )
    source = "\n".join(part for part in (before, ast.unparse(bare)) if part)
    return [_whole(f"{source}\n{call}") for call in calls]


def _whole(source: str) -> Test:
    """A test as it is where values can be compared outside; else it must not need pytest itself."""
    if "import pytest\n" in source and rewritten(source) is None:
        source = source.replace("import pytest\n", PYTEST.lstrip("\n"), 1)
    return {"source": source}


def _of_class(node: ast.ClassDef, before: str) -> list[Test]:
    """Methods that do not need their object are functions; of the others each is called on a new one."""
    found: list[Test] = []
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or not method.name.startswith("test") or not method.args.args:
            continue
        own = method.args.args[0].arg
        bare = ast.FunctionDef(
            method.name, ast.arguments([], method.args.args[1:], None, [], [], None, []), method.body,
            method.decorator_list, None, None, lineno=method.lineno, col_offset=0,
        )  # fmt: skip
        if not any(_names(statement, own) for statement in method.body):
            found += _of_function(bare, before)
        elif not node.bases and _calls(bare) == [f"{method.name}()"]:
            source = "\n".join(part for part in (before, ast.unparse(node)) if part)
            found.append(_whole(f"{source}\n{node.name}().{method.name}()"))
    return found


def _calls(node: ast.FunctionDef) -> list[str] | None:
    """How to call a test function, once for each row of `parametrize`; None: it needs what only pytest can give."""
    rows: list[dict[str, Any]] = [{}]
    for decorator in node.decorator_list:
        marked = isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize"
        if not (isinstance(decorator, ast.Call) and marked and len(decorator.args) >= 2):
            return None
        try:
            names, values = map(ast.literal_eval, decorator.args[:2])
        except ValueError:
            return None
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        given = [dict(zip(names, value if len(names) > 1 else (value,), strict=False)) for value in values]
        rows = [{**row, **more} for row in rows for more in given]
    needed = {argument.arg for argument in node.args.args}
    if any(set(row) != needed for row in rows):
        return None
    names = [argument.arg for argument in node.args.args]
    return [f"{node.name}({', '.join(repr(row[name]) for name in names)})" for row in rows]


def _pairs(body: Sequence[ast.stmt], entry_point: str) -> list[Test]:
    """Calls and expected values from literal lists `inputs` and `results`; nothing where they are not there."""
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    inputs, results = found.get("inputs"), found.get("results")
    if not isinstance(inputs, list) or not isinstance(results, list) or len(inputs) != len(results) or not inputs:
        return []
    return [
        {"call": f"{entry_point}({', '.join(map(repr, given))})", "expected": repr(wanted), **_tolerance(wanted)}
        for given, wanted in zip(inputs, results, strict=True)
    ]


def _tolerance(wanted: Any) -> Test:
    """What EvalPlus allows where a float is expected, or a list or tuple of them."""
    floats = wanted if isinstance(wanted, list | tuple) else [wanted]
    return {"tolerance": "1e-6"} if floats and all(isinstance(value, float) for value in floats) else {}


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _names(node: ast.AST, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_metadata(node: ast.stmt) -> bool:
    return _is_text(node) or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METADATA")


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


class _Rename(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.new, node.ctx) if node.id == self.old else node
