"""The server's life: it listens, and at SIGTERM or SIGINT finishes what it has begun.

Owns signals and the order in which things end. This file imports uvicorn, which is an extra.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from rl4dlm.serving.worker import Worker

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """Serves an application until a signal; then refuses new requests and ends when none is unfinished.

    Args:
        app: an ASGI application. worker: told to take no more requests.
    """

    def __init__(self, app: Any, worker: Worker) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        self.worker = worker

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own closes the socket at once and raises the signal again at the end, so that clients would find
        nobody there and the exit status would be that of a killed process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal lets running requests finish; a second one does not."""
        if self.worker.draining:
            self.should_exit = self.force_exit = True
        self.worker.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether the server shall end."""
        if self.worker.draining and not self.worker.unfinished:
            self.should_exit = True  # uvicorn still waits for responses that are on their way
        ended: bool = await super().on_tick(counter)
        return ended


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody else can take any more; 0 is any free port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(f"host={host!r}, port={port} cannot be listened at: {error}") from None
    return made
