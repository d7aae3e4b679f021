"""Which blocks of attention a rank computes at each hop: a pure function of layout, mask and rank.

[Note: one schedule for every method]
A block is a rectangle (local queries x local keys of one source rank) that one kernel call computes, either in full or
causally along its diagonal. Every method executes the same blocks: the ring receives the sources one hop at a time,
Ulysses has one source that holds the whole sequence. A schedule is therefore checked without processes: every visible
(query, key) pair lies in exactly one block, no invisible pair in any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask


class Block(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop), both local indices.

    causal: the block is square and query q_start + i sees keys up to k_start + i. Otherwise it sees all of them.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs, the unit of attention work."""
        queries, keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return queries * (queries + 1) // 2 if self.causal else queries * keys


@dataclass(frozen=True)
class Hop:
    """What a rank does with the keys and values of `source`."""

    source: int
    blocks: tuple[Block, ...]


def ring_schedule(layout: Layout, mask: Mask, rank: int) -> tuple[Hop, ...]:
    """The hops of `rank`: at hop i it holds the keys of rank - i. All ranks make all hops, also without blocks."""
    size = layout.num_ranks
    sources = [(rank - hop) % size for hop in range(size)]
    return tuple(Hop(source, blocks(layout, mask, rank, source)) for source in sources)


def blocks(layout: Layout, mask: Mask, rank: int, source: int) -> tuple[Block, ...]:
    """The fewest kernel calls this greedy finds for the queries of `rank` against the keys of `source`."""
    if not mask.causal:
        return (Block(0, layout.shard_length, 0, layout.shard_length, False),)
    if rank == source:
        # Local order is global order, so the causal mask of the shard is the causal mask of the sequence.
        return (Block(0, layout.shard_length, 0, layout.shard_length, True),)
    found: list[Block] = []
    for q_local, q_global, q_length in layout.spans(rank):
        # Spans of different ranks never overlap: a key span lies wholly before or wholly after these queries.
        for k_local, k_global, k_length in layout.spans(source):
            if k_global < q_global:
                found.append(Block(q_local, q_local + q_length, k_local, k_local + k_length, False))
    return _joined(found)


def _joined(found: list[Block]) -> tuple[Block, ...]:
    """The same pairs in fewer full blocks: neighbours along the keys are joined first, then along the queries."""
    along_keys: list[Block] = []
    for block in found:
        last = along_keys[-1] if along_keys else None
        if last and last[:2] == block[:2] and last.k_stop == block.k_start:
            along_keys[-1] = last._replace(k_stop=block.k_stop)
        else:
            along_keys.append(block)
    along_queries: list[Block] = []
    for block in along_keys:
        above = next(
            (i for i, b in enumerate(along_queries) if b.q_stop == block.q_start and b[2:4] == block[2:4]), None
        )
        if above is None:
            along_queries.append(block)
        else:
            along_queries[above] = along_queries[above]._replace(q_stop=block.q_stop)
    return tuple(along_queries)
