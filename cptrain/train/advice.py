"""What a user can do about errors that are not cptrain's own: memory that runs out, ranks that wait in vain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cptrain.distributed.settings import CommConfig


@contextmanager
def advised(comm: CommConfig, less_memory: Callable[[], str]) -> Iterator[None]:
    """Errors that pass through are given a note, which Python prints below their traceback.

    less_memory: what makes a run need less memory, asked when it ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if note := _advice(error, comm, less_memory):
            error.add_note(note)
        raise


def _advice(error: RuntimeError, comm: CommConfig, less_memory: Callable[[], str]) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"less memory is needed with {less_memory()}; the line `memory` at the start says what for. Where much is "
            "reserved and not allocated: PYTORCH_ALLOC_CONF=expandable_segments:True"
        )
    text = str(error).lower()
    if re.search("can't allocate memory|not enough memory", text):
        return f"less memory is needed with {less_memory()}; the line `memory` of --dry-run says what for"
    if re.search("timed? ?out", text):
        return (
            f"ranks wait for each other until the first step is done as long as comm.init_timeout_seconds = "
            f"{comm.init_timeout_seconds} says, then comm.train_timeout_seconds = {comm.train_timeout_seconds}: raise "
            "these if all ranks are well, only late"
        )
    if re.search("connection (was )?(closed|reset|refused)", text):
        return "another rank has ended: the first error in the output of all ranks says why"
    return ""
