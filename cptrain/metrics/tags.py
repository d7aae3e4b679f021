"""The names of the TensorBoard curves."""

from __future__ import annotations

from typing import Literal

from cptrain.metrics import human
from cptrain.metrics.record import Summary

VALIDATION_LOSS = "validation_metrics/loss"
NEEDLE_ACC = "long_context/needle_acc"

# Hugging Face's Trainer has these curves under its own names; all others keep torchtitan's.
_HF = {
    "loss_metrics/global_avg_loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/learning_rate",
    "n_tokens_seen": "train/num_input_tokens_seen",
    VALIDATION_LOSS: "eval/loss",
}


def tag(name: str, style: Literal["titan", "hf"]) -> str:
    """The tag that the curve torchtitan calls `name` has in `style`."""
    return _HF.get(name, name) if style == "hf" else name


def curves(summary: Summary) -> dict[str, float]:
    """The point of every curve at a step, by torchtitan's tag. What has no meaning on the device is left out."""
    memory = summary.memory
    points: dict[str, float | None] = {
        "loss_metrics/global_avg_loss": summary.loss,
        "loss_metrics/global_max_loss": summary.max_loss,
        "grad_norm": summary.grad_norm,
        "lr": summary.lr,
        "n_tokens_seen": summary.tokens_seen,
        "throughput(tps)": summary.tps,
        "tflops": summary.tflops,
        "mfu(%)": summary.mfu_percent,
        "time_metrics/end_to_end(s)": summary.step_time_s,
        "time_metrics/data_loading(s)": summary.data_time_s,
        "time_metrics/data_loading(%)": summary.data_percent,
        "memory/max_active(GiB)": memory.active_bytes / human.GIB,
        "memory/max_active(%)": memory.active_percent,
        "memory/max_reserved(GiB)": memory.reserved_bytes / human.GIB,
        "memory/max_reserved(%)": memory.reserved_percent,
        "memory/num_alloc_retries": memory.alloc_retries,
        "memory/num_ooms": memory.ooms,
    }
    return {name: value for name, value in points.items() if value is not None} | dict(summary.extra)
