"""What "auto" precision means by device and by the dtype of the weights."""

from __future__ import annotations

import pytest
import torch

from cptrain.train.precision import resolve_precision
from cptrain.train.settings import TrainingConfig

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("device", "keys", "expected"),
    [
        ("cuda", {}, (SINGLE, HALF, SINGLE)),
        ("cpu", {}, (SINGLE, SINGLE, SINGLE)),
        ("cuda", {"dtype": "float64"}, (DOUBLE, DOUBLE, DOUBLE)),
        ("cpu", {"dtype": "float64"}, (DOUBLE, DOUBLE, DOUBLE)),
        ("cuda", {"dtype": "bfloat16"}, (HALF, HALF, SINGLE)),
        ("cuda", {"mixed_precision_param": "float32"}, (SINGLE, SINGLE, SINGLE)),
        ("cpu", {"mixed_precision_param": "bfloat16", "mixed_precision_reduce": "bfloat16"}, (SINGLE, HALF, HALF)),
    ],
)
def test_precision_of_blocks_is_half_on_cuda_and_sums_are_wide(device, keys, expected):
    found = resolve_precision(TrainingConfig(**keys), torch.device(device))
    assert (found.dtype, found.param, found.reduce) == expected
