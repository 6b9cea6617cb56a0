"""What a request's JSON says: the rows to decode and how, or one sentence about what is wrong with it.

Owns the meaning of every field. Whatever can be wrong with a request is found here, before it waits for the engine, and
said with the field, its value and what is allowed. Nothing is ignored: fields that mean nothing for a denoiser may have
the value at which they do nothing, and others are refused.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rl4dlm.evaluation.likelihood import request_key
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.checks import check_call, check_parts
from rl4dlm.rollout.decoding import DecodingConfig, available_schedules, schedule_arguments
from rl4dlm.rollout.schedules.parts import CanvasSchedule
from rl4dlm.rollout.stopping import Ends, StopStrings, text_ends
from rl4dlm.tasks.prompts import encode_prompt, prompt_problem

DECODING = (
    "canvas_length", "schedule", "schedule_args", "steps", "block_length", "cfg_scale", "cache", "cache_args",
    "stop_at_eos", "min_new_tokens", "eos_penalty", "eos_penalty_decay", "suppress_token_ids", "defer_token_ids",
)  # fmt: skip
"""What a request's `decoding` may set; names of `DecodingConfig`. Guesses (`draft_steps`) change what decoding
costs, others' rows included, and nothing that is decoded, so they are the server's."""

SAMPLING = ("temperature", "top_p", "top_k")
"""Fields of a request itself that are settings of `DecodingConfig`."""

_RESETS = {
    "schedule": ("schedule_args", "steps"),
    "canvas_length": ("steps",),
    "block_length": ("steps",),
    "cache": ("cache_args",),
}
"""Settings of the server that mean nothing beside another value of these, and so take their defaults."""

_COMMON = (
    "model", "max_tokens", "n", *SAMPLING, "stop", "stream", "stream_options", "seed", "logprobs", "decoding",
    "details", "user", "metadata",
)  # fmt: skip
_OFF: dict[bool, dict[str, tuple[Any, ...]]] = {
    False: {"echo": (False,), "suffix": ("",), "best_of": (1,)},
    True: {"top_logprobs": (0,), "tools": ([],), "tool_choice": ("none",), "store": (False,),
           "response_format": ({"type": "text"},)},
}  # fmt: skip
"""Fields of completions and of chat completions that may only have a value at which they do nothing."""
_OFF_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
}  # fmt: skip
_ONLY = {False: ("prompt",), True: ("messages", "max_completion_tokens", "chat_template_kwargs")}

SEEDS = 2**63
LARGEST = 2**31 - 1


class BadRequest(ValueError):
    """A request that cannot be answered: a sentence, the field it is about and the HTTP status."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


@dataclass(frozen=True)
class Served:
    """What is served, and within which limits.

    Args:
        model: a denoiser with scoring attached. tokenizer: of the model. spec: how it denoises.
        name: of the model, in requests.
        decoding: settings of requests that name none.
        seed: of requests that name none; None: each draws one of its own, which its response tells.
        max_choices: rows of a request at most, prompts times `n`.
        chat_template_kwargs: for the chat template; those of a request come over them.
    """

    model: Any
    tokenizer: Any
    spec: DiffusionSpec
    name: str
    decoding: DecodingConfig
    seed: int | None = None
    max_choices: int = 64
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a text is encoded: a fast tokenizer cannot encode in two threads."""


@dataclass(frozen=True)
class Ask:
    """A request that can be decoded.

    Args:
        chat: whether it is one for a chat completion.
        prompts: token ids of each. n: rows of each. keys: what keys each row's randomness, prompt-major.
        config: the decoding. ends: where rows end besides, and shown: the texts that what is shown is cut at.
        seed: that the keys were made with.
        streams: whether parts are wanted as they are finished. usage: whether a stream ends with token counts.
        logprobs: whether log-probabilities are wanted. details: whether steps and log-probabilities of each token are.
        group: equal for requests that can be decoded in one call.
    """

    chat: bool
    prompts: list[list[int]]
    n: int
    keys: list[int]
    config: DecodingConfig
    ends: Ends | None
    shown: StopStrings | None
    seed: int
    streams: bool
    usage: bool
    logprobs: bool
    details: bool
    group: str


def read(served: Served, body: Any, *, chat: bool) -> Ask:
    """What a request asks for. Raises BadRequest."""
    if not isinstance(body, Mapping):
        raise BadRequest(f"the body is {_shown(body)}, but must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _check_names(given, chat)
    name = given.get("model")
    if not isinstance(name, str):
        raise BadRequest(f"model={_shown(name)} is not allowed; it must be {served.name!r}", "model")
    if name != served.name:
        raise BadRequest(f"model={_shown(name)} is not served here; allowed: {served.name!r}", "model", 404)
    n = _integer(given, "n", 1, 1, served.max_choices)
    config = _decoding(served, given)
    most = _most(given, chat)
    streams = _flag(given, "stream")
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping) or set(options) - {"include_usage"} or (options and not streams):
        raise BadRequest(
            f"stream_options={_shown(options)} is not allowed; it may be {{'include_usage': true}}, with stream=true",
            "stream_options",
        )
    seed = given.get("seed", served.seed)
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -SEEDS <= seed < SEEDS:
        raise BadRequest(f"seed={_shown(seed)} is not allowed; it must be a whole number of 64 bits", "seed")
    logprobs = _flag(given, "logprobs") if chat or given.get("logprobs") != 0 else "logprobs" in given
    strings = _strings(given)
    if most is not None and most >= config.canvas_length:
        most = None
    ends, shown = text_ends(served.tokenizer, strings, most)
    if ends is not None and not served.spec.eos_token_ids:
        raise BadRequest("stop and max_tokens below canvas_length need an end-of-sequence token, which the model lacks")
    usage, details = _flag(options, "include_usage"), _flag(given, "details")
    prompts = [_messages(served, given)] if chat else _prompts(served, given)
    if len(prompts) * n > served.max_choices:
        raise BadRequest(
            f"n={n} with {len(prompts)} prompts is not allowed; at most {served.max_choices} completions can be asked "
            "for at once",
            "n",
        )
    seen, keys = Counter[tuple[int, ...]](), []
    for prompt in prompts:
        for _ in range(n):
            keys.append(request_key("serve", seed, prompt, seen[tuple(prompt)]))
            seen[tuple(prompt)] += 1
    _check(served, prompts, config, "messages" if chat else "prompt")
    group = json.dumps([asdict(config), list(strings), most], sort_keys=True, default=str)
    return Ask(chat, prompts, n, keys, config, ends, shown, seed, streams, usage, logprobs, details, group)


def _check_names(given: Mapping[str, Any], chat: bool) -> None:
    off = {**_OFF_EVERYWHERE, **_OFF[chat]}
    allowed = (*_COMMON, *_ONLY[chat])
    for name, value in given.items():
        if name in allowed:
            continue
        if name not in off:
            raise BadRequest(f"{name} is not a field of this request; allowed: {', '.join(allowed)}", str(name))
        if name == "best_of" and value == given.get("n", 1):
            continue
        if not any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in off[name]):
            neutral = " or ".join(["null", *map(json.dumps, off[name])])
            raise BadRequest(f"{name}={_shown(value)} is not supported; allowed: {neutral}", name)


def _decoding(served: Served, given: Mapping[str, Any]) -> DecodingConfig:
    """The server's settings with those of a request over them, for the model."""
    asked = given.get("decoding", {})
    if not isinstance(asked, Mapping):
        raise BadRequest(f"decoding={_shown(asked)} is not allowed; it must be an object of settings", "decoding")
    for name in asked:
        if name not in DECODING:
            hint = f"; {name} is a field of the request itself" if name in SAMPLING else ""
            raise BadRequest(f"decoding has no setting {name!r}{hint}; allowed: {', '.join(DECODING)}", "decoding")
    check_schedule_args(served, asked)
    defaults = DecodingConfig()
    settings = {
        reset: getattr(defaults, reset)
        for name, resets in _RESETS.items()
        if name in asked and asked[name] != getattr(served.decoding, name)
        for reset in resets
    }
    settings |= {name: value for name, value in asked.items() if value is not None or name in ("steps", "block_length")}
    settings |= {name: given[name] for name in SAMPLING if name in given}
    for name, value in settings.items():
        if isinstance(value, int) and abs(value) > LARGEST:  # of any size, in JSON and in Python
            raise BadRequest(f"{name}={_shown(value)} is not allowed; it must be {LARGEST} at most", name)
    try:
        return replace(served.decoding, **settings).for_model(served.spec)
    except (ValueError, TypeError, OverflowError) as error:
        message = sentence(error)
        if not isinstance(error, ValueError):  # a setting of a type that the check itself did not expect
            message = f"decoding={_shown(asked)} is not allowed: {message}"
        names = [name for name in (*SAMPLING, *DECODING) if message.startswith(f"{name}=")]
        raise BadRequest(message, names[0] if names and names[0] in SAMPLING else "decoding") from None


def check_schedule_args(served: Served, asked: Mapping[str, Any]) -> None:
    """Clients may choose numbers and words. What may name a file or a model, which the server would read, is the
    server's to choose: text and objects are let through only where a setting is a word, or as the server has them."""
    name, own = asked.get("schedule") or served.decoding.schedule, served.decoding
    values = asked.get("schedule_args")
    if not isinstance(name, str) or name not in available_schedules() or not isinstance(values, Mapping):
        return  # nothing yet, or something that the settings themselves refuse
    known = {setting.name: setting for setting in fields(schedule_arguments(name))}
    for key, value in values.items():
        if key not in known or _is_plain(value) or (isinstance(value, str) and known[key].type in ("str", str)):
            continue
        if value == known[key].default or (name == own.schedule and value == own.schedule_args.get(key, known[key])):
            continue
        raise BadRequest(
            f"schedule_args has {key}={_shown(value)}, which a request may not set for schedule={name!r}: it may name "
            "files or models, which only the server's own settings can",
            "decoding",
        )


def _is_plain(value: Any) -> bool:
    """Whether something is a number, true, false, null or a list of such."""
    return value is None or isinstance(value, int | float) or (isinstance(value, list) and all(map(_is_plain, value)))


def _most(given: Mapping[str, Any], chat: bool) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    limits = {_integer(given, name, 1, 1, None) for name in names}
    if len(limits) > 1:
        raise BadRequest(
            f"max_tokens={given['max_tokens']} and max_completion_tokens={given['max_completion_tokens']} differ; give "
            "one of them",
            "max_tokens",
        )
    return limits.pop() if limits else None


def _strings(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", ())
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) and text for text in strings):
        raise BadRequest(
            f"stop={_shown(stop)} is not allowed; it must be a text, or a list of texts, of at least one character",
            "stop",
        )
    return tuple(strings)


def _prompts(served: Served, given: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of one prompt or several, each a text or token ids."""
    prompt = given.get("prompt")
    wanted = "it must be a text, a list of texts, a list of token ids or a list of such lists, and not empty"
    prompts = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise BadRequest(f"prompt={_shown(prompt)} is not allowed; {wanted}", "prompt")
    if len(prompts) > served.max_choices:
        raise BadRequest(f"prompt has {len(prompts)} entries; at most {served.max_choices} are allowed", "prompt")
    found = []
    for one in prompts:
        if not isinstance(one, str) and not _are_ids(one):
            raise BadRequest(f"prompt={_shown(prompt)} is not allowed; {wanted}", "prompt")
        if isinstance(one, str):
            with served.lock:
                one = encode_prompt(served.tokenizer, one)
        found.append(list(one))
    return found


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(served: Served, given: Mapping[str, Any]) -> list[int]:
    """Token ids of a conversation, by the tokenizer's chat template."""
    messages = given.get("messages")
    if not isinstance(messages, list):
        raise BadRequest(f"messages is {_shown(messages)}, but must be a list of messages", "messages")
    problem = prompt_problem(messages)
    if problem is not None:
        raise BadRequest(f"messages is {problem}", "messages")
    template = given.get("chat_template_kwargs", {})
    if not isinstance(template, Mapping):
        raise BadRequest(
            f"chat_template_kwargs={_shown(template)} is not allowed; it must be an object", "chat_template_kwargs"
        )
    if {"chat_template", "tools", "tokenizer"} & set(template):
        raise BadRequest(
            f"chat_template_kwargs={_shown(template)} is not allowed; it holds variables of the server's own template",
            "chat_template_kwargs",
        )
    template = {**served.chat_template_kwargs, **template}
    if not served.tokenizer.chat_template:
        raise BadRequest("messages cannot be rendered: the model has no chat template; use /v1/completions", "messages")
    try:
        with served.lock:
            return encode_prompt(served.tokenizer, messages, chat_template_kwargs=template)
    except Exception as error:  # a template is the checkpoint's program, and what it raises is about the messages
        raise BadRequest(f"messages cannot be rendered by the chat template: {sentence(error)}", "messages") from None


def _check(served: Served, prompts: list[list[int]], config: DecodingConfig, name: str) -> None:
    """What the engine would refuse."""
    try:
        check_call(
            served.model, served.spec, prompts, prompts, list(range(len(prompts))), None, None, config
        )  # fmt: skip
        schedule, cache = config.build_schedule(), config.build_cache(served.spec)
        check_parts(served.model, served.spec, schedule, config, cache, None, None, None, None, None)
    except ValueError as error:
        message = sentence(error)
        about = message.startswith("prompts[")
        raise BadRequest(name + message.removeprefix("prompts") if about else message, name if about else "decoding") \
            from None  # fmt: skip


def settles(config: DecodingConfig, tokenizer: Any) -> bool:
    """Whether text of earlier blocks is final while later ones are decoded, so that it can be sent already.

    Not where a schedule can change finished blocks or the length of the canvas, nor where a tokenizer changes spaces of
    what it has decoded once more follows.
    """
    schedule = config.build_schedule()
    if isinstance(schedule, CanvasSchedule) or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    return not schedule.reopens and schedule.resize is None


def _integer(given: Mapping[str, Any], name: str, default: int, low: int, high: int | None) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"{low} or larger" if high is None else f"{low} to {high}"
        raise BadRequest(f"{name}={_shown(value)} is not allowed; it must be a whole number, {allowed}", name)
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        more = ", or 0: alternatives to the tokens written are not recorded" if name == "logprobs" else ""
        raise BadRequest(f"{name}={_shown(value)} is not allowed; it must be true or false{more}", name)
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def sentence(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__
