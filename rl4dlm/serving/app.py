"""The HTTP side: paths, statuses, streams, and a line per request in the log, with counts and without text.

Owns what happens between a request and the worker. This file imports FastAPI, which is an extra.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rl4dlm.rollout.backends.http import ABOUT, ROLLOUTS, WEIGHTS
from rl4dlm.serving import answers
from rl4dlm.serving.answers import Answer
from rl4dlm.serving.fields import Ask, BadRequest, Served, read, settles
from rl4dlm.serving.training import Training, add_training, body_of, refusal
from rl4dlm.serving.worker import Done, Event, Failed, Job, Part, Refused, Worker

logger = logging.getLogger(__name__)

MAX_BODY = 8 * 2**20
"""Bytes of a request's body at most."""


def make_app(served: Served, worker: Worker, training: Training | None = None) -> FastAPI:
    """The application: `/v1/completions`, `/v1/chat/completions`, `/v1/models` and `/health`; for those who know the
    token also `/v1/training`, `/v1/training/rollouts` and `/v1/training/weights`, unless `training` is None."""
    app = FastAPI(title="rl4dlm", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, problem: Exception) -> Response:
        status = problem.status_code if isinstance(problem, HTTPException) else getattr(problem, "status_code", 404)
        paths = "GET /health, GET /v1/models, POST /v1/completions, POST /v1/chat/completions"
        if training is not None:
            paths += f", GET {ABOUT}, POST {ROLLOUTS}, POST {WEIGHTS}"
        return refusal(f"{request.method} {request.url.path} is not served; allowed: {paths}", status)

    @app.get("/health")
    async def health() -> Response:
        state = "draining" if worker.draining else "ok"
        return JSONResponse({"status": state, "unfinished": worker.unfinished}, 503 if worker.draining else 200)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [answers.model_card(served, started)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != served.name:
            return refusal(f"model={name!r} is not served here; allowed: {served.name!r}", 404, "model")
        return JSONResponse(answers.model_card(served, started))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, chat=True)

    if training is not None:
        add_training(app, training, served, worker)

    async def _answer(request: Request, *, chat: bool) -> Response:
        begun = time.monotonic()
        path = "/v1/chat/completions" if chat else "/v1/completions"
        try:
            body = await _body(request)
            ask = await run_in_threadpool(read, served, body, chat=chat)
            events: asyncio.Queue[Event] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def tell(event: Event) -> None:
                loop.call_soon_threadsafe(events.put_nowait, event)

            job = Job(
                ask,
                tell,
                parts=ask.streams and settles(ask.config, served.tokenizer),
            )
            worker.submit(job)
        except BadRequest as problem:
            logger.info("%s %d %s", path, problem.status, problem.field or "")
            return refusal(str(problem), problem.status, problem.field)
        except Refused as problem:
            logger.info("%s %d", path, problem.status)
            return refusal(str(problem), problem.status)
        except Exception as problem:
            logger.error("%s 500 %s", path, type(problem).__name__)
            return refusal(f"the request could not be read: {type(problem).__name__}", 500)
        answer = Answer(served, ask, uuid.uuid4().hex, int(time.time()))
        if ask.streams:
            return StreamingResponse(_stream(job, events, answer, path, begun), media_type="text/event-stream")
        try:
            outcome = await events.get()
        except asyncio.CancelledError:
            job.cancelled = True
            raise
        if not isinstance(outcome, Done):
            assert isinstance(outcome, Failed)
            logger.info("%s 500", path)
            return refusal(outcome.message, 500)
        said = await run_in_threadpool(answer.whole, outcome.rows)
        _log(path, ask, outcome, begun)
        return JSONResponse(said)

    return app


async def _stream(
    job: Job, events: asyncio.Queue[Event], answer: Answer, path: str, begun: float
) -> AsyncIterator[str]:
    """Server-sent events: each block as it is finished, then the end of each row."""
    try:
        for chunk in answer.opening():
            yield answers.event(chunk)
        while isinstance(outcome := await events.get(), Part):
            for chunk in answer.part(outcome):
                yield answers.event(chunk)
        if isinstance(outcome, Failed):
            logger.info("%s failed", path)
            yield answers.event(answers.error(outcome.message, 500))
            return
        assert isinstance(outcome, Done)
        for chunk in answer.closing(outcome.rows):
            yield answers.event(chunk)
        yield answers.END
        _log(path, job.ask, outcome, begun)
    finally:
        job.cancelled = True  # of no effect on one that has ended


async def _body(request: Request) -> Any:
    """The JSON of a request. Raises BadRequest."""
    data = await body_of(request, MAX_BODY)
    try:
        body = json.loads(data)
        if b"\\u" in data:  # half of a pair of escapes is no character, and could not be answered either
            json.dumps(body, ensure_ascii=False).encode()
        return body
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON in UTF-8; it must be a JSON object") from None


def _log(path: str, ask: Ask, outcome: Done, begun: float) -> None:
    counts = answers.usage(ask, outcome.rows)
    logger.info(
        "%s 200 rows=%d prompt_tokens=%d completion_tokens=%d seconds=%.3f",
        path,
        len(outcome.rows),
        counts["prompt_tokens"],
        counts["completion_tokens"],
        time.monotonic() - begun,
    )
