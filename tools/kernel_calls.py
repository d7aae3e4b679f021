"""How many calls of a kernel a rank makes in a forward pass of one layer.

What carries the keys brings them in pieces, of one hop or of several that are computed together; the blocks of a piece
are computed in as few calls as the kernel allows. Both follow from layout, mask and device, without running anything.
Links are taken to be fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cptrain.context_parallel.carrier import cached_shard_blocks
from cptrain.context_parallel.hops import batches, groups_of, hops_at_once, ring_pace, together
from cptrain.context_parallel.kernels import Kernel
from cptrain.context_parallel.launches import plan_launches
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import Block

Pieces = list[tuple[Block, ...]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """What computes attention, and of what.

    heads_per_key: query heads that share a key head. batch: sequences, that are not packed, in one call of attention.
    """

    device: str
    kernel: Kernel
    dtype: torch.dtype
    heads_per_key: int = 1
    batch: int = 1

    def num_calls(self, pieces: Iterable[tuple[Block, ...]]) -> int:
        """Calls that compute these pieces."""
        packs = self.kernel.forward_packed is not None and self.batch == 1
        return sum(len(plan_launches(blocks, packs=packs)) for blocks in pieces)


def exchange_pieces(layout: Layout, mask: Mask, rank: int, place: Place) -> Pieces:
    """What a rank computes where only needed keys travel: its own keys, then those of each group of hops."""
    at_once = hops_at_once(layout, place.device, heads_per_key=place.heads_per_key, fast=True)
    own = cached_shard_blocks(layout, mask, rank, rank)
    return [own, *(group.keys.blocks for group in groups_of(layout, mask, rank, at_once))]


def ring_pieces(layout: Layout, mask: Mask, rank: int, place: Place, inner_degree: int = 1) -> Pieces:
    """What a rank of a (double) ring computes, in order; inner_degree: ranks of an inner ring, 1 for a single ring."""
    inner = inner_degree if inner_degree > 1 else layout.num_ranks
    pace = ring_pace(layout, place.device, heads_per_key=place.heads_per_key, fast=True)
    pieces = []
    for revolution in range(layout.num_ranks // inner):
        first = (rank // inner - revolution) * inner % layout.num_ranks
        for hops in batches(range(inner), pace):
            sources = tuple(first + (rank - hop) % inner for hop in hops)
            if len(sources) == 1:
                pieces.append(cached_shard_blocks(layout, mask, rank, *sources))
            else:
                pieces.append(together(layout, mask, rank, sources).blocks)
    return pieces
