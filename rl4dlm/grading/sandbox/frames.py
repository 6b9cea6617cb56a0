"""Messages on a stream: four bytes of length, and so many bytes."""

from __future__ import annotations

import os
import struct


def read_frame(handle: int, most: int = 1 << 26) -> bytes:
    """A message.

    Raises:
        EOFError: the other side has closed.
        ValueError: it is longer than `most`.
    """
    (length,) = struct.unpack("!I", _read(handle, 4))
    if length > most:
        raise ValueError(f"a message of {length} bytes is too long")
    return _read(handle, length)


def write_frame(handle: int, text: bytes) -> None:
    """The counterpart of `read_frame`."""
    left = memoryview(struct.pack("!I", len(text)) + text)
    while left:
        left = left[os.write(handle, left) :]


def _read(handle: int, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        more = os.read(handle, min(count - len(found), 1 << 20))
        if not more:
            raise EOFError("the other side has closed")
        found += more
    return bytes(found)
