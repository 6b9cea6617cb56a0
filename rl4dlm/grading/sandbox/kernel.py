"""Calls to the Linux kernel that Python has no function for.

Owns the C library's handle, numbers of system calls and flags, and errors that name the call. Imported by the sandbox's
server, which has nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys

CLONE_THREAD, CLONE_NEWNS = 0x10000, 0x20000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
READ_ANYWHERE = 1 << 2  # the capability to pass folders and read files whatever their mode

MACHINE = os.uname().machine if os.name == "posix" else ""
# x86_64, aarch64
_NUMBERS = {
    "clone": (56, 220),
    "capget": (125, 90),
    "capset": (126, 91),
    "pivot_root": (155, 41),
    "seccomp": (317, 277),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(MACHINE)

# PyDLL keeps the interpreter's lock, which a forked child must hold.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def supported() -> bool:
    """Whether the numbers of system calls are known for this machine."""
    return sys.platform == "linux" and _COLUMN is not None


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A system call by name.

    Raises:
        OSError: it failed; the error names it.
    """
    if _COLUMN is None:
        raise OSError(f"no numbers of system calls for {MACHINE}")
    wide = [ctypes.c_ulong(a & (2**64 - 1)) if isinstance(a, int) else a for a in arguments]
    result = int(_libc.syscall(ctypes.c_long(_NUMBERS[name][_COLUMN]), *wide))
    return _checked(result, name)


def unshare(flags: int) -> None:
    """Moves this process into namespaces of its own."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    texts = [None if text is None else text.encode() for text in (source, kind, options)]
    _checked(
        _libc.mount(texts[0], target.encode(), texts[1], ctypes.c_ulong(flags), texts[2]),
        f"mount {kind or ''} {target}",
    )


def unmount(target: str) -> None:
    """Detaches a mount."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def prctl(option: int, value: int = 0) -> None:
    """prctl(2) with one argument."""
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def capabilities() -> int:
    """Those that this process may use, as a mask."""
    found = ctypes.create_string_buffer(24)
    call("capget", struct.pack("=Ii", 0x20080522, 0), found)
    return int(struct.unpack("=6I", found.raw)[1])


def drop_capabilities(kept: int = 0) -> None:
    """Leaves this process, which may get no new privileges, without any capability but those of a mask."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    call("capset", struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def clone(flags: int) -> int:
    """Like `os.fork`, into new namespaces."""
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid = int(_libc.syscall(ctypes.c_long(_NUMBERS["clone"][_COLUMN or 0]), ctypes.c_ulong(flags | 17), 0, 0, 0, 0))
    number = ctypes.get_errno()
    if pid == 0:
        api.PyOS_AfterFork_Child()
    else:
        api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


LOOK = 0.002  # seconds between two looks at a process without a handle


def process_handle(pid: int) -> int:
    """A file that can be read once a child has ended; -1 where the system has none, and `has_ended` must be asked."""
    with contextlib.suppress(AttributeError, OSError):
        return os.pidfd_open(pid)
    return -1


def has_ended(pid: int) -> bool:
    """Whether a child has, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what.strip()}: {os.strerror(number)}")
    return result
