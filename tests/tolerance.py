"""The one table of tolerances, and a comparison that refuses to be meaningless."""

from __future__ import annotations

import torch

ATOL = {torch.float64: 1e-10, torch.float32: 1e-5}  # fp32 relative to the signal's own scale


def assert_matches(
    actual: torch.Tensor, expected: torch.Tensor, *, atol: float | None = None, whole: torch.Tensor | None = None
) -> None:
    """Largest difference within the dtype's tolerance; a tolerance above 1 % of the signal is an error of the test.

    whole: what both are a part of, and whose signal counts.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    signal = (expected if whole is None else whole).abs().max().item()
    limit = ATOL[expected.dtype] * (1.0 if expected.dtype == torch.float64 else signal) if atol is None else atol
    assert limit <= 0.01 * signal, f"a tolerance of {limit:.1e} says nothing about a signal of {signal:.1e}"
    error = (actual - expected).abs().max().item()
    assert error <= limit, f"largest difference {error:.3e}, allowed {limit:.1e} (signal {signal:.1e})"
