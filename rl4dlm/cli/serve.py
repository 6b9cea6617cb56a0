"""`rl4dlm serve`: a checkpoint behind an OpenAI-compatible server; what it does is in `rl4dlm.serving`."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from rl4dlm import resources
from rl4dlm._optional import require
from rl4dlm.cli.decoding import add_decoding_flags, count, decoding_settings, device_of, seconds

BATCH_ROWS = 32


def add_serve_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Serve a checkpoint to OpenAI's clients: completions and chat completions (the extra serve)."
    command = commands.add_parser("serve", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=run)
    add = command.add_argument
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--served-name", metavar="NAME", help="what requests call it (default: what --model says)")
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    add("--port", type=int, default=8000, help="0 is any free one (default: %(default)s)")
    add("--max-choices", type=count, default=64, metavar="N", help="completions of a request (default: %(default)s)")
    add("--max-waiting", type=count, default=256, metavar="N", help="requests that may wait (default: %(default)s)")
    add("--gather", type=seconds, default=0.01, metavar="SECONDS", help="wait for more requests (default: %(default)s)")
    add(
        "--training-folder",
        metavar="FOLDER",
        help="let trainers that know RL4DLM_ROLLOUT_TOKEN ask for rollouts and hand over weights in this folder",
    )
    add("--steps", type=count, metavar="N", help="denoising steps (default: half the canvas)")
    add_decoding_flags(add, seed=None, seed_help="of requests that name none (default: each draws its own)")


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT, and ends with status 0 once what was begun is finished."""
    for module in ("fastapi", "uvicorn"):
        require(module, extra="serve", purpose="rl4dlm serve")
    from rich.console import Console

    from rl4dlm.cli.arguments import mapping
    from rl4dlm.models.loading import check_tokenizer, load_denoiser, load_tokenizer
    from rl4dlm.models.taught import warn_of_canvas
    from rl4dlm.rollout.backends.http import TOKEN, check_token
    from rl4dlm.rollout.backends.weights import Receiver
    from rl4dlm.rollout.decoding import DecodingConfig
    from rl4dlm.rollout.engine import RolloutEngine
    from rl4dlm.serving.app import make_app
    from rl4dlm.serving.fields import Served
    from rl4dlm.serving.server import Server, bound_socket
    from rl4dlm.serving.training import Training
    from rl4dlm.serving.worker import Worker

    # Everything that can be wrong is looked at before weights are read.
    device = device_of(arguments.device)
    config = DecodingConfig(steps=arguments.steps, **decoding_settings(arguments))
    template = mapping("chat-template-kwargs", arguments.chat_template_kwargs)
    if arguments.num_samples != 1:
        raise ValueError(f"num-samples={arguments.num_samples} has no meaning here; a request's `n` says how many")
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"port={arguments.port} is not allowed; it must be 0 to 65535")
    name = arguments.model if arguments.served_name is None else arguments.served_name
    if not name:
        raise ValueError(f"served-name={name!r} is not allowed; it must have at least one character")
    folder, token = arguments.training_folder, os.environ.get(TOKEN)
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"training-folder={folder!r} is not a folder; it is one that trainers write weights into")
    if folder is not None and not token:
        raise ValueError(f"training-folder={folder!r} needs {TOKEN} in the environment: who knows it may set weights")
    if folder is not None and token:
        check_token(token)

    console = Console(stderr=True)
    with bound_socket(arguments.host, arguments.port) as listener:
        with console.status(f"loading {arguments.model}"):
            path = resources.model_folder(arguments.model)
            tokenizer = load_tokenizer(path)
            model = load_denoiser(path, dtype=arguments.dtype, device=device).eval()
        batch_rows = arguments.batch_rows or BATCH_ROWS
        engine = RolloutEngine(model, max_batch_rows=batch_rows)
        check_tokenizer(tokenizer, engine.spec)
        config.for_model(engine.spec)
        warn_of_canvas(model, config.canvas_length)
        served = Served(
            engine.model,
            tokenizer,
            engine.spec,
            name,
            config,
            seed=arguments.seed,
            max_choices=arguments.max_choices,
            chat_template_kwargs=template,
        )
        worker = Worker(engine, batch_rows=batch_rows, max_waiting=arguments.max_waiting, gather=arguments.gather)
        training = Training(token, Receiver(engine.model, folder)) if folder is not None and token else None
        server = Server(make_app(served, worker, training), worker)
        host, port = listener.getsockname()[:2]
        logs, handler = logging.getLogger("rl4dlm.serving"), logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = logs.level
        logs.addHandler(handler)
        logs.setLevel(logging.INFO)
        try:
            console.print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", markup=False)
            server.run(sockets=[listener])
            if server.force_exit:
                return 1
            worker.close()
        finally:
            logs.removeHandler(handler)
            logs.setLevel(level)
    return 0
