"""The log line of a step."""

from __future__ import annotations

from cptrain.metrics import human
from cptrain.metrics.record import Summary


def format_line(summary: Summary, *, device_word: str) -> str:
    """`key: value` pairs two spaces apart, as torchtitan prints them and its users' regular expressions expect.

    No value holds two spaces and nothing is padded or coloured, so `dict(p.split(": ", 1) for p in line.split("  "))`
    reads a line back. `device_word` is what tokens per second are counted per: "gpu", or "rank" on CPU. tps and tokens
    count padding, which tflops and mfu do not. memory is the peak that the allocator of rank 0's device reserved (on
    CPU: that was resident), and its share of all there is.
    """
    mfu = "n/a" if summary.mfu_percent is None else f"{summary.mfu_percent:.2f}%"
    pairs = {
        "step": f"{summary.step}",
        "loss": f"{summary.loss:.5f}",
        "grad_norm": f"{summary.grad_norm:.4f}",
        "memory": f"{summary.memory.reserved_bytes / human.GIB:.2f}GiB({summary.memory.reserved_percent:.2f}%)",
        "tps": f"{summary.tps:,.0f}/{device_word} ({summary.tps_total:,.0f} total)",
        "tflops": f"{summary.tflops:,.2f}",
        "mfu": mfu,
        "lr": f"{summary.lr:.4e}",
        "tokens": human.count(summary.tokens_seen),
        "step_time": f"{summary.step_time_s:.2f}s",
        "data": f"{summary.data_percent:.1f}%",
        "eta": human.duration(summary.eta_s),
    }
    return "  ".join(f"{key}: {value}" for key, value in pairs.items())


def format_validation(step: int, loss: float, needle_acc: float | None = None) -> str:
    """The line of a validation, in the same form; needle_acc: the share of needles found, where any were hidden."""
    found = "" if needle_acc is None else f"  needle_acc: {needle_acc:.3f}"
    return f"validate step: {step}  loss: {loss:.5f}{found}"
