"""Work beside the computation: sums, and what waits for messages, on CUDA in a stream of its own.

[Note: on the side]
Blocks of attention leave a device's memory nearly idle; merging outputs and adding up gradients needs little else. On a
stream of its own a sum runs beside the next block. A tensor that is read there must not be freed before that:
`record_stream` would keep it until the host sees that it was read, and a host that is ahead of the device would then
allocate all blocks of a pass at once. So tensors are held here until the caller's stream has waited for the work that
reads them, at most MOST_BEHIND pieces of work later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from cptrain.distributed.standstill import standing_still

MOST_BEHIND = 2  # pieces of work
AT_ONCE = 3  # sums of small blocks that make one piece of work: changing streams costs the host 20 microseconds


class SideStream:
    """Runs work without making the caller's stream wait for it. On CPU there is no other place: it runs at once.

    What the work writes must be made outside, and be used there after `join` alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream(device) if device.type == "cuda" else None
        self._running: deque[tuple[torch.cuda.Event, tuple[torch.Tensor, ...]]] = deque()
        self._sums: list[tuple[Callable[[], None], tuple[torch.Tensor, ...]]] = []

    @contextmanager
    def after(self, *tensors: torch.Tensor) -> Iterator[None]:
        """The block's work begins when all that the caller's stream holds by now is done; it may read these tensors."""
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self._stream.device)
        if len(self._running) == MOST_BEHIND:
            done, read = self._running.popleft()
            with standing_still():  # such work may itself wait for messages
                caller.wait_event(done)
            del read  # not before the caller's stream waits
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._running.append((self._stream.record_event(), tensors))

    def add(self, work: Callable[[], None], *tensors: torch.Tensor) -> None:
        """Have this done, soon: it may read these tensors."""
        self._sums.append((work, tensors))
        if self._stream is None or len(self._sums) == AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Begin what was added."""
        if self._sums:
            with self.after(*(tensor for _, tensors in self._sums for tensor in tensors)):
                for work, _ in self._sums:
                    work()
            self._sums = []

    def join(self) -> None:
        """The caller's stream goes on when all work is done."""
        self.flush()
        if self._stream is not None:
            with standing_still():
                torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._running.clear()


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
