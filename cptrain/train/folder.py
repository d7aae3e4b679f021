"""The folders that a run writes into, and that no other run writes into meanwhile."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cptrain.checkpoint.folder_lock import FolderLock
from cptrain.train.settings import TrainSettings

LOCK = "run.lock"  # beside the checkpoints' own one, which is held for a save
PATIENCE_S = 10.0  # with a run that was killed and is on its way out


class Folders:
    """The folders of a run, as rank 0 holds them."""

    def __init__(self) -> None:
        self._locks: list[FolderLock] = []

    def take(self, settings: TrainSettings) -> None:
        """Make them and hold them until `release`, or until this process ends, however it does.

        ValueError where one cannot be written, before hours of work are to be written there, or where another run does.
        """
        wanted = {"job.dump_folder": settings.job.folder}
        if settings.checkpoint.enable:
            wanted["checkpoint.folder"] = settings.checkpoint.below(settings.job.folder)
        try:
            for key, folder in wanted.items():
                holder = ""
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryFile(dir=folder):
                        pass
                    if not self._holds(folder.resolve()):
                        self._locks.append(FolderLock(folder.resolve() / LOCK))
                        holder = self._locks[-1].take(patience_s=PATIENCE_S)
                except OSError as error:
                    raise ValueError(
                        f"{folder}: {error.strerror or error}; set {key} to a folder that you may write"
                    ) from error
                if holder:
                    another = "job.name" if folder == settings.job.folder else key
                    raise ValueError(
                        f"{folder}: {holder} writes here; wait for its end, or set another {another} "
                        f"(if it is gone for sure, remove {folder / LOCK})"
                    )
        except ValueError:
            self.release()
            raise

    def _holds(self, folder: Path) -> bool:
        return any(folder.is_relative_to(lock.path.parent) for lock in self._locks)

    def release(self) -> None:
        """Let other runs have them."""
        for lock in self._locks:
            lock.release()
        self._locks = []
