"""Which keys go from whom to whom where only those travel that somebody sees, and what is computed of them on arrival.

Which keys these are follows from layout and mask alone, so every rank knows without asking.

[Note: hops are computed together]
Many ranks and small shards make many small blocks, each of which costs: on CUDA half a millisecond of the host where it
is small, passes over memory that merge outputs and add gradients up, and what a kernel prepares anew. There, hops that
bring few keys are computed together, their keys put in the order of the sequence: what lay side by side there does so
again, and a chunk of queries meets all of it in one block. On an H200 a ring of 8 at 8,192 tokens takes 6 % less time
for it, forward and with backward (its own hop, then all seven others; 32:8 heads of 128, bf16, cuDNN). On CPU the
copies cost more than it saves (3 to 8 %, at 2,048 tokens per rank). Bytes are the same either way. All ranks take the
same hops together, whatever these move: a rank that waited for gradients of few hops, from one that first waits for the
keys of many, would wait for ever.

[Note: the pace of a ring]
Keys of a batch of hops travel while the batch before it is computed, so it may be larger by as much as a block takes
longer than its message. A hop is T^2/2 pairs of tokens, 2 H D T^2 FLOPs forward, and brings 4 Hk D T bytes (half
precision): at F FLOP/s and W bytes/s a block takes (H / Hk) T W / (2 F) as long. On an H100 or H200 (F 600e12 with
cuDNN, W 370e9 by NVLink) that is (H / Hk) T / 3,200: 10 for 8,192 tokens and four query heads per key head. GPUs with
other kernels or links of their age stay on the safe side of it (A100: 1,440). Backward, gradients have twice the bytes
and blocks three times the time. Over a network at best one hop hides behind another, and behind PCIe none: there every
hop goes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from cptrain.context_parallel.carrier import cached_shard_blocks
from cptrain.context_parallel.launches import Ranges, join, num_tokens
from cptrain.context_parallel.layout import Layout, Span
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import Block, blocks, needed

ENOUGH_KEYS = 16_384  # tokens that hops taken together may bring: more would only take memory
FAST_GROUP = 2  # over a fast link so many times as many; more where more query heads share what a key head takes
TOKENS_PER_MESSAGE = 3_200  # of one query head per key head, whose block takes as long as its message; see the note
COPIES_ARE_DEAR = frozenset({"cpu"})  # devices on which every hop is computed by itself


class Together(NamedTuple):
    """Keys of several sources in the order of the sequence, and the blocks of queries here against `num_keys` of them.

    needed: of each source the ranges of its keys that are among them. places: where these lie, in the same order.
    """

    num_keys: int
    needed: tuple[Ranges, ...]
    places: tuple[Ranges, ...]
    blocks: tuple[Block, ...]


class Pace(NamedTuple):
    """How many hops of a ring are computed together: one, then up to `growth` times as many as before, to `at_once`."""

    at_once: int = 1
    growth: int = 1


class Hop(NamedTuple):
    """One exchange of a rank. outgoing: the ranges of own keys that go to `reader`. incoming: of keys of `source`."""

    reader: int
    source: int
    outgoing: Ranges
    incoming: Ranges


class Group(NamedTuple):
    """Hops whose keys, of each the incoming ones, are computed together; without hops where they move nothing here."""

    hops: tuple[Hop, ...]
    keys: Together


def needed_keys(layout: Layout, mask: Mask, rank: int, source: int) -> Ranges:
    """Ranges of the keys of `source` that queries of `rank` see."""
    return needed(cached_shard_blocks(layout, mask, rank, source))


@lru_cache(maxsize=256)
def num_needed_keys(layout: Layout, mask: Mask) -> int:
    """Keys that travel per forward pass, over all ranks: what this carrier sends, in tokens."""
    ranks = range(layout.num_ranks)
    return sum(
        num_tokens(needed_keys(layout, mask, rank, source)) for rank in ranks for source in ranks if rank != source
    )


def hops_at_once(layout: Layout, device_type: str, *, heads_per_key: int = 1, fast: bool = False) -> int:
    """How many hops are computed together, on all ranks alike.

    heads_per_key: query heads that share a key head. fast: whether the link is (see `Groups`).
    """
    if device_type in COPIES_ARE_DEAR:
        return 1
    enough = ENOUGH_KEYS * (max(FAST_GROUP, heads_per_key) if fast else 1)
    return max(1, enough // layout.shard_length)


def ring_pace(layout: Layout, device_type: str, *, heads_per_key: int, fast: bool) -> Pace:
    """The same of a ring, over whose slower links every hop goes by itself; see [Note: the pace of a ring]."""
    if not fast:
        return Pace()
    at_once = hops_at_once(layout, device_type, heads_per_key=heads_per_key, fast=True)
    return Pace(at_once, max(2, heads_per_key * layout.shard_length // TOKENS_PER_MESSAGE))


@lru_cache(maxsize=256)
def groups_of(layout: Layout, mask: Mask, rank: int, at_once: int) -> tuple[Group, ...]:
    """The hops at which this rank sends or receives keys, ascending, so many together; as many groups on every rank.

    A matter of its own peers, not of all pairs.
    """
    size, groups = layout.num_ranks, []
    for first in range(1, size, at_once):
        hops = []
        for hop in range(first, min(first + at_once, size)):
            reader, source = (rank + hop) % size, (rank - hop) % size
            outgoing, incoming = needed_keys(layout, mask, reader, rank), needed_keys(layout, mask, rank, source)
            if outgoing or incoming:
                hops.append(Hop(reader, source, outgoing, incoming))
        groups.append(Group(tuple(hops), together(layout, mask, rank, tuple(hop.source for hop in hops))))
    return tuple(groups)


def batches(hops: Sequence[int], pace: Pace) -> list[Sequence[int]]:
    """Hops of a ring that are computed together, in order."""
    found: list[Sequence[int]] = []
    size, first = 1, 0
    while first < len(hops):
        found.append(hops[first : first + size])
        first, size = first + size, min(pace.growth * size, pace.at_once)
    return found


@lru_cache(maxsize=1024)
def together(layout: Layout, mask: Mask, rank: int, sources: tuple[int, ...]) -> Together:
    """The keys of these sources that queries of `rank` see."""
    needed = tuple(needed_keys(layout, mask, rank, source) for source in sources)
    parts = sorted(
        (span.start, number, span.length)
        for number, (source, ranges) in enumerate(zip(sources, needed, strict=True))
        for span in _cut(layout.spans(source), ranges)
    )
    places: list[list[tuple[int, int]]] = [[] for _ in sources]
    spans: list[Span] = []
    before = 0
    for start, number, length in parts:
        places[number].append((before, before + length))
        if spans and spans[-1].start + spans[-1].length == start:
            spans[-1] = spans[-1]._replace(length=spans[-1].length + length)
        else:
            spans.append(Span(before, start, length))
        before += length
    found = blocks(layout.spans(rank), spans, mask) if spans else ()
    return Together(before, needed, tuple(join(tuple(place)) for place in places), found)


def _cut(spans: list[Span], ranges: Ranges) -> list[Span]:
    """The parts of these spans that lie in these ranges of local indices."""
    return [
        Span(max(start, span.local), span.start + max(start, span.local) - span.local, length)
        for span in spans
        for start, stop in ranges
        if (length := min(stop, span.local + span.length) - max(start, span.local)) > 0
    ]
