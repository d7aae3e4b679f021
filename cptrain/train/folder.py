"""The folders that a run writes into."""

from __future__ import annotations

import tempfile

from cptrain.train.settings import TrainSettings


def make_folders(settings: TrainSettings) -> None:
    """The run's folders, found to be writable before hours of work are to be written there; ValueError if not."""
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
