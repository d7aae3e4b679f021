"""A hold of a folder, which ends with the process that has it, however that ends."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

logger = logging.getLogger("cptrain")


class FolderLock:
    """An exclusive lock by a file in the folder, which stays there.

    Where the file system has no locks, that is warned of and everybody may have it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def take(self, *, patience_s: float = 0.0) -> str:
        """Hold it; returns who does where another one does so for longer than that. OSError if it cannot be opened."""
        lock = _open(self.path)
        give_up = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    holder = lock.read().strip() or "another process"
                    lock.close()
                    return holder
                time.sleep(0.1)
            except OSError as error:
                folder, why = self.path.parent, error.strerror
                logger.warning("%s has no locks (%s): see to it that only one job writes there", folder, why)
                break
        if lock.writable():
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        self._file = lock
        return ""

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.release()


def _open(path: Path) -> IO[str]:
    """Made where it is not there; one that somebody else made need not be writable to be locked."""
    try:
        with path.open("x", encoding="utf-8"):
            pass
    except FileExistsError:
        pass
    return path.open("r+" if os.access(path, os.W_OK) else "r", encoding="utf-8")
