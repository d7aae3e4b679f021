"""Traces of what the ranks do, and of what their memory holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

from cptrain.metrics.settings import ProfilingConfig

logger = logging.getLogger("cptrain")

_MAX_MEMORY_EVENTS = 100_000


class Profiler:
    """Told of every finished step; does nothing itself, which is what a run without [profiling] gets."""

    def step(self) -> None:
        """Say that a training step has ended."""


@contextmanager
def profiling(
    config: ProfilingConfig, *, folder: Path, rank: int, device: torch.device, resumed_step: int = 0
) -> Iterator[Profiler]:
    """A `Profiler` for the training loop: call its `step` after every step.

    Steps are counted from the start of the process in cycles of `profile_freq`. The last `profiler_active` steps of a
    cycle are traced, the `profiler_warmup` before them run under the profiler unrecorded, the others without it. A
    trace goes to <folder>/<save_traces_folder>/step-<last traced step>/rank<r>_trace.json.gz, and the memory history of
    a CUDA device to rank<r>_memory.pickle beside it; that of an out-of-memory error to oom-rank<r>_memory.pickle.
    Without profiling and snapshots this costs nothing.

    Raises RuntimeError when memory snapshots are asked of a device other than CUDA.
    """
    if config.enable_memory_snapshot and device.type != "cuda":
        raise RuntimeError(
            f"profiling.enable_memory_snapshot = true: only CUDA keeps a memory history, this run is on {device.type}; "
            "set it to false"
        )
    if not (config.enable_profiling or config.enable_memory_snapshot):
        yield Profiler()
        return
    active = _Active(config, folder=folder / config.save_traces_folder, rank=rank, device=device, step=resumed_step)
    with active:
        yield active


class _Active(Profiler):
    def __init__(self, config: ProfilingConfig, *, folder: Path, rank: int, device: torch.device, step: int) -> None:
        self._config = config
        self._folder = folder
        self._rank = rank
        self._device = device
        self._first_step = self._step = step
        self._traces = 0
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> Self:
        if self._config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        self._start_if_due()
        return self

    def step(self) -> None:
        self._step += 1
        if self._profile is not None:
            self._profile.step()
        if self._steps_in_cycle() == 0 and self._cycle_counts(self._finished_cycles() - 1):
            self._end_profile()
            if self._config.enable_memory_snapshot:
                torch.cuda.memory._dump_snapshot(str(self._path("memory.pickle")))
        self._start_if_due()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_profile()
        if self._config.enable_memory_snapshot:
            if kind is not None and issubclass(kind, torch.OutOfMemoryError):
                self._folder.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(self._folder / f"oom-rank{self._rank}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._config.enable_profiling and not self._traces and self._rank == 0:
            logger.warning(
                "no trace was written: this process took %d steps, the first trace is due after "
                "profiling.profile_freq = %d",
                self._step - self._first_step,
                self._config.profile_freq,
            )

    def _start_if_due(self) -> None:
        """Start a profiler at the first warm-up step of a cycle.

        Each cycle has its own: one that repeats keeps or drops the events of earlier cycles with a warning.
        """
        config = self._config
        idle = config.profile_freq - config.profiler_warmup - config.profiler_active
        if not config.enable_profiling or self._steps_in_cycle() != idle:
            return
        if not self._cycle_counts(self._finished_cycles()):
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=0, warmup=config.profiler_warmup, active=config.profiler_active, repeat=1
            ),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )
        self._profile.start()

    def _end_profile(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write_trace(self, profile: torch.profiler.profile) -> None:
        """Called by the profiler after the last step of a trace, or when the run ends while one is being recorded."""
        steps = self._steps_in_cycle() or self._config.profile_freq
        if steps <= self._config.profile_freq - self._config.profiler_active:
            return  # the run ends before the first step of this trace has: there is nothing to see in it
        profile.export_chrome_trace(str(self._path("trace.json.gz")))
        self._traces += 1

    def _finished_cycles(self) -> int:
        return (self._step - self._first_step) // self._config.profile_freq

    def _steps_in_cycle(self) -> int:
        return (self._step - self._first_step) % self._config.profile_freq

    def _cycle_counts(self, cycle: int) -> bool:
        """Whether this cycle, from 0, is one that gets a trace."""
        return self._config.num_traces == 0 or cycle < self._config.num_traces

    def _path(self, name: str) -> Path:
        folder = self._folder / f"step-{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"rank{self._rank}_{name}"
