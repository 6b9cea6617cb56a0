"""Landlock: which paths a process and its children may reach.

Owns the ruleset: reading below a few folders, all but special files below a writable one, and nothing else. What newer
kernels can refuse as well (TCP, devices, signals and abstract sockets of others) is refused where there is support.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from rl4dlm.grading.sandbox.kernel import PR_SET_NO_NEW_PRIVS, call, prctl

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12  # write, remove, make folders, files, symbolic links
_FIRST = (1 << 13) - 1  # what the first version knows
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15
_TCP = 3
_SCOPES = 3  # abstract sockets and signals


def abi() -> int:
    """The version of the interface, 0 where the kernel has none or it is switched off."""
    try:
        return call("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def ruleset(version: int, readable: Sequence[str], writable: Sequence[str] = ()) -> int:
    """Rules for `restrict`, as an open file.

    Args:
        version: of the interface, from `abi`.
        readable: folders or files below which may be read.
        writable: folders below which files and folders may also be made, changed and removed.

    Raises:
        OSError: the kernel refuses.
    """
    files = _FIRST | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    files |= _IOCTL if version >= 5 else 0
    attributes = [files]
    if version >= 4:
        attributes.append(_TCP)
    if version >= 6:
        attributes.append(_SCOPES)
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    rules = call("landlock_create_ruleset", packed, len(packed), 0)
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR)
        for path in writable:
            _allow(rules, path, (_READ_FILE | _READ_DIR | _WRITE | _REFER | _TRUNCATE) & files)
    except BaseException:
        os.close(rules)
        raise
    return rules


def restrict(rules: int) -> None:
    """Restricts this process and its children for good.

    Raises:
        OSError: the kernel refuses.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    call("landlock_restrict_self", rules, 0)


def _allow(rules: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= _READ_FILE
        call("landlock_add_rule", rules, 1, struct.pack("=Qi", rights, handle), 0)
    finally:
        os.close(handle)
