"""The folders that a run writes into, and what it goes on from there with."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from typing import Any

from cptrain.models.shape import ModelShape
from cptrain.train.settings import TrainSettings

logger = logging.getLogger(__name__)


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


def plain_shape(shape: ModelShape) -> dict[str, Any]:
    """The shape as a checkpoint keeps it."""
    return json.loads(json.dumps(asdict(shape)))


def warn_of_other_shape(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Name what tensors of equal shapes do not tell apart: heads, rope, windows. theirs: {} where nothing is known.

    Only a warning: a longer context is trained with another rope_theta.
    """
    differing = [key for key in {**theirs, **ours} if theirs and theirs.get(key) != ours.get(key)]
    if differing:
        was = ", ".join(f"{key} = {theirs.get(key, 'unset')} (here {ours.get(key, 'unset')})" for key in differing)
        logger.warning(f"resuming a model that was trained with other settings: {was}")
