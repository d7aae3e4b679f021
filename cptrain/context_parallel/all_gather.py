"""Every rank gathers all keys and values, one kv head at a time: the next head arrives while one is computed.

Memory is O(S) for one head instead of all of them. Gradients of a head's keys are summed over ranks by a reduce-scatter
in fp32 (fp64).
Source: Llama 3 (arXiv:2407.21783 section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist

from cptrain.context_parallel.carrier import (
    Computes,
    Piece,
    accumulator_dtype,
    cached_whole_blocks,
    new_heads,
    new_sums,
)
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.distributed.transport import Gathering, group_rank


class AllGather:
    """Carries the keys of one head after another to all ranks of `group`."""

    def __init__(self, layout: Layout, mask: Mask, *, group: str, overlap: bool) -> None:
        self._layout = layout
        self._gathering = Gathering(group, overlap=overlap)
        self._blocks = cached_whole_blocks(layout, mask, group_rank(group))

    def kept_numel(self, k: torch.Tensor, v: torch.Tensor) -> int:
        return 0

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        self._visit(k, v, lambda piece: compute(piece))
        return k.new_empty(0)

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = accumulator_dtype(k.dtype)
        total = new_heads(k, wide), new_heads(v, wide)
        to_shards, _ = _chunk_orders(self._layout, k.device)

        def visit(piece: Piece) -> None:
            whole = new_sums(piece.keys, wide), new_sums(piece.values, wide)
            compute(piece, whole)
            both = self._reordered(torch.cat(whole, -1), to_shards)  # [B, 1, S, Dk + Dv] in sharded order
            parts = both.unflatten(2, (self._layout.num_ranks, -1)).movedim(2, 0).contiguous()
            own = self._gathering.reduce_scatter(parts)
            for x, part in zip(total, own.split([k.size(-1), v.size(-1)], -1), strict=True):
                x[:, piece.first_head : piece.first_head + 1] = part

        self._visit(k, v, visit)
        return total

    def _visit(self, k: torch.Tensor, v: torch.Tensor, visit: Callable[[Piece], None]) -> None:
        """One head after another, the next always under way."""
        _, to_sequence = _chunk_orders(self._layout, k.device)
        under_way = self._post(k, v, 0)
        for head in range(k.size(1)):
            parts, work = under_way
            if work is not None:
                work.wait()
            if head + 1 < k.size(1):
                under_way = self._post(k, v, head + 1)
            # [N, B, 1, T, D] -> [B, 1, N * T, D], then from sharded to global order
            both = self._reordered(parts.movedim(0, 2).flatten(2, 3), to_sequence)
            keys, values = both.split([k.size(-1), v.size(-1)], -1)
            visit(Piece(keys, values, self._blocks, first_head=head))

    def _post(self, k: torch.Tensor, v: torch.Tensor, head: int) -> tuple[torch.Tensor, dist.Work | None]:
        return self._gathering.post(torch.cat((k[:, head : head + 1], v[:, head : head + 1]), -1))

    def _reordered(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """x [B, h, S, D] with its chunks in this order."""
        return x.unflatten(2, (-1, self._layout.chunk_size)).index_select(2, order).flatten(2, 3)


@lru_cache(maxsize=16)
def _chunk_orders(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices that put chunks from global into sharded order, and back; copied to the device once per layout."""
    order = torch.tensor([chunk for shard in layout.chunks for chunk in shard])
    return order.to(device), torch.argsort(order).to(device)
