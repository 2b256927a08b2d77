"""Files that are complete or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` in one step when the block ends without an exception."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # A full disk names no file, a missing folder the partial one.
        if isinstance(error, OSError) and error.filename in (None, str(partial), partial):
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with replaced(path) as partial:
        partial.write_bytes(content)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: they are then there after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
