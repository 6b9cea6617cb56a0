"""What a trainer on another machine asks a server for: rollouts with their record, and to take new weights.

Owns these paths: who may use them, what is wrong with a request before anything is decoded, and the refusal of weights
that are no longer there. They are off unless the server is started with a folder, and open to whoever knows the token
alone: weights decide what every answer of the server is. This file imports FastAPI, which is an extra.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

import rl4dlm
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.rollout.backends.http import ABOUT, ROLLOUTS, WEIGHTS, check_token
from rl4dlm.rollout.backends.weights import Receiver, check_name
from rl4dlm.rollout.backends.wire import FORMAT, Wanted, pack_rollout, unpack_request
from rl4dlm.rollout.checks import check_call, check_parts, check_start
from rl4dlm.rollout.decoding import DecodingConfig, available_schedules
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.serving import answers
from rl4dlm.serving.fields import BadRequest, Served, check_schedule_args, sentence
from rl4dlm.serving.worker import Event, Failed, Made, Refused, Task, Worker

logger = logging.getLogger(__name__)

MAX_ROLLOUT_BODY = 2**28
"""Bytes of a request for a rollout at most; states to go on from are in it."""

MAX_WEIGHTS_BODY = 2**12


@dataclass(frozen=True)
class Training:
    """Who may train with a server, and where its weights come from.

    Args:
        token: that requests have to know, at least one character, printable ASCII.
        receiver: of the served model.
    """

    token: str
    receiver: Receiver

    def __post_init__(self) -> None:
        if not self.token:
            raise ValueError("token='' is not allowed; it must have at least one character")
        check_token(self.token)


def add_training(app: FastAPI, training: Training, served: Served, worker: Worker) -> None:
    """Adds the paths to an application."""
    receiver = training.receiver

    async def answered(request: Request, task: Callable[[], Any]) -> Response:
        """The response to a request: what an awaitable gives, or what is wrong."""
        begun, path = time.monotonic(), request.url.path
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {training.token}".encode()):
            logger.info("%s 401", path)
            return refusal("the token is missing or wrong; send `Authorization: Bearer TOKEN`", 401)
        try:
            response: Response = await task()
        except BadRequest as problem:
            logger.info("%s %d %s", path, problem.status, problem.field or "")
            return refusal(str(problem), problem.status, problem.field)
        except Refused as problem:
            logger.info("%s %d", path, problem.status)
            return refusal(str(problem), problem.status)
        logger.info("%s %d seconds=%.3f", path, response.status_code, time.monotonic() - begun)
        return response

    @app.get(ABOUT)
    async def about(request: Request) -> Response:
        async def tell() -> Response:
            return JSONResponse(
                {
                    "format": FORMAT,
                    "version": rl4dlm.__version__,
                    "model": served.name,
                    "spec": served.spec.to_dict(),
                    "dtype": str(served.model.dtype).removeprefix("torch."),
                    "schedules": available_schedules(),
                    "weights": receiver.name,
                }
            )

        return await answered(request, tell)

    @app.post(WEIGHTS)
    async def weights(request: Request) -> Response:
        async def take() -> Response:
            version = _version(await body_of(request, MAX_WEIGHTS_BODY))

            def load(engine: RolloutEngine) -> None:
                try:
                    receiver.receive(version)
                except ValueError as error:
                    raise BadRequest(sentence(error), "version") from None

            await _done(worker, load)
            return JSONResponse({"weights": version})

        return await answered(request, take)

    @app.post(ROLLOUTS)
    async def rollouts(request: Request) -> Response:
        async def decode() -> Response:
            data = await body_of(request, MAX_ROLLOUT_BODY)
            wanted, config = await run_in_threadpool(read_request, served, data)

            def generate(engine: RolloutEngine) -> bytes:
                if receiver.name != wanted.weights:
                    raise BadRequest(
                        f"weights={wanted.weights!r} are not those of this server, which are {receiver.name!r}; hand "
                        f"them over first ({WEIGHTS})",
                        "weights",
                        409,
                    )
                rollout = engine.generate(
                    wanted.prompts,
                    config,
                    row_ids=wanted.row_ids,
                    seed=wanted.seed,
                    hints=wanted.hints,
                    start=None if wanted.start is None else wanted.start.to(engine.model.device),
                )
                return pack_rollout(rollout, wanted.weights)

            found = await _done(worker, generate)
            return Response(found, media_type="application/octet-stream")

        return await answered(request, decode)


def read_request(served: Served, data: bytes) -> tuple[Wanted, DecodingConfig]:
    """What is asked for, and how it is decoded. Raises BadRequest for what cannot be decoded."""
    try:
        wanted = unpack_request(data)
        check_name(wanted.weights)
    except ValueError as error:
        raise BadRequest(sentence(error)) from None
    settings = dict(wanted.config)
    unknown = sorted(set(settings) - {entry.name for entry in fields(DecodingConfig)})
    if unknown:
        raise BadRequest(f"config has unknown settings {unknown}", "config")
    check_schedule_args(served, settings)
    if served.spec.attention in BLOCK_KINDS and settings.get("block_length") == served.spec.block_length:
        settings["block_length"] = None  # the canvas need not end with one of the model's blocks
    spec = served.spec
    try:
        config = DecodingConfig(**settings).for_model(spec)
        hints, rows = wanted.hints, wanted.prompts
        check_call(served.model, spec, rows, rows, wanted.row_ids, hints, None, config)
        schedule, cache = config.build_schedule(), config.build_cache(spec)
        check_parts(served.model, spec, schedule, config, cache, hints, None, None, None, None)
        if wanted.start is not None:
            vocabulary = served.model.config.get_text_config().vocab_size
            check_start(wanted.start, len(rows), config, spec, vocabulary, schedule)
            if hints is not None:
                raise ValueError("hints cannot be given beside start, whose states say which slots were given")
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        raise BadRequest(sentence(error), "config") from None
    return wanted, config


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request. Raises BadRequest for more bytes than allowed."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            raise BadRequest(f"the body has more than {most} bytes; at most so many are allowed", status=413)
    return bytes(data)


def refusal(message: str, status: int, field: str | None = None) -> Response:
    """A response that is none."""
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(answers.error(message, status, field), status, headers=headers)


async def _done(worker: Worker, do: Callable[[RolloutEngine], Any]) -> Any:
    """What the engine's thread makes of a task, in its turn. Raises BadRequest, Refused."""
    outcome: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        loop.call_soon_threadsafe(outcome.put_nowait, event)

    task = Task(do, tell)
    worker.submit(task)
    try:
        found = await outcome.get()
    except asyncio.CancelledError:
        task.cancelled = True
        raise
    if isinstance(found, Made):
        return found.value
    assert isinstance(found, Failed)
    if isinstance(found.error, BadRequest):
        raise found.error
    raise Refused(found.message, 500)


def _version(data: bytes) -> str:
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or set(body) != {"version"}:
            raise ValueError("the body must be {'version': NAME}")
        return check_name(body["version"])
    except (ValueError, RecursionError) as error:
        raise BadRequest(sentence(error), "version") from None
