"""Files and folders that appear under their name only when they are complete and on the disk.

Their modes are those that the umask leaves, as of any file that a program creates.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text, as `writing` does."""
    with writing(path) as file:
        file.write(text.encode())


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write bytes to, which replaces what is there at the end of the block; missing folders are made.

    An error or a kill within the block leaves the old file or none; once the block is over, a crash of the machine
    leaves the old one or the new one, whole.
    """
    target = Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    # Not tempfile's: it creates files for their owner alone, and the umask can only be read by setting it.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync(target.parent)


@contextmanager
def writing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which takes the place of what is there at the end of the block; as `writing` does."""
    target = Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(target)
    folder.mkdir()
    mode = folder.stat().st_mode & 0o666
    try:
        yield folder
        for found in folder.rglob("*"):
            if found.is_file():  # safetensors and others make files that only their owner can read
                found.chmod(mode)
            _sync(found)
        _sync(folder)
        if target.exists():
            retired = folder.with_name(folder.name + ".old")
            os.replace(target, retired)
            os.replace(folder, target)
            shutil.rmtree(retired)
        else:
            os.replace(folder, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")


def _sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk; some file systems cannot do it for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if path.is_dir():
            with suppress(OSError):
                os.fsync(handle)
        else:
            os.fsync(handle)
    finally:
        os.close(handle)
