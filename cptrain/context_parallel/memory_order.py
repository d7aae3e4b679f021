"""The order in which tensors [B, H, T, D] lie in memory.

[Note: memory order]
Projections store tokens first, [B, T, H, D], and so does what the operator returns: the next reshape of the model is a
view, and CUDA kernels read it well. On CPU a head's rows are then a power of two apart, many of them in the same few
cache lines, and the flash kernel is 3 to 10 % slower than with heads first, forward and backward. There tensors are
put in that order once per call, before the operator, so that backward finds them in it, and what is sent and summed
stays in it.
"""

from __future__ import annotations

import torch


def by_head(device: torch.device) -> bool:
    """Whether kernels of a device want [B, H, T, D] in this order; see [Note: memory order]."""
    return device.type == "cpu"


def arranged(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] in the order that kernels of its device want; itself where it is, or where they take any."""
    return x.contiguous() if by_head(x.device) else x


def in_order(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] without gaps in the order of its device; itself where it is."""
    return x.contiguous() if by_head(x.device) else x.transpose(1, 2).contiguous().transpose(1, 2)


def stored(x: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor that x [B, H, T, D], if in the order of its device, is in memory."""
    return x if by_head(x.device) else x.transpose(1, 2)


def new_heads(like: torch.Tensor, dtype: torch.dtype, dim: int | None = None) -> torch.Tensor:
    """Uninitialised [B, H, T, D] stored as [B, T, H, D]: the model's next reshape is then a view."""
    batch, heads, length, own = like.shape
    return torch.empty(batch, length, heads, dim or own, dtype=dtype, device=like.device).transpose(1, 2)


def new_tokens(like: torch.Tensor, length: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised [B, H, length, D] in the order of its device."""
    batch, heads, _, dim = like.shape
    if by_head(like.device):
        return like.new_empty(batch, heads, length, dim, dtype=dtype)
    return like.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
