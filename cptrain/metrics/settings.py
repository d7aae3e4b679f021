"""Settings of what a run writes about itself. Torch is never imported here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from cptrain.config import Problem, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Log lines, metrics.jsonl and TensorBoard, all written by rank 0."""

    log_freq: int = setting(1, "steps between two log lines; rates and times are averaged over the steps in between")
    enable_tensorboard: bool = setting(True, "also write TensorBoard files, into tb/ of the job's output folder")
    tag_style: Literal["titan", "hf"] = setting(
        "titan", "names of the TensorBoard curves: torchtitan's, or Hugging Face's where it has one"
    )
    peak_tflops: float | Literal["auto"] = setting(
        "auto", "TFLOP/s of one device that count as 100 % MFU; auto = the maker's dense figure for device and dtype"
    )

    def problems(self) -> Iterator[Problem]:
        """Everything wrong with the values of this section."""
        if self.log_freq < 1:
            yield Problem(key="log_freq", rule="must be at least 1", fix="set it to 1 for a line per step")
        if self.peak_tflops != "auto" and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            yield Problem(key="peak_tflops", rule="must be positive and finite", fix='set it to "auto"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Traces of torch.profiler from every rank, and the memory history of CUDA devices."""

    enable_profiling: bool = setting(
        False, "write traces of torch.profiler (open them in Perfetto or chrome://tracing)"
    )
    profile_freq: int = setting(10, "steps per cycle; the last profiler_active of each cycle are traced")
    profiler_warmup: int = setting(3, "steps that run under the profiler before a trace, and are thrown away")
    profiler_active: int = setting(1, "steps in one trace")
    num_traces: int = setting(1, "traces to write, one per cycle; 0 = no limit")
    save_traces_folder: str = setting("profile", "folder below the job's output folder")
    enable_memory_snapshot: bool = setting(
        False, "write CUDA's allocations at the end of each cycle and when memory runs out (pytorch.org/memory_viz)"
    )

    def problems(self) -> Iterator[Problem]:
        """Everything wrong with the values of this section."""
        if self.profile_freq < 1:
            yield Problem(key="profile_freq", rule="must be at least 1", fix="set it to 10")
        if self.profiler_warmup < 1:
            yield Problem(
                key="profiler_warmup",
                rule="must be at least 1: the first step under the profiler is slowed by its start",
                fix="set it to 3",
            )
        if self.profiler_active < 1:
            yield Problem(key="profiler_active", rule="must be at least 1", fix="set it to 1")
        busy = self.profiler_warmup + self.profiler_active
        if self.profile_freq >= 1 and busy > self.profile_freq:
            yield Problem(
                key="profile_freq",
                rule=f"must be at least profiler_warmup + profiler_active = {busy}",
                fix=f"set it to {busy}",
            )
        if self.num_traces < 0:
            yield Problem(key="num_traces", rule="must not be negative", fix="set it to 0 for no limit")
        if not self.save_traces_folder.strip():
            yield Problem(key="save_traces_folder", rule="must name a folder", fix='set it to "profile"')
