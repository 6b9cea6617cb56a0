"""The filter of system calls, run here instruction by instruction, allows the list and nothing else."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import struct

import pytest

from rl4dlm.grading.sandbox import seccomp
from rl4dlm.grading.sandbox.seccomp import ALLOWED, CHECKED, OPENING, program

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMN = {"x86_64": 0, "aarch64": 1}


def decide(filter_: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a filter returns for a call: classic BPF, as far as it is used."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(*arguments, *[0] * (6 - len(arguments))))
    lines = [struct.unpack_from("=HBBI", filter_, 8 * row) for row in range(len(filter_) // 8)]
    at, held = 0, 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        if code == 0x20:
            (held,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            held &= value
        elif code == 0x05:
            at += value
        elif code == 0x06:
            return value
        else:
            holds = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code]
            at += yes if holds else no


@pytest.mark.parametrize("machine", ARCHITECTURE)
def test_what_is_allowed(machine: str) -> None:
    filter_, column = program(77, machine), COLUMN[machine]
    assert len(filter_) // 8 < 4096  # as many as the kernel takes
    listed = {pair[column] for pair in ALLOWED.values()}
    special = {pair[column] for pair, _, _ in CHECKED.values()}
    special |= {pair[column] for pair, _ in OPENING.values()}
    special |= {pair[column] for pair in (*seccomp._TO_ITSELF.values(), seccomp._CLONE, seccomp._SOCKETPAIR)}
    for number in [*range(700), 0x40000000, 0x40000027, 2**32 - 1]:
        result = decide(filter_, ARCHITECTURE[machine], number, 2**32 - 1, 2**32 - 1)
        if number in listed:
            assert result == ALLOW, number
        elif number == 435:
            assert result == ENOSYS
        elif number in special:
            continue
        else:
            assert result == EPERM, number
    other = next(value for name, value in ARCHITECTURE.items() if name != machine)
    assert decide(filter_, other, 0) == KILL
    assert decide(filter_, 0x40000003, 0) == KILL  # 32 bits


@pytest.mark.parametrize("machine", ARCHITECTURE)
def test_what_depends_on_an_argument(machine: str) -> None:
    filter_, column, architecture = program(77, machine), COLUMN[machine], ARCHITECTURE[machine]

    def result(pair: tuple[int | None, int | None], *arguments: int) -> int:
        return decide(filter_, architecture, pair[column] or 0, *arguments)

    for pair, argument, values in CHECKED.values():
        before = (0,) * argument
        assert {result(pair, *before, value) for value in values} == {ALLOW}
        assert {
            result(pair, *before, value)
            for value in (*range(64), *range(1020, 1040), *range(0x5400, 0x5460))
            if value not in values
        } == {EPERM}
    for pair in seccomp._TO_ITSELF.values():
        assert result(pair, 77, 9) == ALLOW
        assert {result(pair, value, 9) for value in (0, 1, 76, 78, 2**32 - 1)} == {EPERM}
    for pair, argument in OPENING.values():
        if pair[column] is not None:
            flags = [os.O_RDONLY, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT, os.O_RDONLY | os.O_CLOEXEC]
            assert {result(pair, *(0,) * argument, flag) for flag in flags} == {ALLOW}
            assert result(pair, *(0,) * argument, os.O_RDONLY | os.O_TRUNC | os.O_CLOEXEC) == EPERM
    assert result(seccomp._CLONE, 0x3D0F00) == ALLOW  # a thread
    assert {result(seccomp._CLONE, flags) for flags in (17, 0x1200011, 0x10000000, 0x4111)} == {EPERM}
    assert result(seccomp._SOCKETPAIR, 1, 0x80801) == ALLOW
    assert {result(seccomp._SOCKETPAIR, *p) for p in ((1, 2), (1, 5), (2, 1), (16, 3))} == {EPERM}


@pytest.mark.parametrize("machine", ARCHITECTURE)
def test_numbers_are_those_of_libseccomp(machine: str) -> None:
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("no libseccomp on this machine")
    library = ctypes.CDLL(name)
    pairs = ALLOWED | {name: pair for name, (pair, _, _) in CHECKED.items()} | seccomp._TO_ITSELF
    pairs |= {name: pair for name, (pair, _) in OPENING.items()}
    pairs |= {"clone": seccomp._CLONE, "clone3": seccomp._CLONE3, "socketpair": seccomp._SOCKETPAIR}
    known = {}
    for call in pairs:
        number = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(ARCHITECTURE[machine]), call.encode())
        known[call] = number if number >= 0 else None
    assert known == {name: pair[COLUMN[machine]] for name, pair in pairs.items()}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_threads_can_be_refused(machine: str) -> None:
    number = seccomp._CLONE[COLUMN[machine]]
    for threads, expected in ((True, ALLOW), (False, EPERM)):
        assert decide(program(42, machine, threads), ARCHITECTURE[machine], number, 0x3D0F00) == expected
