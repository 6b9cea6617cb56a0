"""seccomp: which system calls a program's process may make.

Owns the list of what is allowed; everything else fails with EPERM, so that a call which a later kernel adds is refused,
too. The filter is a few lines of classic BPF made here. The bindings of libseccomp were considered: they need that
library on the machine, and build the same program a hundred times slower, while a fixed list needs no compiler.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from rl4dlm.grading.sandbox.kernel import CLONE_THREAD, MACHINE, PR_SET_NO_NEW_PRIVS, call, prctl

# Name: number on x86_64, on aarch64 (None: it has no such call). The frequent ones come first.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "munmap": (11, 215), "brk": (12, 214), "futex": (202, 98), "openat": (257, 56), "newfstatat": (262, 79),
    "getdents64": (217, 61), "madvise": (28, 233), "mprotect": (10, 226), "mremap": (25, 216),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "exit_group": (231, 94),
    "exit": (60, 93), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "clock_getres": (229, 114),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "getrandom": (318, 278),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "open": (2, None), "stat": (4, None), "lstat": (6, None), "statx": (332, 291),
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

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _JUMP, _EQUAL, _AT_LEAST, _SET, _AND, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def program(pid: int, machine: str = MACHINE) -> bytes:
    """The filter, as the kernel reads it.

    Args:
        pid: of the process it is for, which may signal itself alone.

    Raises:
        OSError: the numbers for `machine` are not known.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(f"no numbers of system calls for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    one = _instruction
    lines = [one(_LOAD, 4), one(_EQUAL, architecture, 1, 0), one(_RETURN, _KILL), one(_LOAD, 0)]
    if machine == "x86_64":  # the numbers of its other interface
        lines += [one(_AT_LEAST, 0x40000000, 0, 1), one(_RETURN, _EPERM)]
    numbers = [pair[column] for pair in ALLOWED.values() if pair[column] is not None]
    for chunk in (numbers[start : start + 64] for start in range(0, len(numbers), 64)):
        lines += [one(_EQUAL, number or 0, len(chunk) - row, 0) for row, number in enumerate(chunk)]
        lines += [one(_JUMP, 1), one(_RETURN, _ALLOW)]
    for numbers_of, argument, values in [
        *CHECKED.values(),
        *((pair, 0, (pid,)) for pair in _TO_ITSELF.values()),
    ]:
        body = [one(_LOAD, 16 + 8 * argument)]
        body += [one(_EQUAL, value, len(values) - row, 0) for row, value in enumerate(values)]
        body += [one(_RETURN, _EPERM), one(_RETURN, _ALLOW)]
        lines += [one(_EQUAL, numbers_of[column], 0, len(body)), *body]
    threads = [one(_LOAD, 16), one(_SET, CLONE_THREAD, 1, 0), one(_RETURN, _EPERM), one(_RETURN, _ALLOW)]
    lines += [one(_EQUAL, _CLONE[column], 0, len(threads)), *threads]
    lines += [one(_EQUAL, _CLONE3[column], 0, 1), one(_RETURN, _ENOSYS)]  # then the C library takes clone
    # A connected pair of streams, which event loops wake themselves with; no other kind can name a receiver.
    pair = [one(_LOAD, 16), one(_EQUAL, 1, 0, 3), one(_LOAD, 24), one(_AND, 0xF), one(_EQUAL, 1, 1, 0)]
    pair += [one(_RETURN, _EPERM), one(_RETURN, _ALLOW)]
    lines += [one(_EQUAL, _SOCKETPAIR[column], 0, len(pair)), *pair]
    return b"".join([*lines, one(_RETURN, _EPERM)])


def install(filter_: bytes) -> None:
    """Puts this process and its threads under a filter for good.

    Raises:
        OSError: the kernel refuses.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    lines = ctypes.create_string_buffer(filter_, len(filter_))
    header = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(lines))
    call("seccomp", 1, 0, header)
