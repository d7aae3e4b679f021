"""What bench_documents measures: packs of documents, and the ways to cut them over ranks.

Per-document zigzag cuts every document into 2N pieces of which rank r holds the r-th and the (2N-1-r)-th. A document
whose length 2N does not divide is filled up with padding to the next multiple (one shorter than 2N to 2N tokens), as
TransformerEngine asks for. Padding is neither work nor moved, but the stream gets longer by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

import numpy as np

from cptrain.context_parallel.balance import (
    Part,
    choose_chunk_size,
    chunk_parts,
    imbalance,
    num_moved,
    owners_of,
    work_of,
)
from cptrain.context_parallel.carrier import cached_shard_blocks
from cptrain.context_parallel.hops import batches, groups_of, hops_at_once, ring_pace, together
from cptrain.context_parallel.layout import Layout, Span, make_layout
from cptrain.context_parallel.mask import Documents, num_visible
from cptrain.context_parallel.packing import Packing, pack
from cptrain.context_parallel.schedule import Block
from cptrain.data.corpus import open_corpus
from cptrain.data.prepare import prepare_corpus
from cptrain.data.settings import DataConfig, TokenizerConfig
from cptrain.data.split import Split, split_documents
from cptrain.data.windows import Windows

MEDIAN, SIGMA = 600, 1.708  # tokens of lognormal documents: 0.3 % have more than 64K
LAYOUTS = ("contiguous", "zigzag", "per-document zigzag", "balanced")
LayoutName = Literal["contiguous", "zigzag", "per-document zigzag", "balanced"]


def stdlib_pack(seq_len: int, number: int) -> list[int]:
    """Lengths of the documents in a window of the built-in corpus, in the order in which training reads windows."""
    ids = Windows(_training_text(), seq_len=seq_len)[number]["document_ids"]
    return [int(length) for length in ids.bincount()]


@cache
def _training_text() -> Split:
    folder = prepare_corpus(DataConfig(), TokenizerConfig(), seed=0)
    return split_documents(open_corpus(folder), fraction=DataConfig().validation_fraction, seed=0)[0]


def lognormal_pack(seq_len: int, number: int) -> list[int]:
    """Lengths of the documents in a window of a stationary stream of documents with a long tail.

    A window begins within a document, which it meets the more likely the longer it is: lengths weighted by themselves
    are lognormal with mu + sigma^2. Of that document it sees what lies behind a place that is anywhere in it.
    """
    generator = np.random.default_rng([seq_len, number])
    mu = math.log(MEDIAN)
    first = generator.lognormal(mu + SIGMA**2, SIGMA) * generator.random()
    lengths, left = [], seq_len
    while left:
        length = first if not lengths else generator.lognormal(mu, SIGMA)
        lengths.append(min(left, max(1, round(length))))
        left -= lengths[-1]
    return lengths


SETS: dict[str, Callable[[int, int], list[int]]] = {"stdlib": stdlib_pack, "lognormal": lognormal_pack}


def num_pairs(lengths: Sequence[int]) -> int:
    """(query, key) pairs of documents of these lengths."""
    return sum(map(num_visible, lengths))


def median_pack(name: str, seq_len: int, num_packs: int) -> list[int]:
    """Of the set's first packs, those with two documents and more, the one of median work."""
    packs = [SETS[name](seq_len, number) for number in range(num_packs)]
    packs = sorted([lengths for lengths in packs if len(lengths) > 1] or packs, key=num_pairs)
    return packs[(len(packs) - 1) // 2]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A pack over ranks: documents of the stream (with padding), where its pieces are, what lies in each, who has it.

    chunk_size: of all pieces, if it is one; 0 for pieces of many sizes. num_tokens: without padding.
    """

    documents: Documents
    num_tokens: int
    chunk_size: int
    spans: list[list[Span]]  # by rank
    parts: list[list[Part]]  # by piece
    owners: list[int]  # by piece

    @property
    def num_ranks(self) -> int:
        return len(self.spans)

    @property
    def imbalance(self) -> float:
        return imbalance(work_of(self.parts), self.owners, self.num_ranks)

    @property
    def moved_share(self) -> float:
        """Keys that must travel, of those that a full ring moves."""
        return num_moved(self.parts, self.owners) / ((self.num_ranks - 1) * self.num_tokens)

    def num_blocks(self) -> int:
        """Kernel launches of the rank with most, per layer and forward pass."""
        packing = self.packing()
        return max(len(rank_blocks(packing, rank)) for rank in range(self.num_ranks))

    def packing(self) -> Packing:
        """What attention needs to run in this cut."""
        size = self.chunk_size or math.gcd(*(number for spans in self.spans for span in spans for number in span[1:]))
        owners = [0] * (self.documents.length // size)
        for rank, spans in enumerate(self.spans):
            for span in spans:
                first = span.start // size
                owners[first : first + span.length // size] = [rank] * (span.length // size)
        return packing_of(self.documents, Layout.of_owners(owners, self.num_ranks, size))


def documents_of(lengths: Sequence[int]) -> Documents:
    return Documents((0, *accumulate(lengths)))


def packing_of(documents: Documents, layout: Layout) -> Packing:
    return pack(documents, num_ranks=layout.num_ranks, num_rows=1, chunk_size=layout.chunk_size, layout=layout)


def rank_blocks(packing: Packing, rank: int, device_type: str = "cuda", heads_per_key: int = 1) -> list[Block]:
    """The blocks that a rank computes forward, of its own keys and of those of hops that are computed together.

    As where links are fast. heads_per_key: query heads that share a key head.
    """
    layout, mask = packing.layout, packing.mask()
    ranks = layout.num_ranks
    found = list(cached_shard_blocks(layout, mask, rank, rank))
    if packing.exchange_is_cheaper():
        at_once = hops_at_once(layout, device_type, heads_per_key=heads_per_key, fast=True)
        for group in groups_of(layout, mask, rank, at_once):
            found += group.keys.blocks
    else:
        for hops in batches(range(ranks), ring_pace(layout, device_type, heads_per_key=heads_per_key, fast=True))[1:]:
            found += together(layout, mask, rank, tuple((rank - hop) % ranks for hop in hops)).blocks
    return found


def balanced_packing(documents: Documents, ranks: int) -> Packing:
    """What the library makes of one window: all of its planning."""
    size = choose_chunk_size(documents.length // ranks, "auto")
    return pack(documents, num_ranks=ranks, num_rows=1, chunk_size=size)


def make_cut(name: LayoutName, lengths: Sequence[int], ranks: int) -> Cut:
    """The pack cut by one of LAYOUTS."""
    documents = documents_of(lengths)
    if name == "per-document zigzag":
        return _per_document(lengths, ranks)
    if name == "balanced":
        return cut_of(documents, balanced_packing(documents, ranks).layout)
    return cut_of(documents, make_layout(name, ranks, documents.length))


def cut_of(documents: Documents, layout: Layout) -> Cut:
    return Cut(
        documents=documents,
        num_tokens=documents.length,
        chunk_size=layout.chunk_size,
        spans=[layout.spans(rank) for rank in range(layout.num_ranks)],
        parts=chunk_parts(documents, layout.chunk_size),
        owners=owners_of(layout),
    )


def _per_document(lengths: Sequence[int], ranks: int) -> Cut:
    """Every document in zigzag; see the top of this file."""
    offsets, padding, held = [0], [], 0
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    parts: list[list[Part]] = []
    owners: list[int] = []
    for length in lengths:
        size, start = -(-length // (2 * ranks)), offsets[-1]
        number = len(offsets) - 1 - len(padding)
        offsets.append(start + length)
        if length < 2 * ranks * size:
            padding.append(len(offsets) - 1)
            offsets.append(start + 2 * ranks * size)
        for piece in range(2 * ranks):
            owner = min(piece, 2 * ranks - 1 - piece)
            begin, end = piece * size, min((piece + 1) * size, length)
            local = held if piece < ranks else held + size
            spans[owner].append(Span(local, start + begin, size))
            parts.append([Part(number, begin, end)] if begin < end else [])
            owners.append(owner)
        held += 2 * size
    return Cut(
        documents=Documents(tuple(offsets), tuple(padding)),
        num_tokens=sum(lengths),
        chunk_size=0,
        spans=[_joined(own) for own in spans],
        parts=parts,
        owners=owners,
    )


def _joined(spans: list[Span]) -> list[Span]:
    """Neighbours in the stream as one, as `Layout.spans` gives them."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].start + joined[-1].length == span.start:
            joined[-1] = joined[-1]._replace(length=joined[-1].length + span.length)
        else:
            joined.append(span)
    return joined
