"""Many ranks on one device: a process group that takes CUDA tensors through gloo, in the way that NCCL takes them.

NCCL refuses two ranks on one device, and gloo does not send CUDA tensors. Here a message begins once the work that its
stream already holds is done, runs beside the caller, and is there for the stream that waits for it. Every copy is
delayed on the device, so that a buffer which is written too early, or read before the wait, shows as a wrong value. A
message may send on what an earlier one of the same group receives.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cptrain.distributed import transport

BACKEND = "staged"
MOST_CYCLES = 1_000_000  # of one delay, half a millisecond
MOST_SECONDS = 60  # of one message


class _Message(dist.Work):
    """A message that is on its way until `done`, and on the device until `event`."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()
        self.event: torch.cuda.Event | None = None
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.done.set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.done.wait(MOST_SECONDS):
            raise TimeoutError(f"no message in {MOST_SECONDS} s")
        if self.error is not None:
            raise self.error
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        return True


class _Works(dist.Work):
    """Several as one."""

    def __init__(self, works: Iterable[dist.Work]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait()
        return True


class _Order(NamedTuple):
    message: _Message
    begin: torch.cuda.Event | None
    start: Callable[[list[torch.Tensor], list[torch.Tensor]], dist.Work]
    given: list[torch.Tensor]
    results: list[torch.Tensor]
    after: _Message | None  # the last one before it that receives: NCCL keeps to the order of the calls


class StagedGroup(dist.ProcessGroup):
    """Methods have the names by which torch.distributed calls them, of any version."""

    def __init__(self, gloo: dist.ProcessGroup, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo = gloo
        self._random = random.Random(rank)
        self._last_received: _Message | None = None
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._started: queue.SimpleQueue[tuple[_Order, dist.Work, list[torch.Tensor]] | None] = queue.SimpleQueue()
        for loop in (self._start_orders, self._end_orders):
            threading.Thread(target=loop, daemon=True).start()

    def getBackendName(self) -> str:
        return BACKEND

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    def _start_orders(self) -> None:
        """In the order of the calls: bring what is given to the host and start gloo on it."""
        while (order := self._orders.get()) is not None:
            try:
                if order.after is not None and order.given and not order.after.done.wait(MOST_SECONDS):
                    raise TimeoutError(f"no message in {MOST_SECONDS} s")
                if order.begin is not None:
                    self._stream.wait_event(order.begin)
                given, results = self._copies(order.given), [torch.empty_like(x, device="cpu") for x in order.results]
                self._started.put((order, order.start(given, results), results))
            except Exception as error:
                order.message.end(error)
        self._started.put(None)

    def _end_orders(self) -> None:
        while (started := self._started.get()) is not None:
            order, work, results = started
            try:
                work.wait()
                self._bring_back(order, results)
                order.message.end()
            except Exception as error:
                order.message.end(error)

    def _bring_back(self, order: _Order, results: list[torch.Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            self._delay(results)
            for there, here in zip(order.results, results, strict=True):
                there.copy_(here)
            if order.begin is not None:
                order.message.event = torch.cuda.Event()
                order.message.event.record()

    def shutdown(self) -> None:
        """End both threads; torch calls this when the group is destroyed."""
        self._orders.put(None)

    def _copies(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.cuda.stream(self._stream):
            self._delay(tensors)
            return [x.to("cpu", copy=True) for x in tensors]

    def _delay(self, tensors: list[torch.Tensor]) -> None:
        if self._stream is not None and tensors:
            torch.cuda._sleep(self._random.randrange(MOST_CYCLES))

    def _order(self, start: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> _Message:
        message, begin = _Message(), None
        if any(x.is_cuda for x in (*given, *results)):
            begin = torch.cuda.Event()
            begin.record()
        self._orders.put(_Order(message, begin, start, given, results, self._last_received))
        if results:
            self._last_received = message
        return message

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> _Message:
        return self._order(lambda given, _: self._gloo.send(given, to, tag), tensors, [])

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> _Message:
        return self._order(lambda _, results: self._gloo.recv(results, source, tag), [], tensors)

    def allgather_into_tensor_coalesced(self, outputs, given, *options: Any) -> _Message:
        def start(here: list[torch.Tensor], results: list[torch.Tensor]) -> dist.Work:
            lists = [list(result.view(self.size(), -1).unbind()) for result in results]
            return _Works(
                self._gloo.allgather([parts], [own.reshape(-1)]) for parts, own in zip(lists, here, strict=True)
            )

        return self._order(start, given, outputs)

    def reduce_scatter_tensor_coalesced(self, outputs, given, *options: Any) -> _Message:
        def start(here: list[torch.Tensor], results: list[torch.Tensor]) -> dist.Work:
            return _Works(
                self._gloo._reduce_scatter_base(own.view(-1), whole.reshape(-1), *options)
                for own, whole in zip(results, here, strict=True)
            )

        return self._order(start, given, outputs)

    def all_gather_single(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> _Message:
        return self.allgather_into_tensor_coalesced([output], [given], *options)

    def reduce_scatter_single(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> _Message:
        return self.reduce_scatter_tensor_coalesced([output], [given], *options)

    def allreduce(self, tensors: list[torch.Tensor], *options: Any) -> _Message:
        return self._in_place(lambda results: self._gloo.allreduce(results, *options), tensors)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> _Message:
        return self._in_place(lambda results: self._gloo.broadcast(results, options), tensors)

    def _in_place(self, work: Callable[[list[torch.Tensor]], dist.Work], tensors: list[torch.Tensor]) -> _Message:
        def start(given: list[torch.Tensor], results: list[torch.Tensor]) -> dist.Work:
            for there, here in zip(results, given, strict=True):
                there.copy_(here)
            return work(results)

        return self._order(start, tensors, tensors)

    def allgather(self, outputs: list[list[torch.Tensor]], given: list[torch.Tensor], *options: Any) -> _Message:
        return self._order(lambda here, results: self._gloo.allgather([results], here), given, outputs[0])

    def barrier(self, *options: Any, **named: Any) -> _Message:
        return self._order(lambda *_: self._gloo.barrier(), [], [])

    def allreduce_coalesced(self, tensors: list[torch.Tensor], options: Any = None) -> _Message:
        return self.allreduce(tensors, *([] if options is None else [options]))

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> StagedGroup:
    return StagedGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


def register() -> None:
    """Make the backend known to this process, once."""
    transport.PROBE_BYTES = 2**16  # what plans measure their links with goes through the host here
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
