"""Files that are on the disk, and are what they were: flushing and digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple


class Digest(NamedTuple):
    """A file's size in bytes and the SHA-256 of its content in hex."""

    size: int
    sha256: str


def digest(path: Path) -> Digest:
    """The digest of a file; OSError if it cannot be read."""
    with path.open("rb") as file:
        return Digest(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def digest_of(content: bytes) -> Digest:
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def flush(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, text: str) -> None:
    """Write a new file and flush it; the name is on the disk only once the folder is flushed too."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
