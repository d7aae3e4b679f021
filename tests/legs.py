"""Starts of a small run that are watched: what each read, drew, logged and left, on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from cptrain.checkpoint.state import training_state
from cptrain.loss import cross_entropy_sum
from cptrain.train import trainer as trainer_module
from cptrain.train.settings import TrainSettings
from cptrain.train.trainer import Trainer


class Watched(Trainer):
    """A trainer that notes what it reads and draws, and to which something can happen in a step.

    read: for each step, the digests of the windows that this rank read. drawn: a number of every generator per step.
    signals: what this rank sends itself in the middle of that step. poisoned: the step whose loss is nan here.
    """

    def __init__(self, settings: TrainSettings, *, signals: dict[int, list[int]] | None = None, poisoned: int = 0):
        self.read: list[list[str]] = []
        self.drawn: list[tuple[float, ...]] = []
        self._signals, self._poisoned = signals or {}, poisoned
        random.seed(0)  # generators that the trainer leaves alone but for carrying them over
        np.random.seed(0)
        super().__init__(settings, torch.device("cpu"))

    def train_step(self) -> None:
        self.read.append([])
        super().train_step()
        self.drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))

    def shard(self, batch: dict[str, torch.Tensor]) -> trainer_module.Shard:
        if self.read and torch.is_grad_enabled():  # validation has no gradients
            rows = zip(batch["tokens"], batch["labels"], strict=True)
            self.read[-1] += [hashlib.sha256(torch.cat(row).numpy().tobytes()).hexdigest() for row in rows]
            for number in self._signals.pop(self.step + 1, ()):
                os.kill(os.getpid(), number)
        return super().shard(batch)

    def loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands for the loss of `cptrain.loss`."""
        total = cross_entropy_sum(*args, **kwargs)
        return total * (math.nan if self.step + 1 == self._poisoned else 1)


@dataclasses.dataclass
class Leg:
    """What one start of a run did, on one rank; metrics on rank 0 only."""

    stopped_by: str
    step: int
    read: list[list[str]]
    drawn: list[tuple[float, ...]]
    state: dict[str, bytes]  # every tensor of model and optimizer, whole
    log: str
    error: str = ""
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def numbers(self, kind: str = "train") -> dict[int, tuple[str, str]]:
        """(loss, gradient norm) by step, every bit of them."""
        return {
            record["step"]: (record["loss"].hex(), record.get("grad_norm", 0.0).hex())
            for record in self.metrics
            if record["kind"] == kind
        }


def whole_state(trainer: Trainer) -> dict[str, bytes]:
    state = training_state(trainer.model, trainer.optimizer)
    return {
        f"{part}.{name}": (value.full_tensor() if isinstance(value, DTensor) else value)
        .detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for part, tensors in state.items()
        for name, value in tensors.items()
    }  # fmt: skip


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Every line that cptrain logs."""
    lines: list[str] = []
    logger, handler = logging.getLogger("cptrain"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def leg(settings: TrainSettings, **events: Any) -> Leg:
    """Start a run, as often as it takes to reach the end or what happens to it."""
    with logged() as lines, Watched(settings, **events) as trainer:
        stopped_by = error = ""
        with mock.patch.object(trainer_module, "cross_entropy_sum", trainer.loss):
            try:
                stopped_by = trainer.train()
            except RuntimeError as caught:
                error = str(caught)
        found = Leg(
            stopped_by, trainer.step, trainer.read, trainer.drawn, whole_state(trainer), "\n".join(lines), error
        )
    if trainer.rank == 0:
        text = (settings.job.folder / "metrics.jsonl").read_text()
        found.metrics = [json.loads(line) for line in text.splitlines()]
    return found


def start(rank: int, world: int, settings: TrainSettings, on_rank: int = 0, **events: Any) -> Leg:
    """One start; events happen on one rank only."""
    return leg(settings, **events if rank == on_rank else {})


def start_each(rank: int, world: int, variants: list[TrainSettings]) -> list[Leg]:
    return [leg(settings) for settings in variants]


def read_by_all(legs: list[Leg]) -> list[list[str]]:
    """The windows of each step over all ranks, each once; those that share a sequence read the same."""
    return [sorted({window for rank in legs for window in rank.read[step]}) for step in range(len(legs[0].read))]


def steps_of(found: Leg, kind: str = "train") -> list[int]:
    return [record["step"] for record in found.metrics if record["kind"] == kind]


def flat(read: list[list[str]]) -> list[str]:
    return [window for step in read for window in step]


def checkpoints(settings: TrainSettings) -> list[str]:
    return sorted(path.name for path in (settings.job.folder / "checkpoint").glob("step-*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_state(actual: dict[str, bytes], expected: dict[str, bytes], *, atol: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, content in expected.items():
        if name.endswith(".step"):
            assert actual[name] == content, name
        else:
            error = np.abs(np.frombuffer(actual[name]) - np.frombuffer(content)).max()
            assert error <= atol, f"{name}: largest difference {error:.2e}"


def assert_same_numbers(actual: Leg, expected: Leg, *, atol: float = 1e-10) -> None:
    assert actual.numbers().keys() == expected.numbers().keys()
    for step, numbers in expected.numbers().items():
        for a, e in zip(actual.numbers()[step], numbers, strict=True):
            assert abs(float.fromhex(a) - float.fromhex(e)) <= atol, f"step {step}"
