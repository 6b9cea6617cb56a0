"""Scaffolds: canvases that are written in part, from a JSON schema or a template (S³, arXiv 2507.04504).

What the schema says is given, what it leaves open are slots: a fixed number of tokens for each value, in which only
tokens of its type may be drawn. `Scaffold` has what `RolloutEngine.generate` takes, and reads a finished canvas back as
JSON. With `language` as constraint, the canvas itself spells JSON of that schema, too; without it only `read` promises
that, because slots are drawn independently of each other.

Shorter values need something to fill their slots: a space behind numbers and options, and within strings a marker that
the model is told about, which stands for an absent value, too.

Differences from the released code, where a slot may hold quotes, which breaks the JSON: tokens are restricted by type,
values may be nested and of any JSON type, and reading never fails.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl4dlm.rollout.constraints.automata import Automaton, any_of, literal, one_of, repeat, sequence, sized
from rl4dlm.rollout.constraints.readers import (
    DIGITS_PER_TOKEN,
    MAX_DIGITS,
    ArrayReader,
    NumberReader,
    ObjectReader,
    OptionsReader,
    Reader,
    TextReader,
)

ANNOTATIONS = frozenset({"$schema", "$id", "$comment", "title", "description", "default", "examples"})
KEYWORDS = {
    "object": frozenset({"type", "properties", "required", "additionalProperties"}),
    "array": frozenset({"type", "items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"type"}),
    "integer": frozenset({"type"}),
    "number": frozenset({"type"}),
    "boolean": frozenset({"type"}),
    "null": frozenset({"type"}),
    "options": frozenset({"type", "enum", "const"}),
}
"""What a schema of each kind may say besides annotations."""
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@dataclass(frozen=True, eq=False)
class Scaffold:
    """A canvas whose structure is written.

    Args:
        hints: canvas offset -> token that is given.
        choices: canvas offset -> tokens that may be drawn there, for the slots that are open.
        language: the canvases that spell what the schema says.
        canvas_length: in tokens.
        reader: makes the value of a finished canvas.
        instruction: what to tell a model about the answer, in words.
    """

    hints: dict[int, int]
    choices: dict[int, frozenset[int]]
    language: Automaton
    canvas_length: int
    reader: Reader
    instruction: str

    def value(self, canvas: Sequence[int]) -> Any:
        """The value that a finished canvas stands for, of the types of the schema; never fails.

        Args:
            canvas: `canvas_length` token ids or more.
        """
        if len(canvas) < self.canvas_length:
            raise ValueError(f"canvas has {len(canvas)} tokens; the scaffold has {self.canvas_length}")
        return self.reader.value([int(token) for token in canvas])

    def read(self, canvas: Sequence[int]) -> str:
        """The same as JSON text, which `json.loads` takes."""
        return json.dumps(self.value(canvas), ensure_ascii=False)

    def filled(self, canvas_length: int, token: int) -> Scaffold:
        """The same on a longer canvas, whose further slots are given: the end-of-sequence token, as a rule. With it
        scaffolds of different length can be decoded together.

        Raises:
            ValueError: the canvas is too short.
        """
        more = canvas_length - self.canvas_length
        if more < 0:
            raise ValueError(
                f"canvas_length={canvas_length} is not allowed; the scaffold has {self.canvas_length} tokens"
            )
        hints = {**self.hints, **dict.fromkeys(range(self.canvas_length, canvas_length), token)}
        language = sequence(self.language, literal([token] * more))
        return Scaffold(hints, self.choices, language, canvas_length, self.reader, self.instruction)


class Scaffolder:
    """Makes scaffolds for one tokenizer; what its tokens spell is looked up once.

    Args:
        tokenizer: of the model.
        null_marker: text that fills the slots a string does not need, and stands for its absence when there is nothing
            else. A single token serves best; choose one that no value contains.
        slots: tokens of a string. digits: tokens of an integer, and of a number with its point; a sign comes on top.

    Raises:
        ValueError: the marker would break a JSON string, or a number is out of range.
    """

    def __init__(self, tokenizer: Any, *, null_marker: str = "<none>", slots: int = 16, digits: int = 8) -> None:
        if not null_marker.strip() or any(not _fits_string(character) for character in null_marker):
            raise ValueError(f"null_marker={null_marker!r} is not allowed; it must be text without quotes or backslash")
        _check_slots("slots", slots)
        _check_slots("digits", digits, MAX_DIGITS)
        self.tokenizer, self.null_marker, self.slots, self.digits = tokenizer, null_marker, slots, digits
        self.texts = _token_texts(tokenizer)
        self.all = frozenset(self.texts)
        self.string = self._tokens(lambda text: all(_fits_string(character) for character in text))
        self.digit = self._tokens(_is_digits)
        self.lead = self._tokens(lambda text: _is_digits(text) and text[0] != "0")

    def json(
        self,
        schema: Mapping[str, Any],
        *,
        budgets: Mapping[str, int] | None = None,
        before: str = "",
        after: str = "",
    ) -> Scaffold:
        """A scaffold for JSON text of a schema.

        Objects have all their properties, in order; arrays have a fixed number of items; `enum` and `const` are any
        JSON values; `["string", "null"]` and the like allow null.

        Args:
            schema: with the keywords type, properties, required, additionalProperties, items, prefixItems, minItems,
                maxItems, enum, const and annotations.
            budgets: tokens of single values by path (`"address.city"`, `"tags.0"`), instead of `slots` and `digits`.
            before, after: text around the JSON, such as a code fence.

        Raises:
            ValueError: names the path and the keyword that is not supported, or what the tokenizer lacks.
        """
        work = _Work(self, dict(budgets or {}))
        work.text(before)
        reader = work.node(schema, "")
        work.text(after)
        if work.budgets:
            raise ValueError(f"budgets has paths {sorted(work.budgets)} that are no strings or numbers of the schema")
        absent = f" Write {self.null_marker} in a string that is not known." if work.strings else ""
        return work.scaffold(
            reader, f"Answer with JSON of this schema: {json.dumps(schema, ensure_ascii=False)}{absent}"
        )

    def template(self, template: str, *, budgets: Mapping[str, int] | None = None) -> Scaffold:
        """A scaffold for text with open places, `"Dear {name}, you are {age:2} years old."`.

        What is read back is an object with a string for each name.

        Args:
            template: `{name}` is a place of `slots` tokens, `{name:8}` one of 8; braces are written `{{` and `}}`.
            budgets: tokens of places by name.

        Raises:
            ValueError: a place has no name, one that is taken, or a bad number.
        """
        work = _Work(self, dict(budgets or {}))
        readers: dict[str, Reader] = {}
        for text, name, size, conversion in string.Formatter().parse(template):
            work.text(text)
            if name is None:
                continue
            if not name.isidentifier() or name in readers or conversion:
                raise ValueError(
                    f"template has a place named {name!r}; names are different identifiers, as in {{name}}"
                )
            if size and not size.isdecimal():
                raise ValueError(f"template has size {size!r} for {name!r}; it must be a number of tokens")
            readers[name] = work.free(name, self.all, int(size) if size else self.slots)
        if work.budgets:
            raise ValueError(f"budgets has names {sorted(work.budgets)} that are no places of the template")
        return work.scaffold(ObjectReader(readers), f"Complete this text: {template}")

    def encoded(self, text: str) -> list[int]:
        """Tokens of a piece of text. Raises ValueError where they do not spell it."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        spelled = self.decoded(tokens)
        if "".join(spelled.split()) != "".join(text.split()):
            raise ValueError(f"the tokenizer cannot write {text!r}; it makes {spelled!r} of it")
        return [int(token) for token in tokens]

    def decoded(self, tokens: Iterable[int]) -> str:
        """What tokens spell; special and unknown ones are left out."""
        known = [token for token in tokens if token in self.texts]
        text: str = self.tokenizer.decode(known, clean_up_tokenization_spaces=False)
        return text

    def spelling(self, text: str) -> int:
        """The token that spells a text exactly; the first of several. Raises ValueError if there is none."""
        found = [token for token, spelled in self.texts.items() if spelled == text]
        if not found:
            raise ValueError(f"the tokenizer has no token for {text!r}, which numbers and options need")
        return min(found)

    def _tokens(self, fits: Callable[[str], bool]) -> frozenset[int]:
        return frozenset(token for token, text in self.texts.items() if text and fits(text))


@dataclass
class _Work:
    """A scaffold being made: what has been laid out so far."""

    tools: Scaffolder
    budgets: dict[str, int]
    parts: list[Automaton] = field(default_factory=list)
    length: int = 0
    strings: int = 0

    def text(self, text: str) -> None:
        """Given text."""
        if text:
            tokens = self.tools.encoded(text)
            self.add(literal(tokens), len(tokens))

    def add(self, part: Automaton, length: int) -> slice:
        """Slots for a language whose strings have that length; returns where they are."""
        self.parts.append(part)
        self.length += length
        return slice(self.length - length, self.length)

    def budget(self, path: str, default: int, limit: int | None = None) -> int:
        size = self.budgets.pop(path, default)
        _check_slots(f"budgets[{path!r}]", size, limit)
        return size

    def scaffold(self, reader: Reader, instruction: str) -> Scaffold:
        language = sequence(*self.parts)
        possible = language.choices(self.length)
        return Scaffold(
            hints={slot: next(iter(tokens)) for slot, tokens in possible.items() if len(tokens) == 1},
            choices={slot: tokens for slot, tokens in possible.items() if len(tokens) > 1},
            language=language,
            canvas_length=self.length,
            reader=reader,
            instruction=instruction,
        )

    # --- values -----------------------------------------------------------------------------------------------------

    def node(self, schema: Any, path: str) -> Reader:
        """Lays out the value of a schema."""
        if not isinstance(schema, Mapping):
            raise ValueError(f"{_at(path)} is {schema!r}; a schema is a mapping")
        if "enum" in schema or "const" in schema:
            return self.options(schema, path)
        kind, nullable = _type(schema, path)
        _check_keywords(schema, kind, path)
        if kind == "object":
            return self.object(schema, path, nullable)
        if kind == "array":
            return self.array(schema, path, nullable)
        if kind == "string":
            return self.quoted(path, nullable)
        if kind in ("integer", "number"):
            return self.number(path, kind == "number", nullable)
        values: list[Any] = [True, False] if kind == "boolean" else []
        return self.one_of(values + [None] * (nullable or kind == "null"))

    def object(self, schema: Mapping[str, Any], path: str, nullable: bool) -> Reader:
        _refuse_null("object", nullable, path)
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping):
            raise ValueError(f"{_at(path)} has properties={properties!r}; it must be a mapping")
        missing = [name for name in schema.get("required", ()) if name not in properties]
        if missing:
            raise ValueError(f"{_at(path)} requires {missing}, which are not among its properties")
        if not isinstance(schema.get("additionalProperties", False), bool):
            raise ValueError(
                f"{_at(path)} has a schema for additionalProperties, which is not supported; name them all"
            )
        readers: dict[str, Reader] = {}
        self.text("{")
        for i, (name, child) in enumerate(properties.items()):
            self.text(f"{', ' if i else ''}{json.dumps(name, ensure_ascii=False)}: ")
            readers[name] = self.node(child, _join(path, name))
        self.text("}")
        return ObjectReader(readers)

    def array(self, schema: Mapping[str, Any], path: str, nullable: bool) -> Reader:
        _refuse_null("array", nullable, path)
        self.text("[")
        readers = []
        for i, child in enumerate(_items(schema, path)):
            self.text(", " if i else "")
            readers.append(self.node(child, _join(path, str(i))))
        self.text("]")
        return ArrayReader(readers)

    def quoted(self, path: str, nullable: bool) -> Reader:
        self.text('"')
        self.strings += 1
        reader = self.free(path, self.tools.string, self.tools.slots, nullable)
        self.text('"')
        return reader

    def free(self, path: str, tokens: frozenset[int], default: int, nullable: bool = False) -> TextReader:
        size = self.budget(path, default)
        part = repeat(one_of(tokens), size, size)
        return TextReader(self.add(part, size), self.tools.decoded, self.tools.null_marker, nullable)

    def number(self, path: str, fraction: bool, nullable: bool) -> Reader:
        """A sign or a space, digits, a point and more of them if it is a fraction, and spaces."""
        tools = self.tools
        size = self.budget(path, tools.digits, MAX_DIGITS) + 1
        null = tools.encoded("null") if nullable else []
        size = max(size, len(null))
        if not tools.lead:
            raise ValueError("the tokenizer has no tokens of digits, which numbers need")
        space, digits = one_of({tools.spelling(" ")}), one_of(tools.digit)
        part = any_of(one_of({tools.spelling("0")}), sequence(one_of(tools.lead), repeat(digits)))
        if fraction:
            part = sequence(part, repeat(sequence(one_of({tools.spelling(".")}), repeat(digits, 1)), 0, 1))
        part = sequence(any_of(one_of({tools.spelling("-")}), space), part, repeat(space))
        if nullable:
            part = any_of(part, sequence(literal(null), repeat(space)))
        return NumberReader(self.add(sized(part, size), size), tools.decoded, fraction, nullable)

    def options(self, schema: Mapping[str, Any], path: str) -> Reader:
        _check_keywords(schema, "options", path)
        values = list(schema["enum"]) if "enum" in schema else [schema["const"]]
        if "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        if "type" in schema:
            kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            values = [value for value in values if any(_is_of(value, kind) for kind in kinds)]
        if not values:
            raise ValueError(f"{_at(path)} allows no value: enum, const and type leave nothing")
        return self.one_of(values)

    def one_of(self, values: list[Any]) -> Reader:
        """One of several JSON values; spaces follow the shorter ones."""
        texts = [json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values]
        spelled = [self.tools.encoded(text) for text in texts]
        size = max(len(tokens) for tokens in spelled)
        if any(len(tokens) < size for tokens in spelled):
            space = self.tools.spelling(" ")
            spelled = [tokens + [space] * (size - len(tokens)) for tokens in spelled]
        return OptionsReader(self.add(any_of(*(literal(tokens) for tokens in spelled)), size), values, spelled)


# --- what a schema says -----------------------------------------------------------------------------------------------


def _type(schema: Mapping[str, Any], path: str) -> tuple[str, bool]:
    """The type of a value, and whether it may be null instead."""
    given = schema.get("type")
    kinds = [given] if isinstance(given, str) else list(given or ())
    others = [kind for kind in kinds if kind != "null"]
    if not kinds or len(others) > 1 or not all(kind in TYPES for kind in kinds):
        raise ValueError(
            f"{_at(path)} has type={given!r}; allowed: one of {', '.join(TYPES)}, alone or in a list with 'null'"
        )
    return (others[0], len(kinds) > 1) if others else ("null", True)


def _check_keywords(schema: Mapping[str, Any], kind: str, path: str) -> None:
    allowed = KEYWORDS[kind]
    unknown = sorted(set(schema) - allowed - ANNOTATIONS)
    if unknown:
        raise ValueError(
            f"{_at(path)} has {unknown}, which is not supported there; allowed: {', '.join(sorted(allowed))}"
        )


def _items(schema: Mapping[str, Any], path: str) -> list[Any]:
    """The schema of each item of an array."""
    first = list(schema.get("prefixItems", ()))
    low, high = schema.get("minItems", len(first) or None), schema.get("maxItems", len(first) or None)
    if low is None or low != high or not isinstance(low, int) or low < len(first):
        raise ValueError(
            f"{_at(path)} has minItems={schema.get('minItems')!r} and maxItems={schema.get('maxItems')!r}; arrays have "
            "a fixed size here, so that both must be the same number and no smaller than that of prefixItems"
        )
    if low > len(first) and "items" not in schema:
        raise ValueError(f"{_at(path)} has no items, which says what its values are")
    return first + [schema["items"]] * (low - len(first)) if low > len(first) else first


def _refuse_null(kind: str, nullable: bool, path: str) -> None:
    if nullable:
        raise ValueError(f"{_at(path)} has type=['{kind}', 'null']; only strings, numbers and booleans may be null")


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, TYPES.get(kind, ())) or (kind == "integer" and isinstance(value, float) and value % 1 == 0)


def _same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _at(path: str) -> str:
    return f"the schema at {path!r}" if path else "the schema"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_slots(name: str, value: Any, limit: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (limit is not None and value > limit):
        most = f" to {limit}" if limit is not None else " or larger"
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer, 1{most}")


# --- what tokens spell ------------------------------------------------------------------------------------------------


def _token_texts(tokenizer: Any) -> dict[int, str]:
    """What each token that is not special spells behind a letter, where leading spaces are kept."""
    special = {*tokenizer.all_special_ids}
    special |= {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    letter = tokenizer.encode("a", add_special_tokens=False)[-1:]
    spelled = tokenizer.decode(letter, clean_up_tokenization_spaces=False)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    texts = tokenizer.batch_decode([[*letter, token] for token in ids], clean_up_tokenization_spaces=False)
    return {token: text[len(spelled) :] for token, text in zip(ids, texts, strict=True)}


def _fits_string(character: str) -> bool:
    """Whether a character may stand in a JSON string as it is."""
    return character >= " " and character not in '"\\'


def _is_digits(text: str) -> bool:
    return len(text) <= DIGITS_PER_TOKEN and all(character in string.digits for character in text)
