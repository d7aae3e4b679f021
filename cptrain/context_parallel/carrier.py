"""How keys and values come to the ranks that need them, and their gradients back: what tells methods apart.

[Note: carriers]
A carrier brings keys and values here piece by piece and asks for each piece to be computed at the moment when the next
one is in flight. It knows nothing of kernels; the computation knows nothing of ranks. All carriers run the same
schedule, so a method is right if it brings the right keys and takes their gradients home.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.memory_order import by_head, new_tokens
from cptrain.context_parallel.schedule import Block, shard_blocks, whole_blocks
from cptrain.context_parallel.sums import Sum


class Piece(NamedTuple):
    """Keys [B, h, T', Dk] and values [B, h, T', Dv] of some kv heads, and the blocks to compute against them."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: tuple[Block, ...]
    first_head: int = 0  # of the rank's kv heads, the first one in this piece


Sums = tuple[Sum, Sum]  # of dk and dv, in fp32 (fp64)
Gradients = list[tuple[slice, torch.Tensor, torch.Tensor]]  # of keys [start, stop) of a piece: dk, dv


class Computes(Protocol):
    """What the backward pass does with a piece."""

    def __call__(self, piece: Piece, into: Sums | None = None) -> Gradients:
        """The gradients of the piece's keys; or none, where they were added to the sums that it is given instead."""


class Carrier(Protocol):
    """Both methods are collective, and make the same messages in the same order on all ranks whatever the masks."""

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        """Have every piece computed that a query here sees; returns what backward starts from (may be empty)."""

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv of this rank's own k and v, summed over all ranks in fp32 (fp64), from every piece's gradients."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over pieces are kept in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_sum(like: torch.Tensor) -> Sum:
    """Of values of this shape [B, H, T, D], wide, in the order of what kernels return for arranged tensors."""
    return Sum(new_tokens(like, like.size(2), accumulator_dtype(like.dtype)))


def new_sums(k: torch.Tensor, v: torch.Tensor) -> Sums:
    """Of gradients of k and v."""
    return new_sum(k), new_sum(v)


def pack(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k and v as one flat message. Always a copy: accumulators and messages must never alias an input."""
    message = k.new_empty(k.numel() + v.numel())
    packed_k, packed_v = unpack(message, k.shape, v.shape)
    packed_k.copy_(k)
    packed_v.copy_(v)
    return message


def unpack(message: torch.Tensor, k_shape: torch.Size, v_shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of k [B, Hk, T, Dk] and v [B, Hk, T, Dv] in a flat message, arranged for the device."""
    num_k = k_shape.numel()
    return _as_heads(message[:num_k], k_shape), _as_heads(message[num_k:], v_shape)


def _as_heads(flat: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    batch, heads, length, dim = shape
    if by_head(flat.device):
        return flat.view(shape)
    return flat.view(batch, length, heads, dim).transpose(1, 2)


cached_shard_blocks = lru_cache(maxsize=4096)(shard_blocks)
cached_whole_blocks = lru_cache(maxsize=256)(whole_blocks)


class Alone:
    """One rank holds everything: nothing travels."""

    def __init__(self, layout: Layout, mask: Mask) -> None:
        self._blocks = cached_whole_blocks(layout, mask, 0)

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        compute(Piece(k, v, self._blocks))
        return k.new_empty(0)

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradients = compute(Piece(k, v, self._blocks))
        if len(gradients) == 1 and gradients[0][1].size(2) == k.size(2):
            return gradients[0][1:]  # of all keys: padding has none
        total = new_sums(k, v)
        for columns, *both in gradients:
            for whole, part in zip(total, both, strict=True):
                whole.add(((columns.start, columns.stop),), part)
        return total[0].result(), total[1].result()
