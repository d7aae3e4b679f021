"""Ending a run at a step's end when the batch system or the user asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """While active, remembers the first of SIGTERM, Ctrl-C and SIGUSR1; a second Ctrl-C ends the process at once.

    A second SIGTERM does not: a batch system sends it to every process, and torchrun passes its own on to its ranks.
    """

    def __init__(self) -> None:
        self.requested: str = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
