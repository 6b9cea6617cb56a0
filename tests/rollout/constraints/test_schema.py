"""Scaffolds: whatever is drawn, what is read is JSON of the schema; and within the language so is the canvas itself."""

from __future__ import annotations

import functools
import json
import math
import random
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.rollout.constraints.schema import Scaffold, Scaffolder
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine

SCHEMA: dict[str, Any] = {
    "title": "a person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "as written"},
        "age": {"type": "integer"},
        "height": {"type": ["number", "null"]},
        "member": {"type": "boolean"},
        "colour": {"enum": ["red", "green", None, 3, {"r": [1]}]},
        "address": {
            "type": "object",
            "properties": {"city": {"type": ["string", "null"]}, "no": {"type": "integer"}},
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
        "pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}]},
        "version": {"const": "1.0"},
        "sure": {"type": ["boolean", "null"]},
        "none": {"type": "object"},
    },
    "required": ["name", "age"],
}
TEXTS = [
    "Ada Lovelace was born in 1815, in London.",
    '{"name": "Ada", "age": 36, "height": null, "ok": true, "no": 100}',
]


@functools.cache
def scaffolder(kind: str) -> Scaffolder:
    """One per kind of tokenizer: a character, pieces of bytes, words with their space in front."""
    special = ["<pad>", "<eos>", "<mask>"]
    if kind == "characters":
        return Scaffolder(tiny_tokenizer(), slots=6, digits=4)
    model = Tokenizer(models.BPE(byte_fallback=kind == "words"))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        if kind == "bytes"
        else list("▁0123456789.-{}[]\"':, aefilnrstu"),
        show_progress=False,
    )
    if kind == "bytes":
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        model.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    model.train_from_iterator(TEXTS * 3 + [json.dumps(SCHEMA, indent=1)] * 2, trainer)
    if kind == "words":
        model.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )
    return Scaffolder(tokenizer, slots=6, digits=4)


KINDS = ["characters", "bytes", "words"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def person(kind: str) -> Scaffold:
    return scaffolder(kind).json(SCHEMA, budgets={"address.city": 3, "tags.1": 4})


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """The definition of the keywords that are supported."""
    if "enum" in schema:
        return any(value == option and type(value) is type(option) for option in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if value is None:
        return "null" in kinds
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, str):
        return "string" in kinds
    if isinstance(value, int):
        return "integer" in kinds or "number" in kinds
    if isinstance(value, float):
        return "number" in kinds and math.isfinite(value)
    if isinstance(value, list):
        items = schema.get("prefixItems", [schema.get("items")] * schema.get("minItems", 0))
        return "array" in kinds and len(value) == len(items) and all(map(conforms, value, items))
    properties = schema.get("properties", {})
    return (
        "object" in kinds
        and list(value) == list(properties)
        and all(conforms(value[name], child) for name, child in properties.items())
    )


def held(scaffold: Scaffold, seed: int, *, within: bool) -> list[int]:
    """A canvas of tokens drawn from the choices, slot by slot in random order; `within` the language."""
    draw, canvas = random.Random(seed), [scaffold.hints.get(i) for i in range(scaffold.canvas_length)]
    slots = list(scaffold.choices)
    draw.shuffle(slots)
    for slot in slots:
        tokens = sorted(scaffold.choices[slot])
        draw.shuffle(tokens)
        canvas[slot] = next(t for t in tokens if not within or scaffold.language.admissible(canvas, slot, t))
    return canvas


# --- reading ----------------------------------------------------------------------------------------------------------


@every_kind
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_is_drawn_reads_as_json_of_the_schema(kind: str, data: st.DataObject):
    scaffold = person(kind)
    tokens = st.one_of(st.integers(0, 450), st.sampled_from(sorted(set().union(*scaffold.choices.values()))))
    canvas = data.draw(st.lists(tokens, min_size=scaffold.canvas_length, max_size=scaffold.canvas_length))
    assert conforms(json.loads(scaffold.read(canvas)), SCHEMA)


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_a_canvas_of_the_language_is_json_itself(kind: str, seed: int):
    scaffold, tools = person(kind), scaffolder(kind)
    canvas = held(scaffold, seed, within=True)
    assert scaffold.language.completable(canvas)
    spelled = json.loads(tools.decoded(canvas))
    assert conforms(spelled, SCHEMA)
    read = json.loads(scaffold.read(canvas))
    for name in ("age", "height", "member", "colour", "pair", "version", "sure", "none"):
        assert read[name] == spelled[name], name
    assert read["name"] == spelled["name"].strip() and read["address"]["no"] == spelled["address"]["no"]


@every_kind
def test_the_structure_is_given_and_the_rest_is_open(kind: str):
    scaffold, tools = person(kind), scaffolder(kind)
    assert sorted({*scaffold.hints, *scaffold.choices}) == list(range(scaffold.canvas_length))
    assert not {*scaffold.hints} & {*scaffold.choices}
    text = tools.decoded(held(scaffold, 0, within=False))
    for literal in ('"name": "', '"age": ', '"address": {"city": "', '"version": "1.0"', '"none": {}'):
        assert "".join(literal.split()) in "".join(text.split())
    special = set(tools.tokenizer.all_special_ids)
    for tokens in scaffold.choices.values():
        assert len(tokens) > 1 and not tokens & special
    for tokens in [scaffold.choices[i] for i in _slots_of(scaffold, "name")]:
        assert not any(set(tools.texts[token]) & set('"\\\n') for token in tokens)


def _slots_of(scaffold: Scaffold, name: str) -> list[int]:
    where = scaffold.reader.parts[name].at
    return [slot for slot in range(where.start, where.stop) if slot in scaffold.choices]


def test_budgets_are_the_tokens_of_single_values():
    scaffold = person("characters")
    lengths = [
        reader.at.stop - reader.at.start
        for reader in (
            scaffold.reader.parts["name"],
            scaffold.reader.parts["address"].parts["city"],
            scaffold.reader.parts["tags"].parts[0],
            scaffold.reader.parts["tags"].parts[1],
            scaffold.reader.parts["age"],
        )
    ]
    assert lengths == [6, 3, 6, 4, 4 + 1]


READINGS = [
    ({"type": "string"}, 12, "Ada         ", "Ada"),
    ({"type": "string"}, 12, "Ada<none><no", "Ada"),
    ({"type": "string"}, 12, "<none><none>", ""),
    ({"type": "string"}, 12, 'a"b\\c\n      ', 'a"b\\c'),
    ({"type": "string"}, 12, "a<none>b<    ", "ab<"),
    ({"type": ["string", "null"]}, 12, "<none><none>", None),
    ({"type": ["string", "null"]}, 12, "<none>Ada   ", "Ada"),
    ({"type": ["string", "null"]}, 12, "            ", ""),
    ({"type": "integer"}, 5, "-0042 ", -42),
    ({"type": "integer"}, 5, " 7    ", 7),
    ({"type": "integer"}, 5, "-     ", 0),
    ({"type": "integer"}, 5, " 1.5-2", 152),
    ({"type": ["integer", "null"]}, 5, "null  ", None),
    ({"type": "number"}, 5, "-1.50 ", -1.5),
    ({"type": "number"}, 5, " 1..5.", 1.5),
    ({"type": "number"}, 5, " .    ", 0),
    ({"type": "number"}, 5, " 12   ", 12.0),
    ({"type": "boolean"}, None, "true ", True),
    ({"type": "boolean"}, None, "fa   ", False),
    ({"enum": ["red", "blue"]}, None, '"blu" ', "blue"),
    ({"enum": ["red", "blue"]}, None, "      ", "red"),
]


@pytest.mark.parametrize(("schema", "size", "text", "expected"), READINGS)
def test_what_slots_are_read_as(schema: dict[str, Any], size: int | None, text: str, expected: Any):
    tools = scaffolder("characters")
    scaffold = tools.json(schema, budgets={} if size is None else {"": size})
    quotes = '"' if "string" in str(schema.get("type")) else ""
    canvas = tools.tokenizer.encode(f"{quotes}{text}"[: scaffold.canvas_length].ljust(scaffold.canvas_length))
    value = scaffold.value(canvas)
    assert value == expected and type(value) is type(expected)
    assert json.loads(scaffold.read(canvas)) == expected


def test_a_canvas_must_be_whole():
    with pytest.raises(ValueError, match="canvas has 3 tokens"):
        person("characters").read([1, 2, 3])


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("constrained", [False, True])
def test_a_random_model_writes_json_of_the_schema(constrained: bool, temperature: float, seed: int):
    scaffold, tools = person("characters"), scaffolder("characters")
    engine = RolloutEngine(tiny_llada(initializer_range=0.5, seed=seed))
    config = DecodingConfig(canvas_length=scaffold.canvas_length, schedule="schema", temperature=temperature)
    rollout = engine.generate(
        [tools.tokenizer.encode(prompt) for prompt in ("Who?", "Ada Lovelace")],
        config,
        hints=[scaffold.hints] * 2,
        choices=[scaffold.choices] * 2,
        constraint=scaffold.language if constrained else None,
    )
    assert rollout.stop_reason == ["complete"] * 2 and bool((rollout.nfe <= 16).all()) and bool(rollout.valid.all())
    for state in [*rollout.states(), rollout.canvas]:
        assert all(state[:, slot].eq(token).all() for slot, token in scaffold.hints.items())
        if constrained:
            for row in state.tolist():
                assert scaffold.language.completable([None if t == rollout.mask_token_id else t for t in row])
    for canvas in rollout.canvas.tolist():
        assert conforms(json.loads(scaffold.read(canvas)), SCHEMA)
        assert all(canvas[slot] in tokens for slot, tokens in scaffold.choices.items())
        if constrained:
            assert conforms(json.loads(tools.decoded(canvas)), SCHEMA)


def test_nothing_open_needs_no_forward():
    tools = scaffolder("characters")
    scaffold = tools.json({"type": "object", "properties": {"version": {"const": [1, "a"]}, "none": {"type": "null"}}})
    rollout = RolloutEngine(tiny_llada()).generate(
        [[5]], DecodingConfig(canvas_length=scaffold.canvas_length, schedule="schema"), hints=[scaffold.hints]
    )
    assert not scaffold.choices and rollout.nfe.tolist() == [0]
    assert scaffold.read(rollout.canvas[0].tolist()) == '{"version": [1, "a"], "none": null}'
    assert tools.decoded(rollout.canvas[0].tolist()) == '{"version": [1, "a"], "none": null}'


def test_scaffolds_of_different_length_are_decoded_together():
    tools, end = scaffolder("characters"), 1
    short = tools.json({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 1})
    long = tools.template("Dear {name:3}, you are {age:2}.")
    length = max(short.canvas_length, long.canvas_length) + 2
    both = [short.filled(length, end), long.filled(length, end)]
    rollout = RolloutEngine(tiny_llada(initializer_range=0.5)).generate(
        [[5], [6, 7]],
        DecodingConfig(canvas_length=length, schedule="schema"),
        hints=[scaffold.hints for scaffold in both],
        choices=[scaffold.choices for scaffold in both],
    )
    assert rollout.valid.sum(-1).tolist() == [short.canvas_length + 1, long.canvas_length + 1]
    for scaffold, canvas in zip(both, rollout.canvas.tolist(), strict=True):
        json.loads(scaffold.read(canvas))
        assert canvas[-2:] == [end, end]
    assert both[0].language.completable([None] * length)
    with pytest.raises(ValueError, match="canvas_length=1 is not allowed"):
        short.filled(1, end)


# --- templates --------------------------------------------------------------------------------------------------------


@every_kind
def test_a_template_is_given_around_its_places(kind: str):
    tools = scaffolder(kind)
    scaffold = tools.template("Ada {{is}} in {place} since {year:3}.", budgets={"place": 5})
    assert len(scaffold.choices) == 8
    assert all(tokens == tools.all for tokens in scaffold.choices.values())
    canvas = held(scaffold, 1, within=False)
    text = tools.decoded(canvas)
    assert "Ada{is}in" in "".join(text.split()) and "since" in text and text.endswith(".")
    value = json.loads(scaffold.read(canvas))
    assert list(value) == ["place", "year"] and all(isinstance(part, str) for part in value.values())
    place = scaffold.reader.parts["place"].at
    assert value["place"] == tools.decoded(canvas[place]).strip()


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_SCHEMAS = [
    ({"type": "string", "maxLength": 5}, r"the schema has \['maxLength'\], which is not supported there"),
    ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}}, r"at 'a' has \['minimum'\]"),
    ({"type": "object", "properties": {"a": {"anyOf": []}}}, "at 'a' has type=None"),
    ({"type": "text"}, "type='text'; allowed: one of object, array"),
    ({"type": ["string", "integer"]}, "type="),
    ({"type": "array", "items": {"type": "null"}}, "minItems=None and maxItems=None.*fixed size"),
    ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, "fixed size"),
    ({"type": "array", "minItems": 1, "maxItems": 1}, "has no items"),
    ({"type": "object", "required": ["a"]}, r"requires \['a'\]"),
    ({"type": "object", "additionalProperties": {"type": "string"}}, "additionalProperties"),
    ({"type": ["object", "null"]}, "may be null"),
    ({"type": "object", "properties": {"a": True}}, "at 'a' is True; a schema is a mapping"),
    ({"enum": []}, "allows no value"),
    ({"type": "string", "enum": [1, 2]}, "allows no value"),
    ({"enum": [1], "const": 2}, "allows no value"),
    ({"const": "ä"}, "cannot write '\"ä\"'"),
]


@pytest.mark.parametrize(("schema", "message"), BAD_SCHEMAS)
def test_what_is_not_supported_is_named(schema: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        scaffolder("characters").json(schema)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{}", "named ''"),
        ("{a} {a}", "named 'a'"),
        ("{a!r}", "named 'a'"),
        ("{a.b}", "named 'a.b'"),
        ("{a:x}", "size 'x'"),
        ("{a:0}", "=0 is not allowed"),
    ],
)
def test_bad_templates_are_refused(template: str, message: str):
    with pytest.raises(ValueError, match=message):
        scaffolder("characters").template(template)


def test_bad_settings_are_refused():
    tools = scaffolder("characters")
    for settings_, message in (
        ({"null_marker": 'a"'}, "null_marker="),
        ({"null_marker": " "}, "null_marker="),
        ({"slots": 0}, "slots=0"),
        ({"digits": 101}, "digits=101.*1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            Scaffolder(tools.tokenizer, **settings_)
    with pytest.raises(ValueError, match=r"budgets has paths \['b'\]"):
        tools.json({"type": "object", "properties": {"a": {"type": "string"}}}, budgets={"b": 3})
    with pytest.raises(ValueError, match=r"budgets\['a'\]=0"):
        tools.json({"type": "object", "properties": {"a": {"type": "string"}}}, budgets={"a": 0})
    with pytest.raises(ValueError, match=r"budgets has names \['b'\]"):
        tools.template("{a}", budgets={"b": 3})


def test_the_instruction_says_what_is_wanted():
    tools = scaffolder("characters")
    assert "<none>" in tools.json({"type": "string"}).instruction
    assert "<none>" not in tools.json({"type": "integer"}).instruction
    assert '"integer"' in tools.json({"type": "integer"}).instruction


def test_the_example_prints_json(capsys: pytest.CaptureFixture[str]):
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "schema_decoding.py"))
    example["main"](["--steps", "4"])
    lines = capsys.readouterr().out.splitlines()
    written = [line.split("forwards: ")[1] for line in lines if "written, in 4 forwards: " in line]
    assert len(written) == 3 and conforms(json.loads(written[1]), example["SCHEMA"])
    assert [line.lstrip().startswith("read: {'name': ") for line in lines].count(True) == 3
