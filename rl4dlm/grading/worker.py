"""The process behind `rl4dlm.grading.pool`: reads items from standard input, writes results to standard output.

Owns the limits that hold a function which misbehaves: memory, processor time, no file written, no process started, a
last alarm, and no way to write into the protocol.
Deadlines are kept by the pool, which kills this process. Run as `python worker.py module:function memory_bytes`.

One line of JSON each way: `{"item": ..., "alarm": seconds}` is answered by `{"value": ...}` or `{"error": "..."}`; the
first line, `{}` or an error, says whether the function could be imported.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve requests until standard input closes."""
    function_name, memory_bytes = sys.argv[1], int(sys.argv[2])
    # What the function prints must not mix with the replies, nor may it read the requests.
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end, also on Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    # The parent may have found this package without its being installed; last, so that it shadows nothing.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    try:
        module, _, name = function_name.partition(":")
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        reply(error=_describe(error))
        return
    sys.dont_write_bytecode = True
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, 0)  # the superuser is not held by this one; the pool kills the whole group
    reply()
    for line in requests:
        request = json.loads(line)
        # If the parent has died, no one is left to keep the deadline.
        signal.setitimer(signal.ITIMER_REAL, request["alarm"])
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + request["alarm"]) + 1)
        try:
            result = {"value": function(request["item"])}
            json.dumps(result)
        except (Exception, SystemExit) as error:
            result = {"error": _describe(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(**result)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _limit(kind: int, size: int) -> None:
    try:
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
    except (ValueError, OSError):
        logging.getLogger(__name__).debug("this system does not limit resource %d", kind)


if __name__ == "__main__":
    main()
