"""How much memory this rank has needed."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Peaks in bytes. On CUDA of the device since the last reading; on CPU of the process since it started.

    reserved is what the allocator took from the device, active what tensors needed of it; on CPU both are the resident
    set. capacity is all the device (the machine) has. alloc_retries and ooms count since the start, None on CPU.
    """

    active_bytes: int
    reserved_bytes: int
    capacity_bytes: int
    alloc_retries: int | None = None
    ooms: int | None = None

    @property
    def reserved_percent(self) -> float:
        return 100 * self.reserved_bytes / self.capacity_bytes

    @property
    def active_percent(self) -> float:
        return 100 * self.active_bytes / self.capacity_bytes


def read_memory(device: torch.device) -> Memory:
    """The peaks of `device` ("cuda" or "cpu"); on CUDA they start anew."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        memory = Memory(
            active_bytes=stats.get("active_bytes.all.peak", 0),
            reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
            capacity_bytes=capacity_bytes(device),
            alloc_retries=stats.get("num_alloc_retries", 0),
            ooms=stats.get("num_ooms", 0),
        )
        torch.cuda.reset_peak_memory_stats(device)
        return memory
    peak = _peak_resident_bytes()
    return Memory(
        active_bytes=peak,
        reserved_bytes=peak,
        capacity_bytes=capacity_bytes(device),
    )


def capacity_bytes(device: torch.device) -> int:
    """All that the device, or this machine, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_resident_bytes() -> int:
    """The largest resident set this process has had."""
    if sys.platform == "linux":
        # Not getrusage: its peak is inherited from the process that forked this one, so it can be the launcher's.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
