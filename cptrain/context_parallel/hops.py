"""Which keys go from whom to whom where only those travel that somebody sees, and what is computed of them on arrival.

Which keys these are follows from layout and mask alone, so every rank knows without asking.

[Note: hops are computed together]
Many ranks and small shards make many small blocks, each of which costs: on CUDA half a millisecond of the host where it
is small, passes over memory that merge outputs and add gradients up, and what a kernel prepares anew. There, hops that
bring few keys are computed together, their keys put in the order of the sequence: what lay side by side there does so
again, and a chunk of queries meets all of it in one block. On an H100 a ring of 8 at 8,192 tokens takes 6 % less time
for it, forward and with backward (four hops together, 32:8 heads of 128, bf16, cuDNN). On CPU the copies cost more than
it saves (3 to 8 %, at 2,048 tokens per rank). Bytes are the same either way. All ranks take the same hops together,
whatever these move: a rank that waited for gradients of few hops, from one that first waits for the keys of many, would
wait for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from cptrain.context_parallel.carrier import cached_shard_blocks
from cptrain.context_parallel.launches import Ranges, join
from cptrain.context_parallel.layout import Layout, Span
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import Block, blocks, needed

ENOUGH_KEYS = 16_384  # tokens that hops taken together may bring: more would only take memory
ENOUGH_KEYS_NEAR = 32_768  # of a ring whose ranks are on one host
COPIES_ARE_DEAR = frozenset({"cpu"})  # devices on which every hop is computed by itself


class Together(NamedTuple):
    """Keys of several sources in the order of the sequence, and the blocks of queries here against `num_keys` of them.

    needed: of each source the ranges of its keys that are among them. places: where these lie, in the same order.
    """

    num_keys: int
    needed: tuple[Ranges, ...]
    places: tuple[Ranges, ...]
    blocks: tuple[Block, ...]


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


def hops_at_once(layout: Layout, device_type: str) -> int:
    """How many hops are computed together, on all ranks alike."""
    return _at_once(layout, device_type, ENOUGH_KEYS)


def ring_hops_at_once(layout: Layout, device_type: str, *, near: bool) -> int:
    """The same of a ring; near: whether its ranks are on one host.

    Gradients of several hops follow one another only after all of these are computed, and keys of several hops must
    come during few: over a network, which at best hides what a hop sends behind its block, that would show.
    """
    return _at_once(layout, device_type, ENOUGH_KEYS_NEAR if near else 0)


def _at_once(layout: Layout, device_type: str, enough: int) -> int:
    return 1 if device_type in COPIES_ARE_DEAR else max(1, enough // layout.shard_length)


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


def batches(hops: Sequence[int], at_once: int) -> list[Sequence[int]]:
    """Hops of a ring that are computed together: one, then up to twice as many as before, and at most so many.

    Keys of a batch are on their way while the one before is computed, so a batch may not be much larger.
    """
    found: list[Sequence[int]] = []
    size, first = 1, 0
    while first < len(hops):
        found.append(hops[first : first + size])
        first, size = first + size, min(2 * size, at_once)
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


def num_tokens(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)
