"""Every rank gathers all keys and values, one kv head at a time: the next head arrives while one is computed.

Memory is O(S) for one head instead of all of them. Gradients of a head's keys are summed over ranks by a reduce-scatter
in fp32 (fp64).
Source: Llama 3 (arXiv:2407.21783 section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from cptrain.context_parallel.carrier import (
    Computes,
    Piece,
    accumulator_dtype,
    cached_whole_blocks,
)
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.memory_order import new_heads
from cptrain.context_parallel.sums import Sum
from cptrain.distributed.sending import kept_per_stream, send
from cptrain.distributed.transport import Gathering, end, group_rank


class AllGather:
    """Carries the keys of one head after another to all ranks of `group`."""

    def __init__(self, layout: Layout, mask: Mask, *, group: str, overlap: bool) -> None:
        self._layout = layout
        self._gathering = Gathering(group, overlap=overlap)
        self._blocks = cached_whole_blocks(layout, mask, group_rank(group))

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        self._visit(k, v, lambda piece: compute(piece))
        return k.new_empty(0)

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = accumulator_dtype(k.dtype)
        total = new_heads(k, wide), new_heads(v, wide)
        widths = [k.size(-1), v.size(-1)]
        to_shards, _ = _chunk_orders(self._layout, k.size(0), k.device)

        def visit(piece: Piece) -> None:
            both = torch.empty(k.size(0), 1, self._layout.length, sum(widths), dtype=wide, device=k.device)
            of_keys, of_values = (Sum(x) for x in both.split(widths, -1))
            compute(piece, (of_keys, of_values))
            of_keys.result(), of_values.result()
            parts = self._reordered(both, to_shards).view(
                self._layout.num_ranks, k.size(0), 1, k.size(2), both.size(-1)
            )
            own = self._gathering.reduce_scatter(parts)
            for x, part in zip(total, own.split(widths, -1), strict=True):
                x[:, piece.first_head : piece.first_head + 1] = part

        self._visit(k, v, visit)
        return total

    def _visit(self, k: torch.Tensor, v: torch.Tensor, visit: Callable[[Piece], None]) -> None:
        """One head after another, the next always under way."""
        _, to_sequence = _chunk_orders(self._layout, k.size(0), k.device)
        under_way = self._post(k, v, 0)
        for head in range(k.size(1)):
            parts, works = under_way
            end(works)
            if head + 1 < k.size(1):
                under_way = self._post(k, v, head + 1)
            both = self._reordered(parts, to_sequence).view(k.size(0), 1, self._layout.length, k.size(-1) + v.size(-1))
            keys, values = both.split([k.size(-1), v.size(-1)], -1)
            visit(Piece(keys, values, self._blocks, first_head=head))

    def _post(self, k: torch.Tensor, v: torch.Tensor, head: int) -> tuple[torch.Tensor, list[dist.Work]]:
        both = k.new_empty(k.size(0), 1, k.size(2), k.size(-1) + v.size(-1))
        both[..., : k.size(-1)] = k[:, head : head + 1]
        both[..., k.size(-1) :] = v[:, head : head + 1]
        return self._gathering.post(both)

    def _reordered(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """The chunks of x, of which all rows follow one another in memory, in this order: [B * chunks, numbers]."""
        return x.view(order.numel(), x.numel() // max(order.numel(), 1)).index_select(0, order)


@kept_per_stream(maxsize=16)
def _chunk_orders(layout: Layout, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices that put chunks from global order [B, S] into sharded order [N, B, T], and back.

    Copied to the device once per layout and batch size.
    """
    chunks = torch.tensor(layout.chunks)  # [N, chunks of a rank]
    rows = torch.arange(batch)[:, None] * chunks.numel()
    order = (chunks[:, None] + rows).flatten()
    return send(order, device), send(torch.argsort(order), device)
