"""One rank of N on one device: a process group in which every message is a local copy.

A backend of torch.distributed's own kind, so that meshes, sub-groups, point-to-point messages and collectives work as
they do among real ranks and nothing that is measured knows of it. What a rank receives is a copy of what it sent, since
nobody else is there, and zeros where that was less: shapes, bytes, schedule and kernel calls are those of this rank,
values are not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BACKEND = "simulated"


class _Arrival(dist.Work):
    """A message that is on its way until a moment of the host's clock or an event of the side stream."""

    def __init__(self, due: float = 0.0, event: torch.cuda.Event | None = None) -> None:
        super().__init__()
        self._due, self._event = due, event

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        # A sleep would let the thread be scheduled late, so the last part of the time is spun.
        while (left := self._due - time.perf_counter()) > 0:
            time.sleep(left - 0.001 if left > 0.002 else 0)
        return True


class Link:
    """Copies tensors as messages would arrive: one after another, no faster than `bandwidth` bytes/s (0: no limit).

    On CUDA copies run on a stream of their own and a kernel that spins makes up what a copy is faster than the link. On
    CPU copies are made when they are posted, and the arrival is waited for.
    """

    def __init__(self, device: torch.device, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._free_at = 0.0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._cycles_per_s = self._copies_per_s = 1.0
        if self._stream is not None and bandwidth:
            self._cycles_per_s = 1e8 / _seconds(lambda: torch.cuda._sleep(int(1e8)))
            there, here = torch.empty(2, 1 << 28, dtype=torch.uint8, device=device)
            self._copies_per_s = (1 << 28) / _seconds(lambda: there.copy_(here))

    def carry(self, pairs: list[tuple[torch.Tensor, torch.Tensor | None]], num_bytes: int) -> _Arrival:
        """Copy every (destination, source); a source of None is zeros. Of it, `num_bytes` come over the link."""
        wire_s = num_bytes / self._bandwidth if self._bandwidth else 0.0
        if self._stream is None:
            for there, here in pairs:
                _fill(there, here)
            self._free_at = max(self._free_at, time.perf_counter()) + wire_s
            return _Arrival(self._free_at)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for there, here in pairs:
                _fill(there, here)
            missing_s = wire_s - sum(there.nbytes for there, _ in pairs) / self._copies_per_s
            if wire_s and missing_s > 0:
                torch.cuda._sleep(int(missing_s * self._cycles_per_s))
            event = torch.cuda.Event()
            event.record()
        return _Arrival(event=event)


def _seconds(work: Any) -> float:
    """Seconds of the second of two runs on the device."""
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _fill(there: torch.Tensor, here: torch.Tensor | None) -> None:
    """Copy `here` into `there`, as much of it as fits; the rest is zeros."""
    target, source = there.view(-1), there.new_empty(0) if here is None else here.reshape(-1)
    copied = min(target.numel(), source.numel())
    if copied:
        target[:copied].copy_(source[:copied])
    if copied < target.numel():
        target[copied:].zero_()


class SimulatedGroup(dist.ProcessGroup):
    """Rank `rank` of `size`, alone. Methods have the names by which torch.distributed calls them, of any version."""

    def __init__(self, rank: int, size: int, link: Link) -> None:
        super().__init__(rank, size)
        self._link = link
        self._sent: torch.Tensor | None = None

    def getBackendName(self) -> str:
        return BACKEND

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> _Arrival:
        (self._sent,) = tensors
        return _Arrival()

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> _Arrival:
        (there,), here = tensors, self._sent
        self._sent = None
        return self._link.carry([(there, here)], there.nbytes)

    def all_gather_single(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> _Arrival:
        return self._link.carry([(output, given)], output.nbytes - given.nbytes)

    def reduce_scatter_single(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> _Arrival:
        own = given.view(self.size(), -1)[self.rank()]
        return self._link.carry([(output, own)], given.nbytes - output.nbytes)

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single

    def _nothing(self, *arguments: Any, **options: Any) -> _Arrival:
        return _Arrival()

    allreduce = broadcast = barrier = _nothing


@contextmanager
def simulated_ranks(rank: int, size: int, device: torch.device, *, bandwidth: float = 0.0) -> Iterator[None]:
    """The default process group of this process is rank `rank` of `size` while the block runs."""
    link = Link(device, bandwidth)

    def create(store: dist.Store, group_rank: int, group_size: int, timeout: timedelta) -> SimulatedGroup:
        return SimulatedGroup(group_rank, group_size, link)

    dist.Backend.register_backend(BACKEND, create, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, rank=rank, world_size=size, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
