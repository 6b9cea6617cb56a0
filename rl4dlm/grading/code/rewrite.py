"""Turns tests that are given as source into calls, whose values are compared outside the program's process.

Owns which tests can be turned and how: asserts about calls, one after the other, also with variables, a loop over
literals, or an exception that is expected. What such a test does runs in the program's process as one expression; what
it claims is worked out here, from the values that come back (`rl4dlm.grading.code.evaluate`). What is expected never
goes there: a function can read the constants of the code that calls it.

Nothing of Python's own that a test uses on a program's value, such as `sorted` or `==`, is left to the program's
process, where it could be another. A test that needs more is not turned, see `rewritten`.
"""

from __future__ import annotations

import ast
import copy
from typing import Any, NamedTuple

from rl4dlm.grading.code.evaluate import METHODS, CannotEvaluateError, called, evaluate, is_within
from rl4dlm.grading.code.known import refuse_work, with_results, worked_out
from rl4dlm.grading.code.objects import shown_by_use
from rl4dlm.grading.code.parse import parse, parse_expression
from rl4dlm.grading.code.scorable import SOLUTION_MODULES, can_fail
from rl4dlm.grading.code.source import (
    BUILTINS,
    MOST_STATEMENTS,
    CannotRewriteError,
    bound_within,
    expected_error,
    expected_first,
    implied_modules,
    is_immutable,
    is_print,
    straight_line,
)

_COPY = "_copy_of"  # the name of a function in the program's process; no test is expected to use it


class Claim(NamedTuple):
    """What an assert says.

    Attributes:
        expression: true where it holds; values that come back have the names in `holes`.
        holes: name -> place among `Rewritten.values`.
        known: name -> value of what the test itself has worked out.
    """

    expression: ast.expr
    holes: dict[str, int]
    known: dict[str, Any]


class Raises(NamedTuple):
    """An expression that has to raise one of these exceptions."""

    expression: str
    exceptions: tuple[str, ...]
    text: str | None = None  # which the message has to contain


class Rewritten(NamedTuple):
    """A test as data.

    Attributes:
        expression: what the program's process evaluates, to a list. None where the test is about exceptions alone.
        values: places in this list of the values that the claims are about.
        claims: what has to hold of these values.
        raises: expressions of their own, each of which has to raise.
    """

    expression: str | None
    values: tuple[int, ...]
    claims: tuple[Claim, ...]
    raises: tuple[Raises, ...]


def rewritten(source: str, entry_point: str | None = None, trusted: frozenset[str] = frozenset()) -> Rewritten | None:
    """A test in the form of calls and claims; None where it cannot be brought into it.

    Args:
        source: asserts, or test functions with or without the call of them. `check(candidate)` is called with the entry
            point.
        entry_point: the function that is asked for.
        trusted: names that the problem's own setup defines. A test that uses one is not turned: what a program has
            redefined must not be believed.
    """
    tree = parse(source)
    if tree is None:
        return None
    try:
        body = straight_line(tree, entry_point)
        test = _Test(trusted, shown_by_use(tree))
        test.modules.update({name: f"__import__({name!r})" for name in implied_modules(tree)})
        test.run(body)
        return test.finished()
    except (CannotRewriteError, RecursionError):
        return None


class _Test:
    """Goes through the statements of one test, and keeps what each of its variables is."""

    def __init__(self, trusted: frozenset[str], used_as_objects: frozenset[str]) -> None:
        self.trusted = trusted
        self.used_as_objects = used_as_objects  # variables; of these, what a call of the program has made is an object
        self.known: dict[str, Any] = {}  # worked out here, and not by the program
        self.literals: dict[str, ast.expr] = {}  # of `known`: what the program's process is told, if it has to be
        self.inside: set[str] = set()  # variables that the program's process has
        self.objects: set[str] = set()  # of these: what a class of the program has made
        self.handed_over: set[str] = set()  # of `known`: what the program was given and can change
        self.modules: dict[str, str] = {}  # name -> the expression that imports it
        self.done: list[str] = []  # expressions for the program's process, in order
        self.values: list[int] = []  # places in `done` that are values
        self.claims: list[Claim] = []
        self.raises: list[Raises] = []
        self.statements = 0

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.statements += 1
            if self.statements > MOST_STATEMENTS:
                raise CannotRewriteError
            self._statement(statement)
            # After this statement the program may have changed them. Within it `f(xs) == sorted(xs)` means the numbers
            # that were handed over: a program that empties its list and returns it has sorted nothing.
            for name in self.handed_over & self.known.keys():
                del self.known[name]
            self.handed_over.clear()

    def finished(self) -> Rewritten:
        if not self.claims and not self.raises:
            raise CannotRewriteError  # a test that says nothing of the program is not judged by nothing
        if not self.done:
            return Rewritten(None, (), (), tuple(self.raises))
        # What comes back is what a value was when the assert looked at it, not what was made of it later.
        changing = {place for place in self.values if place < len(self.done) - 1}
        items = [f"{_COPY}({text})" if place in changing else text for place, text in enumerate(self.done)]
        if changing:
            items.insert(0, f"({_COPY} := __import__('copy').deepcopy)")
        places = tuple(place + bool(changing) for place in self.values)
        return Rewritten(self._listed_items(items, places), places, tuple(self.claims), tuple(self.raises))

    def _listed_items(self, items: list[str], values: tuple[int, ...]) -> str:
        """A list of the values, with None in the place of the rest. A lambda keeps its variables from the program's."""
        texts = [text if place in values else f"({text}, None)[1]" for place, text in enumerate(items)]
        listed = f"[{', '.join(texts)}]"
        return f"(lambda: {listed})()" if ":=" in listed else listed

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assert():
                self._claim(node.test)
            case ast.Assign() if len(node.targets) == 1:
                self._assign(node.targets[0], node.value)
            case ast.AnnAssign() if node.value is not None:
                self._assign(node.target, node.value)
            case ast.Expr() if isinstance(node.value, ast.Constant):
                pass  # a docstring
            case ast.Expr() if isinstance(node.value, ast.Call) and is_print(node.value):
                pass
            case ast.Expr():
                self._do(node.value)
            case ast.Import() | ast.ImportFrom():
                self._import(node)
            case ast.For():
                self._loop(node)
            case ast.With() | ast.Try():
                self._raise(*expected_error(node))
            case ast.Pass():
                pass
            case _:
                raise CannotRewriteError

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            module = node.module if isinstance(node, ast.ImportFrom) else alias.name
            if module in SOLUTION_MODULES or module == "typing":
                if alias.asname not in (None, alias.name) or (isinstance(node, ast.Import) and module != "typing"):
                    raise CannotRewriteError
            elif module is None or "." in module or alias.name == "*":
                raise CannotRewriteError
            elif isinstance(node, ast.Import):
                self.modules[name] = f"__import__({module!r})"
            else:
                self.modules[name] = f"__import__({module!r}).{alias.name}"

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
                if any(not isinstance(part, ast.Name) for part in target.elts):
                    raise CannotRewriteError
                names = {part.id for part in target.elts if isinstance(part, ast.Name)}
                if names & {part.id for part in ast.walk(value) if isinstance(part, ast.Name)}:
                    raise CannotRewriteError  # a swap
                for part, item in zip(target.elts, value.elts, strict=True):
                    self._assign(part, item)
                return
            raise CannotRewriteError
        if not isinstance(target, ast.Name) or target.id in self.trusted:
            raise CannotRewriteError
        name = target.id
        if not self._about_program(value):
            # Worked out here or not at all: what it gives may be what is expected, and in the program's process a
            # function could read it, or have replaced what makes it.
            self.known[name], self.literals[name] = worked_out(value, self.known)
            self.inside.discard(name)
            self.objects.discard(name)
            return
        if not self._makes_object(value) and not self._is_value(value):
            raise CannotRewriteError  # `right = f(2) == 4`, which the program's process would decide
        text = self._told(value)
        self.done.append(f"({name} := {text})")
        self.known.pop(name, None)
        self.inside.add(name)
        self.objects.discard(name)
        called_program = isinstance(value, ast.Call) and isinstance(value.func, ast.Name)
        if self._makes_object(value) or (called_program and name in self.used_as_objects):
            self.objects.add(name)

    def _do(self, value: ast.expr) -> None:
        if not self._about_program(value) or not isinstance(value, ast.Call):
            raise CannotRewriteError
        self.done.append(self._told(value))

    def _loop(self, node: ast.For) -> None:
        if node.orelse:
            raise CannotRewriteError
        rows = node.iter.elts if isinstance(node.iter, ast.List | ast.Tuple) else self._worked_out(node.iter)
        for row in rows:
            if isinstance(row, ast.Starred):
                raise CannotRewriteError
            self._assign(node.target, row)
            self.run(node.body)

    def _worked_out(self, rows: ast.expr) -> list[ast.expr]:
        """The literals that a loop goes through, such as `range(5)` or a variable of the test's."""
        if self._about_program(rows) or not is_within(rows, set(self.known)):
            raise CannotRewriteError
        try:
            items = list(evaluate(rows, self.known))
        except (CannotEvaluateError, TypeError, RecursionError):
            raise CannotRewriteError from None
        literals = [parse_expression(repr(item)) for item in items[: MOST_STATEMENTS + 1]]
        if any(literal is None or not is_within(literal, set()) for literal in literals):
            raise CannotRewriteError
        return [literal for literal in literals if literal is not None]

    def _raise(self, body: list[ast.stmt], kind: ast.expr, text: str | None) -> None:
        kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        if len(body) != 1 or not isinstance(body[0], ast.Expr | ast.Assign):
            raise CannotRewriteError
        value = body[0].value
        if not self._about_program(value):
            raise CannotRewriteError
        # What came before is done again, in a process of its own; that it does not raise is told by the others. The
        # form is that of a value, so that the program cannot see that it should raise. It has to define its names.
        told = self._told(value)
        expression = self._listed_items([*self.done, told], (len(self.done),))
        for part in ast.walk(value):
            if isinstance(part, ast.Name) and part.id not in bound_within(value) and self._is_program(part.id):
                self.done.append(f"({part.id}, None)[1]")
        names = tuple(ast.unparse(each).rpartition(".")[2] for each in kinds)
        self.raises.append(Raises(expression, names, text))

    # --- what an expression is --------------------------------------------------------------------------------------

    def _about_program(self, node: ast.expr) -> bool:
        """Whether an expression uses the program, or a variable that its process has."""
        own = bound_within(node)
        return any(
            isinstance(part, ast.Name) and part.id not in own and (self._is_live(part.id) or self._is_program(part.id))
            for part in ast.walk(node)
        )

    def _is_live(self, name: str) -> bool:
        """Whether a variable's value is known to the program's process alone."""
        return name in self.inside and name not in self.known and name not in self.modules

    def _is_program(self, name: str) -> bool:
        local = name in self.known or name in self.inside or name in self.modules
        if not local and name in self.trusted:
            raise CannotRewriteError
        return not local and name not in BUILTINS and name not in ("pytest", "math")

    def _makes_object(self, node: ast.expr) -> bool:
        """Whether an expression is a call of a class of the program, which by custom has a capital letter."""
        return isinstance(node, ast.Call) and self._is_class(node.func)

    def _told(self, node: ast.expr) -> str:
        """The text of an expression for the program's process, after what it needs has been told it."""
        own = bound_within(node)
        refuse_work(node, self._about_program, self.known)
        node = with_results(node, own, self.known)
        for part in ast.walk(node):
            if isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
                raise CannotRewriteError
            if not isinstance(part, ast.Name):
                continue
            if part.id in own:
                if part.id in self.known or part.id in self.inside:
                    raise CannotRewriteError
                continue
            if part.id in self.known and part.id not in self.inside:
                self.done.append(f"({part.id} := {ast.unparse(self.literals[part.id])})")
                self.inside.add(part.id)
                if not is_immutable(self.known[part.id]):
                    self.handed_over.add(part.id)
            elif part.id in self.modules and part.id not in self.inside:
                self.done.append(f"({part.id} := {self.modules[part.id]})")
                self.inside.add(part.id)
            elif part.id == "math" and "math" not in self.inside:
                raise CannotRewriteError
        return ast.unparse(node)

    # --- what an assert claims --------------------------------------------------------------------------------------

    def _claim(self, test: ast.expr) -> None:
        if not can_fail(ast.Assert(test)):
            return  # HumanEval has `assert True, "..."`
        holes: dict[str, int] = {}
        test = copy.deepcopy(test)
        if isinstance(test, ast.Compare):
            expected_first(test, self._calls_program)
        expression = self._outside(test, holes, certain=True)
        known = {
            part.id: self.known[part.id]
            for part in ast.walk(expression)
            if isinstance(part, ast.Name) and part.id in self.known
        }
        if not holes or not is_within(expression, {*holes, *known}):
            raise CannotRewriteError
        self.claims.append(Claim(expression, holes, known))

    def _calls_program(self, node: ast.expr) -> bool:
        return any(isinstance(part, ast.Name) and self._is_program(part.id) for part in ast.walk(node))

    def _hole(self, node: ast.expr, holes: dict[str, int]) -> ast.expr:
        text = self._told(node)
        name = f"value {len(self.values)}"  # which is no name that a test may have
        holes[name] = len(self.values)
        self.values.append(len(self.done))
        self.done.append(text)
        return ast.Name(name, ast.Load())

    def _outside(self, node: ast.expr, holes: dict[str, int], certain: bool) -> ast.expr:
        """The expression with holes in the places of what comes from the program.

        Args:
            node: a part of an assert.
            holes: of this assert, to be added to.
            certain: whether Python always evaluates this part.
        """
        if not self._about_program(node):
            return node
        if self._is_value(node):
            if not certain and not isinstance(node, ast.Name | ast.Call):
                raise CannotRewriteError  # `x is None or x.value == 3`
            return self._hole(node, holes)
        match node:
            case ast.BoolOp():
                node.values = [self._outside(v, holes, certain and n == 0) for n, v in enumerate(node.values)]
            case ast.Compare():
                node.left = self._outside(node.left, holes, certain)
                node.comparators = [self._outside(v, holes, certain and n == 0) for n, v in enumerate(node.comparators)]
                self._check_identity(node, holes)
            case ast.UnaryOp():
                node.operand = self._outside(node.operand, holes, certain)
            case ast.BinOp():
                node.left, node.right = (self._outside(v, holes, certain) for v in (node.left, node.right))
            case ast.Subscript():
                node.value = self._outside(node.value, holes, certain)
                node.slice = self._outside(node.slice, holes, certain)
            case ast.Tuple() | ast.List() | ast.Set():
                node.elts = [self._outside(v, holes, certain) for v in node.elts]
            case ast.Call():
                if node.keywords and any(self._about_program(keyword.value) for keyword in node.keywords):
                    raise CannotRewriteError
                if called(node) == "len" and len(node.args) == 1 and self._is_object(node.args[0]):
                    length = ast.Call(ast.Attribute(node.args[0], "__len__", ast.Load()), [], [])
                    return self._hole(length, holes)
                if isinstance(node.func, ast.Attribute) and called(node) is None:
                    node.func.value = self._outside(node.func.value, holes, certain)
                node.args = [self._outside(self._listed(node, v), holes, certain) for v in node.args]
            case _:
                raise CannotRewriteError
        return node

    def _listed(self, call: ast.Call, argument: ast.expr) -> ast.expr:
        """`[*f(x)]` for the f(x) of `sorted(f(x))`, since a generator does not come back as data."""
        if called(call) in ("list", "sorted", "tuple", "set", "frozenset", "sum", "all", "any") and self._is_value(
            argument
        ):
            self._refuse_object(argument)
            return ast.List([ast.Starred(argument, ast.Load())], ast.Load())
        return argument

    def _check_identity(self, node: ast.Compare, holes: dict[str, int]) -> None:
        """Which object something is, is not told by its value: only `is None`, `is True` and the like are."""
        sides = [node.left, *node.comparators]
        for place, operation in enumerate(node.ops):
            both = all(isinstance(side, ast.Name) and side.id in holes for side in sides[place : place + 2])
            if isinstance(operation, ast.Is | ast.IsNot) and both:
                raise CannotRewriteError

    def _is_value(self, node: ast.expr) -> bool:
        """Whether an expression is something that the program answers, rather than a question about its answer."""
        match node:
            case ast.Name():
                self._refuse_object(node)
                if self._is_live(node.id):
                    return True
                if self._is_class(node) and not node.id.isupper():
                    raise CannotRewriteError  # a class is no data
                return self._is_program(node.id)
            case ast.List() if len(node.elts) == 1 and isinstance(node.elts[0], ast.Starred):
                return self._is_value(node.elts[0].value)
            case ast.Call():
                self._refuse_object(node)
                if isinstance(node.func, ast.Name):
                    return self._is_program(node.func.id) or self._is_live(node.func.id)
                if isinstance(node.func, ast.Attribute):
                    if node.func.attr in METHODS and not self._is_object(node.func.value):
                        return False
                    owner = node.func.value
                    return self._is_object(owner) or self._is_class(owner) or self._is_value(owner)
                return False
            case ast.Attribute() if self._is_class(node.value):
                raise CannotRewriteError  # a member of an enumeration, which is no data
            case ast.Attribute() | ast.Subscript():
                return self._is_object(node.value) or self._is_value(node.value)
            case _:
                return False

    def _is_object(self, node: ast.expr) -> bool:
        return (isinstance(node, ast.Name) and node.id in self.objects) or self._makes_object(node)

    def _is_class(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id[:1].isupper() and self._is_program(node.id)

    def _refuse_object(self, node: ast.expr) -> None:
        if self._is_object(node):
            raise CannotRewriteError  # an object of the program's is no data
