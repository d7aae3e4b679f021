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
from attention_cases import DTYPES
from kernel_calls import Pieces, Place, exchange_pieces, ring_pieces

from cptrain.context_parallel.balance import (
    Part,
    choose_chunk_size,
    chunk_parts,
    imbalance,
    num_moved,
    owners_of,
    work_of,
)
from cptrain.context_parallel.carrier import accumulator_dtype
from cptrain.context_parallel.kernels import choose_kernel
from cptrain.context_parallel.layout import Layout, Span, make_layout
from cptrain.context_parallel.mask import Documents, num_visible
from cptrain.context_parallel.packing import Packing, pack
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


class _LaidOnce(Layout):
    """A layout that works out the spans of each rank once: of a million chunks it takes seconds at every hop."""

    def spans(self, rank: int) -> list[Span]:
        kept: dict[int, list[Span]] = self.__dict__.setdefault("_kept", {})
        if rank not in kept:
            kept[rank] = super().spans(rank)
        return kept[rank]


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

    def num_calls(self, place: Place) -> int:
        """Kernel calls of the rank with most, per layer and forward pass."""
        packing = self.packing()
        return max(place.num_calls(rank_pieces(packing, rank, place)) for rank in range(self.num_ranks))

    def packing(self) -> Packing:
        """What attention needs to run in this cut."""
        size = self.chunk_size or math.gcd(*(number for spans in self.spans for span in spans for number in span[1:]))
        owners = [0] * (self.documents.length // size)
        for rank, spans in enumerate(self.spans):
            for span in spans:
                first = span.start // size
                owners[first : first + span.length // size] = [rank] * (span.length // size)
        return packing_of(self.documents, _LaidOnce.of_owners(owners, self.num_ranks, size))


def documents_of(lengths: Sequence[int]) -> Documents:
    return Documents((0, *accumulate(lengths)))


def packing_of(documents: Documents, layout: Layout) -> Packing:
    return pack(documents, num_ranks=layout.num_ranks, num_rows=1, chunk_size=layout.chunk_size, layout=layout)


def place_of(device: str, dtype: str, *, heads: int, kv_heads: int, dim: int, name: str) -> Place:
    """What computes attention over packed documents. Raises NotImplementedError where no kernel does."""
    kernel = choose_kernel(device, DTYPES[dtype], key_dim=dim, packed=True, name=name)
    return Place(device=device, kernel=kernel, dtype=DTYPES[dtype], heads_per_key=heads // kv_heads)


def rank_pieces(packing: Packing, rank: int, place: Place) -> Pieces:
    """The blocks that a rank computes forward, by piece, on a single ring."""
    width = accumulator_dtype(place.dtype).itemsize // place.dtype.itemsize
    pieces = exchange_pieces if packing.exchange_is_cheaper(gradient_width=width) else ring_pieces
    return pieces(packing.layout, packing.mask(), rank, place)


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
