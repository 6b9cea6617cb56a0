"""What every test stands on: an offline environment, a blocked network, fixtures for recorded data and random state.

Owns nothing of the library. The environment is set before any test module is imported, since Hugging Face libraries
read it when they are imported.
"""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
    WANDB_MODE="offline",
)
# One thread: the models are tiny, and sums are taken in one order. torch reads it when it is imported, also in a child
# process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Timing is never asserted, so an example has no deadline; on CI the same examples run every time.
hypothesis.settings.register_profile("rl4dlm", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("rl4dlm")


class NetworkBlocked(RuntimeError):
    """A test reached for another machine. Not an OSError, which download code would catch and retry."""


def _is_this_machine(host: str | bytes | None) -> bool:
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else host
    if name in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _block_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket's address is a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not _is_this_machine(host):
        raise NetworkBlocked(
            f"tests work offline, but {event} was called for {host!r}; use data that the test makes itself"
        )


# An audit hook sees every socket of the process, whichever library opened it, and also outside of tests: in session
# fixtures and while modules are collected.
sys.addaudithook(_block_network)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of recorded data that may lie beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no recorded data: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def conformance_dir() -> Path:
    """The folder of conformance cases: RL4DLM_CONFORMANCE, or conformance/ in the shared folder."""
    folder = Path(os.environ.get("RL4DLM_CONFORMANCE") or ROOT.parent / "shared" / "conformance")
    if not folder.is_dir():
        pytest.skip(f"no conformance cases: {folder} is absent (set RL4DLM_CONFORMANCE to their folder)")
    return folder


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    """Fails the test if it moved the global random state of Python, numpy or torch."""
    import torch

    def states() -> dict[str, Any]:
        generator, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (the state under watch)
        return {
            "random": random.getstate(),
            "numpy.random": (generator, keys.tobytes(), position, has_gauss, gauss),
            "torch": torch.get_rng_state().numpy().tobytes(),
            "torch.cuda": [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
            if torch.cuda.is_initialized()
            else None,
        }

    before = states()
    yield
    after = states()
    moved = [name for name in before if before[name] != after[name]]
    assert not moved, f"global random state was used: {', '.join(moved)}"


# --- the report on recorded cases, also where tests run in several processes (pytest-xdist) ---------------------------


def pytest_collection_finish() -> None:
    """Takes what the libraries and the tests have made on import out of later collections of garbage.

    Every training begins with one, which else goes through all of it: two thirds of the time of a test that trains.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    from tests.conformance import report

    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["conformance"] = report.found()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    from tests.conformance import report

    if "conformance" in getattr(node, "workeroutput", {}):  # a worker that crashed has sent nothing
        report.add(node.workeroutput["conformance"])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Shows what was reproduced, what a rule explains and what is not covered."""
    from tests.conformance import report
    from tests.conformance.cases import not_covered

    if report.equal or report.explained:
        terminalreporter.section("conformance")
        for line in report.lines(not_covered()):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _log_levels_are_nobody_s() -> None:
    """A script that a test runs in this process may have quietened the library's log."""
    logging.getLogger("rl4dlm").setLevel(logging.NOTSET)
