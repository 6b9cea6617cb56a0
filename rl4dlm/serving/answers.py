"""Responses as OpenAI's clients read them, and what a denoiser adds to them under `rl4dlm`.

Owns the JSON that leaves the server, errors included; when it is sent is `app.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import rl4dlm
from rl4dlm.rollout.decoding import available_schedules
from rl4dlm.serving.fields import Ask, Served
from rl4dlm.serving.texts import Reader, Row
from rl4dlm.serving.worker import Part

_KINDS = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}


def error(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """The body of a response that is none."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    code = "model_not_found" if field == "model" and status == 404 else None
    return {"error": {"message": message, "type": _KINDS.get(status, kind), "param": field, "code": code}}


def model_card(served: Served, created: int) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    about = {
        "version": rl4dlm.__version__,
        "decoding": asdict(served.decoding),
        "schedules": available_schedules(),
        "max_choices": served.max_choices,
    }
    return {"id": served.name, "object": "model", "created": created, "owned_by": "rl4dlm", "rl4dlm": about}


def usage(ask: Ask, rows: Sequence[Row]) -> dict[str, int]:
    """Tokens of the prompts, each once, and tokens that the model wrote."""
    prompt, written = sum(map(len, ask.prompts)), sum(len(row.ids) for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class Answer:
    """The responses to one request.

    Args:
        served: what is served. ask: the request. number: of the request, unique. created: seconds since 1970.
    """

    def __init__(self, served: Served, ask: Ask, number: str, created: int) -> None:
        self.ask = ask
        self.reader = Reader.of(served.tokenizer, served.spec, ask.ends, ask.shown)
        self.sent = [""] * len(ask.keys)
        kind = ("chat.completion" + ".chunk" * ask.streams) if ask.chat else "text_completion"
        config = ask.config
        self.head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{number}",
            "object": kind,
            "created": created,
            "model": served.name,
            "system_fingerprint": None,
            "rl4dlm": {
                "seed": ask.seed,
                "schedule": config.schedule,
                "canvas_length": config.canvas_length,
                "block_length": config.block_length,
                "steps": config.steps,
                "cache": config.build_cache(served.spec).name,
            },
        }

    def whole(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The response that is sent at once."""
        choices = []
        for number, row in enumerate(rows):
            text = self.reader.text(row.ids)
            said = {"message": {"role": "assistant", "content": text}} if self.ask.chat else {"text": text}
            choices.append({"index": number, **said, **self._end(row)})
        return {**self.head, "choices": choices, "usage": usage(self.ask, rows)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks that a stream begins with."""
        if self.ask.chat:
            for number in range(len(self.sent)):
                yield self._chunk(number, {"delta": {"role": "assistant", "content": ""}})

    def part(self, part: Part) -> Iterator[dict[str, Any]]:
        """A chunk with what of a row under way is certain and was not sent yet, if there is anything."""
        yield from self._more(part.row, self.reader.settled(part.ids))

    def closing(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """The rest of each row and its end, then counts if they are wanted."""
        for number, row in enumerate(rows):
            yield from self._more(number, self.reader.text(row.ids))
            yield self._chunk(number, {**({"delta": {}} if self.ask.chat else {"text": ""}), **self._end(row)})
        if self.ask.usage:
            yield {**self.head, "choices": [], "usage": usage(self.ask, rows)}

    def _more(self, number: int, text: str) -> Iterator[dict[str, Any]]:
        new = text[len(self.sent[number]) :]
        if new:
            self.sent[number] += new
            yield self._chunk(number, {"delta": {"content": new}} if self.ask.chat else {"text": new})

    def _chunk(self, number: int, said: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": [{"index": number, "logprobs": None, "finish_reason": None, **said}]}

    def _end(self, row: Row) -> dict[str, Any]:
        """What is known of a row when it has ended."""
        found: dict[str, Any] = {"logprobs": None, "finish_reason": self.reader.finish(row.ids)}
        if self.ask.logprobs:
            found["logprobs"] = self._logprobs(row)
        if self.ask.details:
            found["rl4dlm"] = {
                "token_ids": row.ids,
                "steps": row.steps,
                "log_probs": row.log_probs,
                "sampled_log_probs": row.sampled_log_probs,
                "num_steps": row.num_steps,
                "forwards": row.forwards,
                "stop_reason": row.reason,
            }
        return found

    def _logprobs(self, row: Row) -> dict[str, Any]:
        tokens = self.reader.tokens(row.ids)
        if self.ask.chat:
            pairs = zip(tokens, row.log_probs, strict=True)
            content = [
                {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                for token, value in pairs
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": tokens,
            "token_logprobs": row.log_probs,
            "top_logprobs": None,
            "text_offset": self.reader.offsets(row.ids),
        }


def event(chunk: dict[str, Any]) -> str:
    """A chunk of a stream, as a server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


END = "data: [DONE]\n\n"
"""What a stream ends with."""
