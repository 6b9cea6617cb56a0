"""seccomp: which system calls a program's process may make.

Owns the list of what is allowed; everything else fails with EPERM, so that a call which a later kernel adds is refused,
too. The filter is a few lines of classic BPF made here. The bindings of libseccomp were considered: they need that
library on the machine, and build the same program a hundred times slower, while a fixed list needs no compiler.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Sequence

from rl4dlm.grading.sandbox.kernel import CLONE_THREAD, MACHINE, PR_SET_NO_NEW_PRIVS, call, prctl

# Name: number on x86_64, on aarch64 (None: it has no such call).
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "munmap": (11, 215), "brk": (12, 214), "futex": (202, 98), "newfstatat": (262, 79),
    "getdents64": (217, 61), "madvise": (28, 233), "mprotect": (10, 226), "mremap": (25, 216),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "exit_group": (231, 94),
    "exit": (60, 93), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "clock_getres": (229, 114),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "getrandom": (318, 278),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "stat": (4, None), "lstat": (6, None), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "getdents": (78, None), "readlink": (89, None), "readlinkat": (267, 78), "statfs": (137, 43),
    "fstatfs": (138, 44), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None),
    "symlinkat": (266, 36), "link": (86, None), "linkat": (265, 37), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fsync": (74, 82), "fdatasync": (75, 83), "flock": (73, 32), "umask": (95, 166), "pipe": (22, None),
    "pipe2": (293, 59), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "select": (23, None),
    "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210), "getpid": (39, 172),
    "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, None), "uname": (63, 160), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "getrusage": (98, 165), "times": (100, 153), "sysinfo": (99, 179), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sigaltstack": (131, 132), "arch_prctl": (158, None), "set_tid_address": (218, 96), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "restart_syscall": (219, 128), "pause": (34, None),
    "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102), "wait4": (61, 260), "waitid": (247, 95),
    "membarrier": (324, 283), "mincore": (27, 232),
}  # fmt: skip

# Of these a filter looks at one argument: its number, and the values that are allowed.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # not those that choose whom a file's signals go to
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, how wide, how much waits, non-blocking
CHECKED: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    "fcntl": ((72, 25), 1, _FCNTL),
    "ioctl": ((16, 29), 1, _IOCTL),
    "prctl": ((157, 167), 0, (15, 16)),  # a thread's name
    "prlimit64": ((302, 261), 0, (0,)),  # of this process
}
# Only to this process: abort() and raise() need it.
_TO_ITSELF = {"kill": (62, 129), "tgkill": (234, 131)}
_CLONE, _CLONE3, _SOCKETPAIR = (56, 220), (435, 435), (53, 199)
# Opening a file: the numbers, and the argument that has the flags.
OPENING: dict[str, tuple[tuple[int | None, int | None], int]] = {"open": ((2, None), 1), "openat": ((257, 56), 2)}

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _JUMP, _EQUAL, _AT_LEAST, _SET, _AND, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_RETURN_ALLOW = struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW)
_RETURN_EPERM = struct.pack("=HBBI", _RETURN, 0, 0, _ERRNO | errno.EPERM)


_PID = 0x7FFFFFF1  # stands for the process's id in a template


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _only(argument: int, values: Sequence[int]) -> list[bytes]:
    """Allows a call where an argument, of 32 bits, has one of these values."""
    rows = [_instruction(_EQUAL, value, len(values) - row, 0) for row, value in enumerate(values)]
    return [_instruction(_LOAD, 16 + 8 * argument), *rows, _RETURN_EPERM, _RETURN_ALLOW]


def _choose(bounds: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """A tree of comparisons: what to do with numbers from each bound to the next one."""
    if len(bounds) == 1:
        return bounds[0][1]
    middle = len(bounds) // 2
    left, right = _choose(bounds[:middle]), _choose(bounds[middle:])
    if len(left) < 256:
        return [_instruction(_AT_LEAST, bounds[middle][0], len(left), 0), *left, *right]
    return [_instruction(_AT_LEAST, bounds[middle][0], 0, 1), _instruction(_JUMP, len(left)), *left, *right]


@functools.cache
def template(machine: str, threads: bool = True) -> bytes:
    """The filter, as the kernel reads it, with a number in place of the process's id.

    Args:
        machine: x86_64 or aarch64.
        threads: whether they may be started.

    Raises:
        OSError: the numbers for `machine` are not known.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(f"no numbers of system calls for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    one = _instruction
    actions: dict[int | None, list[bytes]] = {
        pair[column]: [_RETURN_ALLOW] for pair in ALLOWED.values() if pair[column] is not None
    }
    actions |= {pair[column]: _only(argument, values) for pair, argument, values in CHECKED.values()}
    actions |= {pair[column]: _only(0, [_PID]) for pair in _TO_ITSELF.values()}
    actions[_CLONE[column]] = [one(_LOAD, 16), one(_SET, CLONE_THREAD, 1, 0), _RETURN_EPERM, _RETURN_ALLOW]
    if not threads:
        actions[_CLONE[column]] = [_RETURN_EPERM]
    actions[_CLONE3[column]] = [one(_RETURN, _ERRNO | errno.ENOSYS)]  # then the C library takes clone
    # Not to read and truncate at once, which the first versions of Landlock take for reading.
    for numbers, argument in OPENING.values():
        head = [one(_LOAD, 16 + 8 * argument), one(_AND, os.O_ACCMODE | os.O_TRUNC), one(_EQUAL, os.O_TRUNC, 0, 1)]
        actions[numbers[column]] = [*head, _RETURN_EPERM, _RETURN_ALLOW]
    # A connected pair of streams, which event loops wake themselves with; no other kind can name a receiver.
    pair = [one(_LOAD, 16), one(_EQUAL, 1, 0, 3), one(_LOAD, 24), one(_AND, 0xF), one(_EQUAL, 1, 1, 0)]
    actions[_SOCKETPAIR[column]] = [*pair, _RETURN_EPERM, _RETURN_ALLOW]
    bounds: list[tuple[int, list[bytes]]] = []
    # On x86_64 numbers from 2**30 on are those of another interface.
    for number in range(max(number for number in actions if number is not None) + 2):
        action = actions.get(number, [_RETURN_EPERM])
        if not bounds or bounds[-1][1] != action:
            bounds.append((number, action))
    head = [one(_LOAD, 4), one(_EQUAL, architecture, 1, 0), one(_RETURN, _KILL), one(_LOAD, 0)]
    return b"".join([*head, *_choose(bounds)])


def program(pid: int, machine: str = MACHINE, threads: bool = True) -> bytes:
    """The filter for a process, which may signal itself alone."""
    return template(machine, threads).replace(struct.pack("=I", _PID), struct.pack("=I", pid))


def install(filter_: bytes) -> None:
    """Puts this process and its threads under a filter for good.

    Raises:
        OSError: the kernel refuses.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    lines = ctypes.create_string_buffer(filter_, len(filter_))
    header = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(lines))
    call("seccomp", 1, 0, header)
