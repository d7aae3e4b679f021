"""Which blocks one kernel call computes, and the rows and columns of tensors that such a call reads and writes.

[Note: small blocks go together]
A window of many short documents is many small triangles. A kernel that takes packed segments computes all triangles of
a piece in one call, and small rectangles together, as long as their rows are apart: what two blocks find for one row
must be merged one after the other. Rectangles with many more keys than queries go by themselves: their keys would be
copied, and one of them keeps a device busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate as running_sums
from itertools import pairwise
from typing import NamedTuple

import torch

from cptrain.context_parallel.schedule import Block, Shape
from cptrain.distributed.sending import kept_per_stream, send

MOST_COPIES = 4  # keys over queries above which a rectangle goes by itself
MOST_SLICES = 4  # ranges above which one operation on an index is cheaper than one on each

Ranges = tuple[tuple[int, int], ...]


class Launch(NamedTuple):
    """Blocks of one shape, whose rows are apart, for one kernel call."""

    shape: Shape
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> Ranges:
        """Ranges of queries, one per block."""
        return tuple((block.q_start, block.q_stop) for block in self.blocks)

    @property
    def columns(self) -> Ranges:
        """Ranges of keys, one per block."""
        return tuple((block.k_start, block.k_stop) for block in self.blocks)


class Segments(NamedTuple):
    """Where each of several packed blocks begins and ends.

    q_offsets, k_offsets: int32 [blocks + 1] on the device, and the longest of each: as kernels take them, and first.
    cuts: queries and keys of each, for the host.
    """

    q_offsets: torch.Tensor
    k_offsets: torch.Tensor
    longest_q: int
    longest_k: int
    cuts: tuple[tuple[slice, slice], ...]


@lru_cache(maxsize=1024)
def plan_launches(blocks: tuple[Block, ...], *, packs: bool) -> tuple[Launch, ...]:
    """The calls that compute these blocks, lower triangles first; packs: whether the kernel takes packed segments."""
    if not packs:
        return tuple(Launch(block.shape, (block,)) for block in blocks)
    launches: list[list[Block]] = []
    for shape in (Shape.LOWER, Shape.FULL, Shape.UPPER):
        rounds: list[list[Block]] = []
        for block in sorted(b for b in blocks if b.shape is shape):
            if block.k_stop - block.k_start > MOST_COPIES * (block.q_stop - block.q_start):
                launches.append([block])
                continue
            fitting = next((earlier for earlier in rounds if earlier[-1].q_stop <= block.q_start), None)
            if fitting is None:
                rounds.append([block])
            else:
                fitting.append(block)
        launches += rounds
    launches.sort(key=lambda launch: launch[0].shape is not Shape.LOWER)
    return tuple(Launch(launch[0].shape, tuple(launch)) for launch in launches)


def take(x: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """x [B, H, T, D] or [B, H, T] with these ranges of T, one behind the other: a view where they are one range."""
    ranges = join(ranges)
    if len(ranges) <= 1:
        return x[:, :, slice(*ranges[0]) if ranges else slice(0, 0)]
    ordered, dim = _stored(x)
    taken = ordered.index_select(dim, _index(ranges, x.device))
    return taken if dim == 2 else taken.transpose(1, 2)


def put(x: torch.Tensor, ranges: Ranges, values: torch.Tensor) -> None:
    """Write values into these ranges of T, which are apart."""
    ranges = join(ranges)
    if len(ranges) <= MOST_SLICES:
        for (start, stop), here in _cuts(ranges):
            x[:, :, start:stop] = values[:, :, here]
        return
    ordered, dim = _stored(x)
    ordered.index_copy_(dim, _index(ranges, x.device), (values if dim == 2 else values.transpose(1, 2)).to(x.dtype))


def accumulate(x: torch.Tensor, ranges: Ranges, values: torch.Tensor) -> None:
    """Add values to these ranges of T, which may overlap."""
    ranges = join(ranges)
    if len(ranges) <= MOST_SLICES:
        for (start, stop), here in _cuts(ranges):
            x[:, :, start:stop] += values[:, :, here]
        return
    ordered, dim = _stored(x)
    ordered.index_add_(dim, _index(ranges, x.device), (values if dim == 2 else values.transpose(1, 2)).to(x.dtype))


@lru_cache(maxsize=4096)
def matched(first: Ranges, second: Ranges) -> tuple[tuple[slice, slice], ...]:
    """What of the first ranges is what of the second, which hold as many numbers, one range behind the other."""
    cuts = sorted({stop for ranges in (first, second) for _, here in _cuts(ranges) for stop in (here.start, here.stop)})
    pairs = []
    for begin, end in pairwise(cuts):
        parts = []
        for ranges in (first, second):
            for (start, _), here in _cuts(ranges):
                if here.start <= begin < here.stop:
                    parts.append(slice(start + begin - here.start, start + end - here.start))
        pairs.append((parts[0], parts[1]))
    return tuple(pairs)


@lru_cache(maxsize=4096)
def join(ranges: Ranges) -> Ranges:
    """The same, with each range that begins where the one before ends joined to it."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def num_tokens(ranges: Ranges) -> int:
    """Of all these ranges."""
    return sum(stop - start for start, stop in ranges)


def _stored(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, H, T, D] or [B, H, T] as it lies in memory, and where T then is.

    Operations on an index are several times slower along a dim that is not in its place.
    """
    if x.ndim == 4 and x.stride(1) < x.stride(2):
        return x.transpose(1, 2), 1
    return x, 2


def _cuts(ranges: Ranges) -> Iterator[tuple[tuple[int, int], slice]]:
    """Each range, and where it is among all of them one behind the other."""
    before = 0
    for start, stop in ranges:
        yield (start, stop), slice(before, before + stop - start)
        before += stop - start


@kept_per_stream(maxsize=1024)
def segments(launch: Launch, device: torch.device) -> Segments:
    """The segments of a launch for a kernel; of upper triangles in reverse, as their tensors are (see `schedule`)."""
    queries, keys = ([stop - start for start, stop in ranges] for ranges in (launch.rows, launch.columns))
    if launch.shape is Shape.UPPER:
        queries, keys = queries[::-1], keys[::-1]
    return segments_of(queries, keys, device)


def segments_of(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Segments:
    """The segments of so many queries and keys each."""
    q_ends, k_ends = ([0, *running_sums(lengths)] for lengths in (queries, keys))
    cuts = tuple((slice(*q), slice(*k)) for q, k in zip(pairwise(q_ends), pairwise(k_ends), strict=True))
    q_offsets, k_offsets = (send(torch.tensor(ends, dtype=torch.int32), device) for ends in (q_ends, k_ends))
    return Segments(q_offsets, k_offsets, max(queries), max(keys), cuts)


@kept_per_stream(maxsize=128)  # as many numbers as there are tokens in the ranges
def _index(ranges: Ranges, device: torch.device) -> torch.Tensor:
    return send(torch.cat([torch.arange(start, stop) for start, stop in ranges]), device)
