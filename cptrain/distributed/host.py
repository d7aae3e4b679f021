"""What a process asks of the system before it computes as one of several ranks."""

from __future__ import annotations

import torch

from cptrain.distributed.host_memory import keep_freed_memory
from cptrain.distributed.turns import take_turns


def prepare_host(device: torch.device) -> None:
    """Where the CPU is what computes: freed memory is kept, and ranks on shared cores take turns."""
    if device.type == "cpu":
        keep_freed_memory()
        take_turns()
