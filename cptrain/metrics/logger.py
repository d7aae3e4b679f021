"""What a run tells about itself: log line, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Self, SupportsFloat

import torch

from cptrain.metrics import tags
from cptrain.metrics.jsonl import JsonLines
from cptrain.metrics.line import format_line, format_validation
from cptrain.metrics.memory import read_memory
from cptrain.metrics.peak import peak_flops
from cptrain.metrics.record import StepRecord, Summary
from cptrain.metrics.settings import MetricsConfig

logger = logging.getLogger("cptrain")


@dataclasses.dataclass
class _Window:
    """Sums over the steps since the last line."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    step_time_s: float = 0.0
    data_time_s: float = 0.0

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        self.tokens += record.tokens
        self.flops += record.flops
        self.step_time_s += record.step_time_s
        self.data_time_s += record.data_time_s


class Metrics:
    """Takes a `StepRecord` per step on every rank; rank 0 writes, the others return at once.

    folder: the job's output folder, which gets metrics.jsonl and tb/. num_devices: ranks of the run, tokens per second
    and FLOPs are divided by it. compute_dtype: what matmuls run in, for MFU. resumed_step: 0 for a training from the
    start; both files drop what they hold of later steps (see JsonLines and TensorBoard). toml and hyper_parameters go
    to TensorBoard. clock: monotonic seconds.
    """

    def __init__(
        self,
        config: MetricsConfig,
        *,
        folder: Path,
        rank: int,
        num_devices: int,
        device: torch.device,
        compute_dtype: torch.dtype,
        total_steps: int,
        resumed_step: int = 0,
        toml: str = "",
        hyper_parameters: Mapping[str, bool | int | float | str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._writes = rank == 0
        self._num_devices = num_devices
        self._device = device
        self._first_step = resumed_step + 1
        self._total_steps = total_steps
        self._clock = clock
        self._window = _Window()
        self._mfu_was_questioned = False
        self._first_end_s = 0.0  # when the first step of this process ended
        self._jsonl: JsonLines | None = None
        self._tensorboard = None
        self._failed: set[str] = set()
        if not self._writes:
            return
        self._peak_flops = _resolve_peak(config, device, compute_dtype)
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = JsonLines(folder / "metrics.jsonl", resumed_step=resumed_step)
        if config.enable_tensorboard:
            # TensorBoard takes a second to import, which only the rank that writes should pay.
            from cptrain.metrics.tensorboard import TensorBoard

            self._tensorboard = TensorBoard(folder / "tb", style=config.tag_style, resumed_step=resumed_step)
            self._tensorboard.settings(toml, hyper_parameters or {})

    def due(self, step: int) -> bool:
        """Whether `step` gets a line: the first of this process, the last of the run, and every log_freq-th.

        The same on all ranks, so that a trainer may reduce the loss over ranks at these steps only.
        """
        return step in (self._first_step, self._total_steps) or step % self._config.log_freq == 0

    def record(self, record: StepRecord) -> None:
        """Take one step into account, and write it if it is `due`."""
        if not self._writes:
            return
        if record.step == self._first_step:
            self._first_end_s = self._clock()
        self._window.add(record)
        if not self.due(record.step):
            return
        summary = self._summary(record)
        self._window = _Window()
        logger.info(format_line(summary, device_word="gpu" if self._device.type == "cuda" else "rank"))
        self._question_mfu(summary.mfu_percent)
        self._write(record.step, "train", _json_record(summary), tags.curves(summary))

    def validation(self, step: int, loss: SupportsFloat, extra: Mapping[str, SupportsFloat] | None = None) -> None:
        """Write the loss on held-out data after `step` (0: before the first)."""
        if not self._writes:
            return
        value, others = float(loss), {name: float(number) for name, number in (extra or {}).items()}
        logger.info(format_validation(step, value, others.get(tags.NEEDLE_ACC)))
        self._write(step, "validation", {"loss": value, **others}, {tags.VALIDATION_LOSS: value, **others})

    def close(self) -> None:
        """Write out what TensorBoard still holds, and let go of the files."""
        for name, sink in (("metrics.jsonl", self._jsonl), ("TensorBoard", self._tensorboard)):
            if sink is not None:
                self._try(sink.close, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, step: int, kind: str, fields: Mapping[str, float | None], points: Mapping[str, float]) -> None:
        assert self._jsonl is not None
        line = {"step": step, "kind": kind, "time": time.time(), **fields}
        self._try(partial(self._jsonl.write, line), "metrics.jsonl")
        if self._tensorboard is not None:
            self._try(partial(self._tensorboard.write, step, points), "TensorBoard")

    def _try(self, write: Callable[[], None], sink: str) -> None:
        """A full disk costs points of a curve, never the run; that is said once."""
        try:
            write()
        except OSError as error:
            if sink not in self._failed:
                logger.warning(
                    "metrics: %s cannot be written (%s): the run goes on, points will be missing", sink, error
                )
            self._failed.add(sink)

    def _summary(self, record: StepRecord) -> Summary:
        window = self._window
        tps_total = _rate(window.tokens, window.step_time_s)
        device_flops = _rate(window.flops, window.step_time_s) / self._num_devices
        return Summary(
            step=record.step,
            loss=float(record.loss),
            max_loss=float(record.max_loss),
            grad_norm=float(record.grad_norm),
            lr=record.lr,
            tokens_seen=record.tokens_seen,
            tps=tps_total / self._num_devices,
            tps_total=tps_total,
            tflops=device_flops / 1e12,
            mfu_percent=None if self._peak_flops is None else 100 * device_flops / self._peak_flops,
            step_time_s=window.step_time_s / window.steps,
            data_time_s=window.data_time_s / window.steps,
            eta_s=self._eta_s(record),
            memory=read_memory(self._device),
            extra={name: float(value) for name, value in record.extra.items()},
        )

    def _eta_s(self, record: StepRecord) -> float:
        """Time to the last step at the pace since the first step ended, saves and validation included.

        The first step is slower than all others (it compiles and warms up) and counts only while there is no other.
        """
        later = record.step - self._first_step
        pace = (self._clock() - self._first_end_s) / later if later else record.step_time_s
        return pace * max(0, self._total_steps - record.step)

    def _question_mfu(self, mfu_percent: float | None) -> None:
        """Say once that no device does more than it can."""
        if mfu_percent is None or mfu_percent <= 100 or self._mfu_was_questioned:
            return
        self._mfu_was_questioned = True
        logger.warning(
            "mfu: %.2f%% is IMPOSSIBLE. Either attention does not see the whole sequence (context parallelism or the "
            "mask is not what the FLOPs were counted for), the clock was stopped before the device had finished, or "
            "the peak of %.4g TFLOP/s is wrong for this device (then set metrics.peak_tflops). Do not trust this run.",
            mfu_percent,
            (self._peak_flops or 0) / 1e12,
        )


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _resolve_peak(config: MetricsConfig, device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """FLOP/s of one device that count as 100 % MFU; None where they are unknown."""
    if config.peak_tflops != "auto":
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name, dtype = torch.cuda.get_device_name(device), str(compute_dtype).removeprefix("torch.")
    peak = peak_flops(name, dtype)
    if peak is None:
        logger.warning("no peak is known for %s in %s, so mfu is n/a; set metrics.peak_tflops", name, dtype)
    return peak


def _json_record(summary: Summary) -> dict[str, float | None]:
    """The fields of a line of metrics.jsonl, the same for both styles of tags."""
    memory = summary.memory
    return {
        "loss": summary.loss,
        "max_loss": summary.max_loss,
        "grad_norm": summary.grad_norm,
        "lr": summary.lr,
        "tokens_seen": summary.tokens_seen,
        "tps": summary.tps,
        "tps_total": summary.tps_total,
        "tflops": summary.tflops,
        "mfu_percent": summary.mfu_percent,
        "step_time_s": summary.step_time_s,
        "data_time_s": summary.data_time_s,
        "eta_s": summary.eta_s,
        "memory_active_bytes": memory.active_bytes,
        "memory_reserved_bytes": memory.reserved_bytes,
        "memory_alloc_retries": memory.alloc_retries,
        "memory_ooms": memory.ooms,
        **summary.extra,
    }
