"""A whole training step on all ranks against one rank: loss, gradient norm, and the gradient of every parameter."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cptrain.check.reference import Step, exact_step, plain_name, single_device_step
from cptrain.check.toy import ToyTrainer
from cptrain.context_parallel.finding import Finding
from cptrain.context_parallel.selfcheck import EXACT, relative_error


def check_step(trainer: ToyTrainer) -> list[Finding]:
    """Three findings of the next step: loss, gradient norm, and the worst gradient of a parameter.

    fp64: the largest difference, the gradients' relative to their own size. Other dtypes: relative errors against fp64,
    at most twice those of one device. Loss and norm are those that rank 0 logs.
    """
    start = time.perf_counter()
    first, number = trainer.stage.batches.next_index, trainer.stage.global_batch_size
    batch = trainer.batch(first, number)
    exact = exact_step(trainer, batch)
    ours = _train_step(trainer, exact)
    dtype = trainer.precision.param
    if dtype == torch.float64:
        limits = [EXACT] * 3
    else:
        single = single_device_step(trainer, batch)
        rounding = max(torch.finfo(dtype).eps, 1e-6)
        limits = [max(2 * error, rounding) for error, _ in _errors(single, exact)]
    looks_at = (
        "the rows above; then the loss: a sum over tokens, divided by the count of valid ones over all ranks, once",
        "the row below; then clip_grad_norm: each element counted once over all mesh axes",
        "the rows above; then FSDP2's reduction (a sum, no average), tensor parallel, gradient accumulation",
    )
    seconds = time.perf_counter() - start
    findings = [
        Finding(name=f"step: {name}", error=error, allowed=limit, look_at=look_at, where=where)
        for name, (error, where), limit, look_at in zip(
            ("loss", "gradient norm", "worst gradient"), _errors(ours, exact), limits, looks_at, strict=True
        )
    ]
    return [replace(findings[0], seconds=seconds), *findings[1:]]


def _errors(step: Step, exact: Step) -> list[tuple[float, str]]:
    """(error, where) of loss, norm and the worst gradient, each relative to the exact one."""
    worst, where = 0.0, ""
    for name, gradient in exact.gradients.items():
        error = relative_error(step.gradients[name], gradient) if name in step.gradients else float("inf")
        if not error <= worst:
            worst, where = error, name
    return [
        (abs(step.loss - exact.loss) / exact.loss, ""),
        (abs(step.grad_norm - exact.grad_norm) / exact.grad_norm, ""),
        (worst, where),
    ]


def _train_step(trainer: ToyTrainer, exact: Step) -> Step:
    """One step of the trainer itself; gradients are taken when its optimizer is about to use them.

    Only rank 0 logs a loss and a norm: the other ranks have nothing to object to them.
    """
    gradients: dict[str, torch.Tensor] = {}

    def take(optimizer: Any, args: Any, kwargs: Any) -> None:
        for name, parameter in trainer.model.named_parameters():
            gradient = parameter.grad
            if gradient is not None:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                gradients[plain_name(name)] = whole.clone()

    handle = trainer.optimizer.register_step_pre_hook(take)
    trainer.train_step()
    handle.remove()
    if trainer.rank > 0:
        return Step(exact.loss, exact.grad_norm, gradients)
    record = json.loads((trainer.settings.job.folder / "metrics.jsonl").read_text().splitlines()[-1])
    return Step(record["loss"], record["grad_norm"], gradients)
