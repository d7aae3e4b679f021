"""Batches for one data-parallel coordinate: endless ones for training, a fixed set for validation.

[Note: who reads which sample]
Ranks that share a data-parallel coordinate (the context and tensor parallel peers) pass the same `dp_rank` and get the
same batches. Sample j of micro-batch m of coordinate d at step s, counted from `start_index`, is global index

    start_index + s * global_batch_size + (m * dp_degree + d) * local_batch_size + j

so a step reads one run of global indices whatever the number of ranks, and one integer, the same on all of them, says
where to go on.

[Note: batches are built ahead]
A thread builds what the next step reads while this one runs, so that no step waits for its documents to be dealt: two
steps of batches are in memory. What it costs is time of the interpreter; worker processes, if there are any, take that
over too, and their batches are copied, lest a step's worth of them stays open as files in shared memory. What goes to a
CUDA device lies in pinned memory, from which it is copied without the host waiting.
"""

from __future__ import annotations

import atexit
import signal
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, Protocol

import torch
from torch.utils.data import default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from cptrain.data.windows import IGNORE, Windows

Batch = dict[str, torch.Tensor]
Finish = Callable[[Batch], Batch]
CPU = torch.device("cpu")
SENT = ("tokens", "labels", "positions")  # of a batch, to the device; the rest is for the host


class _Indices:
    """The global indices of each micro-batch, without end. See [Note: who reads which sample]."""

    def __init__(self, first: int, *, local_batch_size: int, dp_degree: int) -> None:
        self.first = first
        self.local_batch_size = local_batch_size
        self.dp_degree = dp_degree

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.first
        while True:
            yield list(range(begin, begin + self.local_batch_size))
            begin += self.local_batch_size * self.dp_degree


class TrainBatches:
    """Micro-batches for training, endless; `micro_batches` of them are one step, and built while the one before runs.

    Each is a dict of int64 [local_batch_size, seq_len] (see `Windows.window`), on the CPU.
    start_index: the global index at which to go on, 0 for a fresh start, else what `next_index` said.
    num_workers, prefetch_factor: see `DataConfig`. The batches do not depend on them.
    finish: applied to each batch where it is built, in the worker process if there are workers. So it must pickle, and
    what it returns depend on the batch alone.
    device: where the batches will go, see [Note: batches are built ahead].
    ValueError if local_batch_size * dp_degree does not divide global_batch_size.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        start_index: int,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_degree: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        finish: Finish | None = None,
        device: torch.device = CPU,
    ) -> None:
        _check_place(local_batch_size, dp_rank, dp_degree)
        together = local_batch_size * dp_degree
        if global_batch_size < 1 or global_batch_size % together:
            raise ValueError(
                f"training.global_batch_size = {global_batch_size}: must be a multiple of training.local_batch_size = "
                f"{local_batch_size} x {dp_degree} data-parallel ranks; "
                f"set it to {max(1, -(-global_batch_size // together)) * together}"
            )
        if start_index < 0:
            raise ValueError(f"start_index = {start_index}: must not be negative")
        self.micro_batches = global_batch_size // together
        self._start_index = start_index
        self._global_batch_size = global_batch_size
        self._device = device
        self._taken = 0
        first = start_index + dp_rank * local_batch_size
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates and ignores.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self._loader: StatefulDataLoader | None = StatefulDataLoader(
                windows,
                batch_sampler=_Indices(first, local_batch_size=local_batch_size, dp_degree=dp_degree),
                num_workers=num_workers,
                collate_fn=partial(_build_batch, finish=finish),
                prefetch_factor=prefetch_factor if num_workers else None,
                # A forked child of a process with gloo and OpenMP threads may hang; a fork server dies of the SIGTERM
                # that a batch system sends to every process, and the workers with it.
                multiprocessing_context="spawn" if num_workers else None,
                worker_init_fn=_ignore_signals,
                snapshot_every_n_steps=0,  # next_index is all the state there is
                generator=torch.Generator(),  # else the loader draws a seed from the generator of the training
            )
        self._iterator: Iterator[Batch] | None = None
        self._batches: Generator[Batch] | None = None

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        if self._loader is None:
            raise RuntimeError("these batches are closed")
        if self._batches is None:
            # Begun here: what tells of a worker that has died is heard by the main thread alone.
            self._iterator = iter(self._loader)
            self._batches = _built_ahead(self._iterator, self.micro_batches, self._device)
            atexit.register(_close_at_exit, weakref.ref(self))
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError("a batch before this one could not be built; begin anew at its index")
        self._taken += 1
        return batch

    @property
    def next_index(self) -> int:
        """The global index at which the next step begins, for a checkpoint. RuntimeError in the middle of a step."""
        steps, within = divmod(self._taken, self.micro_batches)
        if within:
            raise RuntimeError(
                f"{within} of {self.micro_batches} micro-batches of this step are taken: finish the step first"
            )
        return self._start_index + steps * self._global_batch_size

    def close(self) -> None:
        """Stop the thread and the worker processes."""
        if self._batches is not None:
            self._batches.close()
        # An error of a worker ends the batches, but not the workers: its traceback holds on to what would end them.
        getattr(self._iterator, "_shutdown_workers", lambda: None)()
        self._batches = self._loader = self._iterator = None


def _close_at_exit(batches: weakref.ref[TrainBatches]) -> None:
    """End workers that nobody has closed: they do not heed the signal by which multiprocessing would at exit."""
    left = batches()
    if left is not None:
        left.close()


def _ignore_signals(_worker: int) -> None:
    """Leave the signals that end a run to the rank: it still needs batches for its last step, then stops them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class Numbered(Protocol):
    """Windows by number, from 0 on."""

    def __len__(self) -> int: ...

    def window(self, number: int) -> Batch: ...


def validation_batches(
    windows: Numbered,
    *,
    local_batch_size: int,
    dp_rank: int,
    dp_degree: int,
    num_windows: int | Literal["all"] = "all",
    finish: Finish | None = None,
    device: torch.device = CPU,
) -> Generator[Batch]:
    """Batches that cover windows 0 .. num_windows - 1 once over all data-parallel ranks, in this order.

    Every rank gets the same number of batches of int64 [local_batch_size, seq_len]: where the windows run out, a batch
    is filled up with window 0 with every label IGNORE. num_windows is capped at what there is. finish: applied to each
    batch. device: where the batches will go. Each is built while the one before it is used; close what is not used up.
    """
    _check_place(local_batch_size, dp_rank, dp_degree)
    total = len(windows) if num_windows == "all" else min(num_windows, len(windows))
    if total < 1:
        raise ValueError(f"num_windows = {num_windows}: must be positive")
    firsts = range(dp_rank * local_batch_size, total + dp_rank * local_batch_size, local_batch_size * dp_degree)
    batches = (
        _build_batch(
            [_window_or_padding(windows, first + row, total) for row in range(local_batch_size)], finish=finish
        )
        for first in firsts
    )
    return _built_ahead(batches, 1, device)


def _built_ahead(batches: Iterator[Batch], count: int, device: torch.device) -> Generator[Batch]:
    """The same batches, `count` of them built in a thread before they are asked for.

    An error comes in the place of its batch, which is the last: who has lost one may wait for it for ever.
    """
    pins_for, ended = None, False
    if device.type == "cuda":  # the thread has a current device of its own, so one without an index is looked up here
        pins_for = torch.cuda.current_device() if device.index is None else device.index

    def build() -> Batch | None:
        nonlocal ended
        if ended:
            return None
        try:
            batch = next(batches, None)
            return None if batch is None else {name: _kept(x, name, pins_for) for name, x in batch.items()}
        except BaseException:
            ended = True
            raise

    with ThreadPoolExecutor(1, "batches") as thread:
        ahead = deque(thread.submit(build) for _ in range(count))
        try:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(build))
                yield batch
        finally:
            ended = True
            for future in ahead:
                future.cancel()


def _kept(x: torch.Tensor, name: str, pins_for: int | None) -> torch.Tensor:
    """What is built, as it waits to be used; see [Note: batches are built ahead]."""
    if pins_for is None or name not in SENT:
        return x.clone() if x.is_shared() else x
    torch.cuda.set_device(pins_for)  # of this thread, or memory is pinned by way of the first one
    return x.pin_memory()


def _build_batch(samples: list[Batch], *, finish: Finish | None) -> Batch:
    batch: Batch = default_collate(samples)
    return finish(batch) if finish else batch


def _check_place(local_batch_size: int, dp_rank: int, dp_degree: int) -> None:
    if local_batch_size < 1:
        raise ValueError(f"local_batch_size = {local_batch_size}: must be positive")
    if not 0 <= dp_rank < dp_degree:
        raise ValueError(f"dp_rank = {dp_rank}: must be in range({dp_degree}), the data-parallel degree")


def _window_or_padding(windows: Numbered, number: int, total: int) -> Batch:
    if number < total:
        return windows.window(number)
    padding = windows.window(0)
    return {**padding, "labels": torch.full_like(padding["labels"], IGNORE)}
