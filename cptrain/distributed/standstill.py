"""How long computation stands still for messages between ranks.

On CPU that is what the host spends in starting messages and waiting for them. On CUDA it is what the stream that
computes waits, between two of its events, while the host goes on; another stream may wait beside it, and counts from
when the first one waits for that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Standstill:
    """The time so far. Made by `measured_standstill`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._host_s = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def seconds(self) -> float:
        """Of standing still; a CUDA device must have finished what it was given."""
        return self._host_s + sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3

    @contextmanager
    def count(self) -> Iterator[None]:
        """What the block takes is standing still."""
        if self._stream is None:
            start = time.perf_counter()
            yield
            self._host_s += time.perf_counter() - start
        elif torch.cuda.current_stream(self._stream.device) != self._stream:
            yield
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(self._stream)
            yield
            end.record(self._stream)
            self._spans.append((begin, end))


_measured: Standstill | None = None


@contextmanager
def measured_standstill(device: torch.device, *, wanted: bool = True) -> Iterator[Standstill]:
    """Measures the messages of context parallelism while the block runs: of this process, in whatever thread.

    One block at a time: an inner one takes over. Events on CUDA take the host some microseconds for each message: where
    nobody looks at the time it need not be `wanted`, and stays 0.
    """
    global _measured
    found = Standstill(device)
    before, _measured = _measured, found if wanted else None
    try:
        yield found
    finally:
        _measured = before


@contextmanager
def standing_still() -> Iterator[None]:
    """The block waits for messages, and does nothing else."""
    if _measured is None:
        yield
        return
    with _measured.count():
        yield
