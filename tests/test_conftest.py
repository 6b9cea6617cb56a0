"""The test environment itself: the network is blocked and a moved global random state is noticed."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "example.invalid"])
def test_no_connection_leaves_this_machine(host):
    with pytest.raises(RuntimeError, match="offline.*" + host):
        socket.create_connection((host, 80), timeout=1)


def test_a_datagram_does_not_leave_either():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, pytest.raises(RuntimeError, match="offline"):
        sender.sendto(b"x", ("192.0.2.1", 9))


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass


def test_hugging_face_libraries_are_offline():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_global_draw_fails_the_test_that_made_it(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    pytester.makeconftest("from tests.conftest import global_rng_untouched")
    pytester.makepyfile(
        """
        import random, numpy, pytest, torch

        DRAWS = {"random": random.random, "numpy": numpy.random.rand, "torch": lambda: torch.rand(1)}

        @pytest.mark.parametrize("library", DRAWS)
        def test_global(library, global_rng_untouched):
            DRAWS[library]()

        def test_own(global_rng_untouched):
            random.Random(0).random(), numpy.random.default_rng(0).random(), torch.rand(1, generator=torch.Generator())
        """
    )
    # A process of its own: numpy and torch cannot be imported twice in one.
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=4, errors=3)
