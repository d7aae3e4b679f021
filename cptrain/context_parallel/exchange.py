"""Only the keys that somebody sees travel, straight from their owner: for masks that hide most of the sequence.

At hop i a rank sends to the i-th rank after it the keys that some query there sees, and receives likewise; gradients go
straight back and are summed by the owner in fp32. Which keys these are follows from layout and mask alone, so every
rank knows without asking. All go through the hops in the same order and leave out those that move nothing for them:
what two ranks exchange belongs to one hop of both, so neither waits for one that the other has left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from cptrain.context_parallel.carrier import (
    Computes,
    Piece,
    accumulator_dtype,
    cached_shard_blocks,
    new_sums,
    unpack,
)
from cptrain.context_parallel.launches import accumulate, copy_ranges
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import needed, packed
from cptrain.distributed.transport import Messenger, group_rank, group_size


def needed_keys(layout: Layout, mask: Mask, rank: int, source: int) -> tuple[tuple[int, int], ...]:
    """Ranges of the keys of `source` that queries of `rank` see."""
    return needed(cached_shard_blocks(layout, mask, rank, source))


@lru_cache(maxsize=256)
def num_needed_keys(layout: Layout, mask: Mask) -> int:
    """Keys that travel per forward pass, over all ranks: what this carrier sends, in tokens."""
    ranks = range(layout.num_ranks)
    return sum(
        stop - start
        for rank in ranks
        for source in ranks
        if rank != source
        for start, stop in needed_keys(layout, mask, rank, source)
    )


@lru_cache(maxsize=256)
def hops_of(layout: Layout, mask: Mask, rank: int) -> tuple[int, ...]:
    """The hops at which this rank sends or receives keys, ascending: a matter of its own peers, not of all pairs."""
    size = layout.num_ranks
    return tuple(
        hop
        for hop in range(1, size)
        if needed_keys(layout, mask, rank, (rank - hop) % size) or needed_keys(layout, mask, (rank + hop) % size, rank)
    )


class Exchange:
    """Carries needed keys straight from owner to reader over `group`, and gradients back over `grad_group`."""

    def __init__(self, layout: Layout, mask: Mask, *, group: str, grad_group: str, overlap: bool) -> None:
        self._layout, self._mask = layout, mask
        self._size, self._rank = group_size(group), group_rank(group)
        self._messenger = Messenger(group, overlap=overlap)
        self._grad_messenger = Messenger(grad_group, overlap=overlap)
        self._hops = hops_of(layout, mask, self._rank)

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        self._visit(k, v, lambda piece, hop: compute(piece))
        return k.new_empty(0)

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = accumulator_dtype(k.dtype)
        total = new_sums(k, wide), new_sums(v, wide)
        homecoming: tuple[int, torch.Tensor] | None = None  # the reader and the gradients on their way from it

        def take_home() -> None:
            if homecoming is not None:
                self._grad_messenger.wait()
                ranges = needed_keys(self._layout, self._mask, homecoming[0], self._rank)
                self._scatter(total, homecoming[1], ranges)

        def visit(piece: Piece, hop: int) -> None:
            nonlocal homecoming
            if hop == 0:
                compute(piece, total)
                return
            shapes = piece.keys.shape, piece.values.shape
            message = torch.zeros(sum(shape.numel() for shape in shapes), dtype=wide, device=k.device)
            compute(piece, unpack(message, *shapes))
            take_home()
            homecoming = self._send_back(hop, message, k, v)

        self._visit(k, v, visit)
        take_home()
        return total

    def _visit(self, k: torch.Tensor, v: torch.Tensor, visit: Callable[[Piece, int], None]) -> None:
        """Own keys first, then those of each hop, the next hop always under way."""
        under_way = self._post(self._hops[0], k, v) if self._hops else None
        visit(Piece(k, v, cached_shard_blocks(self._layout, self._mask, self._rank, self._rank)), 0)
        for index, hop in enumerate(self._hops):
            received = under_way
            self._messenger.wait()
            if index + 1 < len(self._hops):
                under_way = self._post(self._hops[index + 1], k, v)
            found = cached_shard_blocks(self._layout, self._mask, self._rank, (self._rank - hop) % self._size)
            shapes = self._shapes(needed(found), k, v)
            assert received is not None
            visit(Piece(*unpack(received, *shapes), packed(found)), hop)

    def _post(self, hop: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Start a hop; returns the buffer in which its keys arrive."""
        reader, source = (self._rank + hop) % self._size, (self._rank - hop) % self._size
        outgoing = needed_keys(self._layout, self._mask, reader, self._rank)
        incoming = self._shapes(needed_keys(self._layout, self._mask, self._rank, source), k, v)
        receive = k.new_empty(sum(shape.numel() for shape in incoming))
        send = None
        if outgoing:
            send = self._packed(outgoing, k, v)
        self._messenger.post(send=send, to=reader, receive=receive if receive.numel() else None, source=source)
        return receive

    def _send_back(self, hop: int, message: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Start sending the gradients of a hop's keys to their owner; returns who sends own ones, and into what."""
        reader, source = (self._rank + hop) % self._size, (self._rank - hop) % self._size
        shapes = self._shapes(needed_keys(self._layout, self._mask, reader, self._rank), k, v)
        receive = torch.empty(sum(s.numel() for s in shapes), dtype=message.dtype, device=k.device)
        send = message if message.numel() else None
        self._grad_messenger.post(send=send, to=source, receive=receive if receive.numel() else None, source=reader)
        return reader, receive

    def _packed(self, ranges: tuple[tuple[int, int], ...], k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keys and values of these ranges, one behind the other, as one flat message."""
        shapes = self._shapes(ranges, k, v)
        message = k.new_empty(sum(shape.numel() for shape in shapes))
        for x, part in zip((k, v), unpack(message, *shapes), strict=True):
            copy_ranges(x, ranges, part)
        return message

    @staticmethod
    def _shapes(ranges: tuple[tuple[int, int], ...], k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Size, ...]:
        length = sum(stop - start for start, stop in ranges)
        return tuple(torch.Size((x.size(0), x.size(1), length, x.size(3))) for x in (k, v))

    @staticmethod
    def _scatter(
        total: tuple[torch.Tensor, torch.Tensor], message: torch.Tensor, ranges: tuple[tuple[int, int], ...]
    ) -> None:
        """Add gradients of packed ranges to the keys they belong to."""
        for whole, part in zip(total, unpack(message, *Exchange._shapes(ranges, *total)), strict=True):
            accumulate(whole, ranges, part)
