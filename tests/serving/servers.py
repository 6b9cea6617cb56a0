"""A server in a thread, that a trainer may ask for rollouts and that may be killed."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

from rl4dlm import DecodingConfig, RolloutEngine, tiny_tokenizer
from rl4dlm.rollout.backends.weights import Receiver
from rl4dlm.serving.fields import Served
from rl4dlm.serving.worker import Worker

TOKEN = "a token that nobody guesses"


class Running:
    """On a free port, with a model that it may change, and a folder that weights come in."""

    def __init__(self, model: Any, folder: Path | None, port: int = 0) -> None:
        from rl4dlm.serving.app import make_app
        from rl4dlm.serving.server import Server, bound_socket
        from rl4dlm.serving.training import Training

        engine = RolloutEngine(model)
        config = DecodingConfig(canvas_length=8, steps=4, temperature=1.0)
        self.model, self.before_rollout = model, lambda: None
        decode = engine.generate

        def generate(*given: Any, **options: Any) -> Any:
            self.before_rollout()
            return decode(*given, **options)

        engine.generate = generate  # type: ignore[method-assign]
        self.served = Served(engine.model, tiny_tokenizer(), engine.spec, "org/tiny", config)
        self.worker = Worker(engine, batch_rows=64, max_waiting=8, gather=0.0)
        self.receiver = None if folder is None else Receiver(engine.model, folder)
        training = None if self.receiver is None else Training(TOKEN, self.receiver)
        self.server = Server(make_app(self.served, self.worker, training), self.worker)
        self.listener = bound_socket("127.0.0.1", port)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @staticmethod
    def receiver_of(model: Any, folder: Path) -> Receiver:
        """What a server would read weights with."""
        return Receiver(RolloutEngine(model).model, folder)

    def end(self) -> None:
        """As at SIGTERM."""
        if self.thread.is_alive():
            self.server.handle_exit(signal.SIGTERM, None)
            self.thread.join(60)
        assert not self.thread.is_alive()
        self.worker.close()
        self.listener.close()
