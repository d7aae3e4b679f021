"""Which keys go from whom to whom where only those travel that somebody sees, and what is computed of them on arrival.

Which keys these are follows from layout and mask alone, so every rank knows without asking.

[Note: hops are computed together]
Many ranks and small shards make many small blocks: the keys that a chunk of queries sees of its document lie on several
ranks. On CUDA, where every block costs the host half a millisecond and its merge a pass over memory, small hops are
computed together, their keys put in the order of the sequence: what lay side by side there does again, and a chunk
meets all of it in one block. On CPU the copies cost more than that saves (3 to 8 %, at 2,048 tokens per rank). Messages
are the same either way. All ranks take the same hops together, whatever these move: a rank that waited for gradients of
few hops, from one that first waits for the keys of many, would wait for ever.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cptrain.context_parallel.carrier import cached_shard_blocks
from cptrain.context_parallel.launches import Ranges, join
from cptrain.context_parallel.layout import Layout, Span
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import Block, blocks, needed

ENOUGH_KEYS = 16_384  # tokens that hops taken together may bring: more would only take memory
COPIES_ARE_DEAR = frozenset({"cpu"})  # devices on which every hop is computed by itself


class Hop(NamedTuple):
    """One exchange of a rank. outgoing: the ranges of own keys that go to `reader`. incoming: of keys of `source`.

    place: where the incoming keys lie among those of the hop's group, which are in the order of the sequence.
    """

    reader: int
    source: int
    outgoing: Ranges
    incoming: Ranges
    place: Ranges


class Group(NamedTuple):
    """Hops whose keys are computed together, and the blocks of queries here against `num_keys` of them."""

    hops: tuple[Hop, ...]
    num_keys: int
    blocks: tuple[Block, ...]


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
    return 1 if device_type in COPIES_ARE_DEAR else max(1, ENOUGH_KEYS // layout.shard_length)


@lru_cache(maxsize=256)
def groups_of(layout: Layout, mask: Mask, rank: int, at_once: int) -> tuple[Group, ...]:
    """The hops at which this rank sends or receives keys, ascending, so many together.

    A matter of its own peers, not of all pairs.
    """
    size, groups = layout.num_ranks, []
    for first in range(1, size, at_once):
        together = []
        for hop in range(first, min(first + at_once, size)):
            reader, source = (rank + hop) % size, (rank - hop) % size
            outgoing, incoming = needed_keys(layout, mask, reader, rank), needed_keys(layout, mask, rank, source)
            if outgoing or incoming:
                together.append(Hop(reader, source, outgoing, incoming, ()))
        if together:
            groups.append(_group(layout, mask, rank, together))
    return tuple(groups)


def _group(layout: Layout, mask: Mask, rank: int, hops: list[Hop]) -> Group:
    """These hops with their keys in the order of the sequence."""
    parts = sorted(
        (span.start, number, span.length)
        for number, hop in enumerate(hops)
        for span in _cut(layout.spans(hop.source), hop.incoming)
    )
    places: list[list[tuple[int, int]]] = [[] for _ in hops]
    spans: list[Span] = []
    before = 0
    for start, number, length in parts:
        places[number].append((before, before + length))
        if spans and spans[-1].start + spans[-1].length == start:
            spans[-1] = spans[-1]._replace(length=spans[-1].length + length)
        else:
            spans.append(Span(before, start, length))
        before += length
    placed = tuple(hop._replace(place=join(tuple(place))) for hop, place in zip(hops, places, strict=True))
    return Group(placed, before, blocks(layout.spans(rank), spans, mask) if spans else ())


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
