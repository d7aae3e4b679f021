"""What the trainer says about one optimizer step, and what is reported of the steps since the last line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import SupportsFloat

from cptrain.metrics.memory import Memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step.

    The four numbers that may live on a device are read only at steps whose line is due (`Metrics.due`), so a trainer
    can hand over tensors without waiting for the device at every step. For honest times it must itself have waited (by
    reading the loss, say) before it stops the clock of a due step: a device runs behind the host.
    """

    step: int  # number of the step, from 1
    loss: SupportsFloat  # mean over all valid tokens of the step, on all ranks
    max_loss: SupportsFloat  # largest of the ranks' own mean losses
    grad_norm: SupportsFloat  # global norm before clipping
    lr: float  # learning rate the step was taken with
    tokens: int  # read in this step by all ranks, with padding; tensor- and context-parallel peers share theirs
    tokens_seen: int  # the same since the start of the training, over all resumes
    step_time_s: float  # wall time from the end of the step before to the end of this one, without saves and validation
    data_time_s: float  # the part of it spent waiting for data
    flops: int  # what the step needs on all devices together (`training_flops`), without padding
    extra: Mapping[str, SupportsFloat] = dataclasses.field(
        default_factory=dict
    )  # further curves by their full tag, as "long_context/docs_per_seq"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a line reports: values of its step, and rates and times averaged over the steps since the last line."""

    step: int
    loss: float
    max_loss: float
    grad_norm: float
    lr: float
    tokens_seen: int
    tps: float  # tokens per second and device, with padding, as in tokens_seen
    tps_total: float
    tflops: float  # TFLOP/s of one device
    mfu_percent: float | None  # None where the peak of the device is unknown
    step_time_s: float
    data_time_s: float
    eta_s: float
    memory: Memory
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def data_percent(self) -> float:
        """Share of the step time spent waiting for data."""
        return 100 * self.data_time_s / self.step_time_s if self.step_time_s > 0 else 0.0
