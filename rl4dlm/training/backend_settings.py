"""Settings of where rollouts come from. What they do is in `backends.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rl4dlm.likelihood.masks import check_choice
from rl4dlm.rollout.backends.http import check_url

BACKENDS = ("in_process", "http", "vllm", "sglang")


@dataclass
class BackendSettings:
    """What every RL config has besides.

    Args:
        rollout_backend: who decodes rollouts: `"in_process"`, the engine with the policy itself; `"http"`, a server of
            this library (`rl4dlm serve --training-folder`), which may be on another machine and is handed the weights
            of each version; `"vllm"` and `"sglang"`, servers of these libraries, whose rollouts have no record
            (`rl4dlm.rollout.backends.engines`). The token is no setting, but the environment's `RL4DLM_ROLLOUT_TOKEN`.
        rollout_url: of the server.
        rollout_weights_dir: the folder that weights are written into, which the server sees, too, under whatever path.
        rollout_timeout: seconds that a request may be without an answer before the run is given up.
    """

    rollout_backend: str = field(
        default="in_process",
        metadata={"help": "Who decodes rollouts: this process, or a server.", "choices": [*BACKENDS]},
    )
    rollout_url: str | None = field(default=None, metadata={"help": "Of the rollout server: http://HOST:PORT."})
    rollout_weights_dir: str | None = field(
        default=None, metadata={"help": "Folder shared with the rollout server, where weights are written."}
    )
    rollout_timeout: float = field(
        default=1800.0, metadata={"help": "Seconds that the rollout server may take for an answer."}
    )


def check_backend_settings(config: Any) -> None:
    """Raises ValueError for settings that are not allowed, or that would do nothing."""
    check_choice("rollout_backend", config.rollout_backend, BACKENDS)
    if config.rollout_backend == "in_process":
        idle = {"rollout_url": None, "rollout_weights_dir": None, "rollout_timeout": 1800.0}
        for name, default in idle.items():
            if getattr(config, name) != default:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} has no effect with rollout_backend='in_process'; choose one of "
                    f"{', '.join(BACKENDS[1:])}, or leave it out"
                )
        return
    for name in ("rollout_url", "rollout_weights_dir"):
        if not getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not allowed with rollout_backend={config.rollout_backend!r}; "
                + ("http://HOST:PORT is needed" if name == "rollout_url" else "a folder that the server sees is needed")
            )
    check_url(config.rollout_url)
    if not 0 < config.rollout_timeout < math.inf:
        raise ValueError(
            f"rollout_timeout={config.rollout_timeout} is not allowed; it must be larger than 0, and finite"
        )
    for name, default in (("rollout_batch_size", None), ("rollout_compile", None)):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not allowed with rollout_backend={config.rollout_backend!r}: it "
                "is the server's own business; leave it out"
            )
