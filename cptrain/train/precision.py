"""The dtypes of a run."""

from __future__ import annotations

import torch

from cptrain.parallel.apply import Precision
from cptrain.train.settings import TrainingConfig


def resolve_precision(training: TrainingConfig, device: torch.device) -> Precision:
    """The dtypes that "auto" stands for on this device."""
    dtype = getattr(torch, training.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    reduce = training.mixed_precision_reduce
    return Precision(
        dtype=dtype,
        param=getattr(torch, training.compute_dtype(device.type)),
        reduce=wide if reduce == "auto" else getattr(torch, reduce),
    )
