"""The folders that a run writes into, and that no other run writes into meanwhile."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import IO

from cptrain.train.settings import TrainSettings

logger = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE_S = 10.0  # for worker processes of a run that was killed, which hold its lock until they notice
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Folders:
    """The folders of a run, as rank 0 holds them."""

    def __init__(self) -> None:
        self._locks: list[IO[str]] = []

    def take(self, settings: TrainSettings) -> None:
        """Make them and hold them until `release`, or until this process ends, however it does.

        ValueError where one cannot be written, before hours of work are to be written there, or where another run does.
        """
        wanted = {"job.dump_folder": settings.job.folder}
        if settings.checkpoint.enable:
            wanted["checkpoint.folder"] = settings.job.folder / settings.checkpoint.folder
        for key, folder in wanted.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise ValueError(
                    f"{folder}: {error.strerror or error}; set {key} to a folder that you may write"
                ) from error
        held = settings.job.folder.resolve()
        self._lock(settings.job.folder, "job.name")
        for key, folder in wanted.items():
            if not folder.resolve().is_relative_to(held):
                self._lock(folder, key)

    def release(self) -> None:
        """Let other runs have them."""
        for lock in self._locks:
            lock.close()
        self._locks = []

    def __del__(self) -> None:
        self.release()  # of a trainer that was refused for something else

    def _lock(self, folder: Path, key: str) -> None:
        lock = (folder / LOCK).open("a+", encoding="utf-8")
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    logger.warning(f"{folder}: cannot be locked ({error.strerror}); see to it that one run uses it")
                    lock.close()
                    return
                if time.monotonic() > give_up:
                    lock.seek(0)
                    holder = lock.read().strip() or "another run"
                    lock.close()
                    raise ValueError(
                        f"{folder}: {holder} writes here; wait for its end, or set another {key}"
                    ) from error
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._locks.append(lock)
