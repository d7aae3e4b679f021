"""Settings of what wraps the model's blocks: activation checkpointing and compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cptrain.config import setting


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    """What a block keeps for its backward pass."""

    mode: Literal["none", "selective", "full"] = setting(
        "selective",
        "none keeps all, selective recomputes all but attention and its messages, full keeps the input only",
    )


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """torch.compile of each block."""

    enable: bool = setting(False, "compile every block (first step takes minutes on a GPU)")
    backend: str = setting("inductor", "torch.compile backend")
