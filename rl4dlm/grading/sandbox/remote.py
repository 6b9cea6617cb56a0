"""Calls between the process that holds a problem's tests and the one that holds the program.

Owns both ends of the channel. What can be said as data is sent as data, so that tests compare values of the builtin
types, whatever the program returns; of anything else a reference is sent, and a `Proxy` stands for it.

A test's expected value must not be judged by the program. A proxy is therefore never equal to data, takes part in no
arithmetic with data, and is searched by looking at its items here. What a function returns, a name in lower case, can
be called and iterated over and no more; what a class makes has attributes, too, but for methods that ask about data.
Two objects of the program are compared by the program: what its classes mean by equality is what such a test asks.
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import operator
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CoroutineType, FunctionType, MethodType
from typing import Any

from rl4dlm.grading.sandbox.data import NotData, decode, encode
from rl4dlm.grading.sandbox.frames import read_frame, write_frame

_MOST = 1 << 22  # bytes of a message
_MOST_OBJECTS = 1 << 16
_MOST_ITEMS = 1 << 13  # of an object of the program among which a test looks for one
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)
# Methods by which data is asked about other data. On an object of the program they would be the program's own verdict.
_VERDICTS = frozenset(("startswith", "endswith", "issubset", "issuperset", "isdisjoint"))
# Types of the standard library that are sent as text, and which text makes them again.
_TEXTS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("datetime", "date"): lambda value: value.isoformat(),
    ("datetime", "datetime"): lambda value: value.isoformat(),
}

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift")
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
_FOR_ALL: dict[str, Callable[..., Any]] = {
    "call": lambda function, *a, **k: function(*a, **k),
    "iter": iter,
    "next": next,
    "len": len,
    "repr": repr,
}
_FOR_OBJECTS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "bool": bool,
    "str": str,
    "hash": hash,
    "int": int,
    "float": float,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    **{name: getattr(operator, name) for name in (*_BINARY, *_COMPARED, "neg", "pos", "abs", "invert")},
}


class Gone(BaseException):
    """The other process has ended, or does not keep to the protocol."""


class Unsendable(BaseException):
    """Tests want to hand over what is no data: they must run beside the program."""


class Refused(Exception):
    """Tests ask an object of the program for what only data may decide."""


class Peer:
    """One end of the channel.

    Args:
        handle: of the stream.
        names: what the other end may call by name; None at the end of the tests, which offers functions alone.
    """

    def __init__(self, handle: int, names: dict[str, Any] | None = None) -> None:
        self.handle, self.names = handle, names
        self.asked = 0  # how often the other end was asked for something
        self.failed: BaseException | None = None  # what ends tests, even those that catch everything
        self.serving = 0
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}  # id of an object -> its place

    def say(self, kind: str, *content: Any) -> None:
        """Sends a message.

        Raises:
            NotData: it is too long or too deep.
        """
        text = encode([kind, *content], _MOST, self._refer)
        try:
            write_frame(self.handle, text)
        except OSError:
            raise self._failure(Gone()) from None

    def _failure(self, failure: BaseException) -> BaseException:
        self.failed = self.failed or failure
        return failure

    def hear(self, full: bool = False) -> list[Any]:
        """The next message.

        Args:
            full: whether proxies in it stand for objects of classes.
        """
        try:
            message = decode(read_frame(self.handle, _MOST), lambda tag, content: self._resolve(tag, content, full))
        except (OSError, EOFError, ValueError):
            raise self._failure(Gone()) from None
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise self._failure(Gone())
        return message

    def ask(self, full: bool, kind: str, *arguments: Any, **named: Any) -> Any:
        """Has the other end do something: what it gave, or raises what it raised. Its own requests come first."""
        if self.failed is not None:
            raise self.failed
        self.asked += 1
        serving, self.serving = self.serving, 0
        try:
            self.say("do", kind, list(arguments), named)
        finally:
            self.serving = serving
        while True:
            head, *content = self.hear(full)
            if head in ("value", "awaited") and len(content) == 2:
                _renew([*arguments, *named.values()], content[1])
                return content[0] if head == "value" else _awaited(content[0])
            if head == "raise" and len(content) == 2:
                raised = _exception(*content)
                if self.names is None and kind != "next" and isinstance(raised, StopIteration | StopAsyncIteration):
                    # It would end the loop of the tests that calls the program.
                    raised = RuntimeError("the program raised StopIteration")
                raise raised
            self.serve([head, *content])

    def serve(self, message: list[Any]) -> None:
        """Does what a request says, and answers."""
        try:
            head, kind, arguments, named = message
            action = self._action(kind) if head == "do" else None
        except (ValueError, TypeError):
            raise self._failure(Gone()) from None
        if action is None:
            raise self._failure(Gone())
        self.serving += 1
        try:
            handed = [*arguments, *named.values()]
            before = encode(handed, _MOST, self._refer)
            result, said = action(*arguments, **named), "value"
            if self.names is not None and type(result) is CoroutineType:
                result, said = importlib.import_module("asyncio").run(result), "awaited"
            renewed = handed if encode(handed, _MOST, self._refer) != before else None
            self.say(said, result, renewed)
        except (Gone, Unsendable, MemoryError):
            raise
        except BaseException as error:
            known = [kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
            try:
                self.say("raise", known, [str(part) if self.names is None else part for part in error.args])
            except NotData:
                self.say("raise", known, [])
        finally:
            self.serving -= 1

    def _action(self, kind: str) -> Callable[..., Any] | None:
        if self.names is None:
            return _call if kind == "call" else None
        if kind == "name":
            names = self.names
            return lambda name, *a, **k: names[name](*a, **k)
        if kind == "constant":
            return self.names.get
        return _FOR_ALL.get(kind) or _FOR_OBJECTS.get(kind)

    def _refer(self, value: Any) -> Any:
        kind = type(value)
        if kind is Proxy or kind is _Callback:
            return {"o": object.__getattribute__(value, "_number")}
        text = _TEXTS.get((kind.__module__, kind.__qualname__))
        if text is not None:
            return {"x": [kind.__module__, kind.__qualname__, text(value)]}
        # What a function of the tests gives the program back is no more than a handle over there. Whether tests must
        # run beside the program is not for the program to choose, by what it calls such a function with.
        if self.names is None and not isinstance(value, _FUNCTIONS) and not self.serving:
            raise self._failure(Unsendable(f"an object of type {kind.__name__} cannot be sent"))
        if id(value) not in self.numbers:
            if len(self.objects) >= _MOST_OBJECTS:
                raise NotData("there are too many objects")
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"r": self.numbers[id(value)]}

    def _resolve(self, tag: str, content: Any, full: bool) -> Any:
        if tag == "x":
            module, name, text = content
            if (module, name) not in _TEXTS or len(text) > 1000:
                raise ValueError
            maker = getattr(importlib.import_module(module), name)
            return getattr(maker, "fromisoformat", maker)(text)
        if type(content) is not int or tag not in ("o", "r"):
            raise ValueError
        if tag == "o":
            return self.objects[content]
        return Proxy(self, content, full) if self.names is None else _Callback(self, content)


def _call(function: Any, *arguments: Any, **named: Any) -> Any:
    """What the program may do with a function of the tests; other things of theirs are not its to call."""
    if not isinstance(function, _FUNCTIONS):
        raise TypeError("this cannot be called")
    return function(*arguments, **named)


def stand_in(peer: Peer, name: str) -> Callable[..., Any]:
    """What tests call in the place of something that the program defines."""
    full = name[:1].isupper()

    def call(*arguments: Any, **named: Any) -> Any:
        return peer.ask(full, "name", name, *arguments, **named)

    call.__name__ = call.__qualname__ = name
    return call


def constants(peer: Peer, names: list[str]) -> dict[str, Any]:
    """Of the names in capitals those that stand for data; the others may be classes of one letter."""
    found = {name: peer.ask(False, "constant", name) for name in names if name.isupper()}
    peer.asked = 0
    return {name: value for name, value in found.items() if value is not None and type(value) is not Proxy}


class _Callback:
    """A function of the tests, in the program's process."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self._number = peer, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask(False, "call", self, *arguments, **named)


class Proxy:
    """An object of the program, in the tests' process."""

    __slots__ = ("_full", "_number", "_peer")

    def __init__(self, peer: Peer, number: int, full: bool) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_full", full)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Proxy
        if name in _VERDICTS:
            raise _refused(self, f"a test asks .{name}() of an object of the program; only data can tell")
        return _ask("getattr", self, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask("call", self, *arguments, **named)

    def __iter__(self) -> Iterator[Any]:
        items = _ask("iter", self)
        while True:
            try:
                item = _ask("next", items)
            except StopIteration:
                return
            yield item

    def __enter__(self) -> Any:
        return _ask("getattr", self, "__enter__")()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _ask("getattr", self, "__exit__")(None, None, None)  # an exception of the tests is no affair of the program's

    def __contains__(self, item: Any) -> bool:
        # All of them are looked at first: among endless items there is every number.
        items = list(itertools.islice(iter(self), _MOST_ITEMS))
        if len(items) == _MOST_ITEMS:
            raise _refused(self, "a test looks for an item among those of an object of the program, which does not end")
        return any(item is other or item == other for other in items)

    def __repr__(self) -> str:
        return str(_ask("repr", self))


def _refused(proxy: Proxy, why: str) -> BaseException:
    peer: Peer = object.__getattribute__(proxy, "_peer")
    return peer._failure(Refused(why))


def _ask(kind: str, proxy: Proxy, *arguments: Any, **named: Any) -> Any:
    full = object.__getattribute__(proxy, "_full")
    if not full and kind not in _FOR_ALL:
        raise _refused(proxy, "a test looks into an object that a function of the program returned; only data can tell")
    return object.__getattribute__(proxy, "_peer").ask(full, kind, proxy, *arguments, **named)


def _method(kind: str) -> Callable[..., Any]:
    return lambda self, *arguments: _ask(kind, self, *arguments)


def _among_objects(kind: str) -> Callable[..., Any]:
    def method(self: Proxy, other: Any) -> Any:
        return _ask(kind, self, other) if type(other) is Proxy else NotImplemented

    return method


for _name in ("next", "len", "setattr", "getitem", "setitem", "delitem", "neg", "pos", "abs", "invert"):
    setattr(Proxy, f"__{_name}__", _method(_name))
for _name in ("bool", "str", "hash", "int", "float"):
    setattr(Proxy, f"__{_name}__", _method(_name))
for _name in (*_BINARY, *_COMPARED):
    setattr(Proxy, f"__{_name.rstrip('_')}__", _among_objects(_name))


async def _awaited(value: Any) -> Any:
    """What a coroutine of the program has given, for tests that wait for it."""
    return value


def _renew(arguments: list[Any], renewed: Any) -> None:
    """Does to the arguments of a call what the program did to its copies."""
    if not isinstance(renewed, list):
        return
    for old, new in zip(arguments, renewed, strict=False):
        if type(old) is not type(new):
            continue
        if isinstance(old, list):
            old[:] = new
        elif isinstance(old, dict | set):
            old.clear()
            old.update(new)


def _exception(names: Any, arguments: Any) -> BaseException:
    """An exception of the nearest builtin type, whatever the program says."""
    for name in names if isinstance(names, list) else []:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, BaseException):
            for given in (arguments, [str(arguments)]):
                try:
                    return kind(*given)
                except Exception:
                    continue
    return RuntimeError("the program raised something that is no exception of Python")
