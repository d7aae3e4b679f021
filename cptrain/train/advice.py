"""What a user can do about errors that are not cptrain's own: memory that runs out, ranks that wait in vain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cptrain.train.memory import ways_out
from cptrain.train.settings import TrainSettings


@contextmanager
def advised(settings: TrainSettings) -> Iterator[None]:
    """Errors that pass through are given a note, which Python prints below their traceback."""
    try:
        yield
    except RuntimeError as error:
        if note := _advice(error, settings):
            error.add_note(note)
        raise


def _advice(error: RuntimeError, settings: TrainSettings) -> str:
    comm = settings.comm
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"less memory is needed with {ways_out(settings)}; the line `memory` at the start says what for. "
            "Where much is reserved and not allocated: PYTORCH_ALLOC_CONF=expandable_segments:True"
        )
    if re.search("timed? ?out", str(error), re.IGNORECASE):
        return (
            f"ranks wait for each other as long as comm.train_timeout_seconds = {comm.train_timeout_seconds} says, "
            f"until the first step is done comm.init_timeout_seconds = {comm.init_timeout_seconds}: raise it if all of "
            "them are well, only late"
        )
    if re.search("connection (was )?(closed|reset|refused)", str(error), re.IGNORECASE):
        return "another rank has ended: the first error in the output of all ranks says why"
    return ""
