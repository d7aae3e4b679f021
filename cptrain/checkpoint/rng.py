"""Random number generator states as tensors, by rank."""

from __future__ import annotations

import random
import struct
import sys
from typing import Any

import torch

# The one section of a checkpoint whose keys differ from rank to rank: a rank that finds its own restores it.
SECTION = "rng"

State = dict[str, dict[str, torch.Tensor]]


def capture(rank: int) -> State:
    """This rank's generators: torch's (CPU, and the current CUDA device), Python's, and NumPy's where it is loaded.

    Goes into what `Checkpointer.save` and `load` are given, as section "rng".
    """
    states = {"cpu": torch.get_rng_state(), "python": _python_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        states["numpy"] = _numpy_state(sys.modules["numpy"])
    return {f"rank{rank}": states}


def restore(state: State) -> None:
    """Set the generators to what `capture` found, or to what `load` has put in its place since."""
    for states in state.values():
        torch.set_rng_state(states["cpu"])
        version, *words, has_gauss, gauss = states["python"].tolist()
        random.setstate((version, tuple(words), _to_float(gauss) if has_gauss else None))
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
        if "numpy" in states:
            *words, position, has_gauss, gauss = states["numpy"].tolist()
            numpy = sys.modules["numpy"]
            key = numpy.array(words, dtype=numpy.uint32)
            numpy.random.set_state(("MT19937", key, position, has_gauss, _to_float(gauss)))


def _python_state() -> torch.Tensor:
    version, words, gauss = random.getstate()
    return torch.tensor([version, *words, gauss is not None, _to_int(gauss or 0.0)], dtype=torch.int64)


def _numpy_state(numpy: Any) -> torch.Tensor:
    _, words, position, has_gauss, gauss = numpy.random.get_state()
    return torch.tensor([*words.tolist(), position, has_gauss, _to_int(gauss)], dtype=torch.int64)


def _to_int(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _to_float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
