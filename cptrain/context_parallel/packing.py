"""One batch of packed documents: where they begin, which rank holds which chunk, what that costs; as a tensor, too.

[Note: a packing is data]
Documents differ from batch to batch while a compiled graph, a checkpointed region and the groups of a plan stay. So
what attention needs to know of a batch is a tensor on the CPU, an argument of the operator like any other: it is made
by the data loader ahead of the step, saved for the backward pass, and read by the host without waiting for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Literal, NamedTuple

import torch

from cptrain.context_parallel.balance import choose_chunk_size, chunk_parts, deal, num_moved, owners_of, work_of
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Documents, Mask

SMALLEST = 256  # encodings are filled up to a power of two from here, so that compiled graphs meet few shapes


class Cost(NamedTuple):
    """Of one attention over a batch, by which work was made even, counted over all rows and ranks.

    num_pairs: (query, key) pairs. largest_work: those of the rank with most.
    """

    num_pairs: int
    largest_work: int


class Moved(NamedTuple):
    """Keys that travel, over all pairs of ranks, for layers with a sliding window (0: without one).

    If only those travel that are seen. far: the part of them between ranks of different inner rings.
    """

    window: int
    keys: int
    far: int


@dataclass(frozen=True)
class Packing:
    """documents: of all rows of the batch, one row after another. layout: of that stream, over the ring's ranks.

    moved: by window of the model's layers, that by which work is even first. Every rank holds as many tokens of each
    row. Raises ValueError where rows, documents and chunks do not fit together.
    """

    documents: Documents
    layout: Layout
    num_rows: int
    cost: Cost
    moved: tuple[Moved, ...]

    def __post_init__(self) -> None:
        length, layout = self.documents.length, self.layout
        if length % self.num_rows or layout.length != length:
            raise ValueError(f"{self.num_rows} rows, documents of {length} and chunks of {layout.length} tokens in all")
        row = length // self.num_rows
        if not {row * number for number in range(1, self.num_rows)} <= set(self.documents.offsets):
            raise ValueError(f"a document spans two rows of {row} tokens: rows begin documents of their own")

    @property
    def row_length(self) -> int:
        """Tokens of one row, over all ranks."""
        return self.documents.length // self.num_rows

    @property
    def imbalance(self) -> float:
        """The largest attention work of a rank over the mean of all; 1.0 is even."""
        return self.cost.largest_work * self.layout.num_ranks / max(self.cost.num_pairs, 1)

    @property
    def ring_keys(self) -> int:
        """Keys that a full ring moves, over all ranks."""
        return (self.layout.num_ranks - 1) * self.layout.length

    @property
    def moved_share(self) -> float:
        """Keys that travel, of those that a full ring moves; 0.0 for one rank."""
        return self.moved[0].keys / self.ring_keys if self.ring_keys else 0.0

    def moved_of(self, window: int = 0) -> Moved:
        """What moves for layers with this window: of one that was not counted, as for the next wider one."""
        wider = [m for m in self.moved if m.window == 0 or 0 < window <= m.window]
        return min(wider, key=lambda m: m.window or math.inf, default=Moved(0, self.ring_keys, self.ring_keys))

    def exchange_is_cheaper(self, inner_degree: int = 1, *, window: int = 0, gradient_width: int = 2) -> bool:
        """Whether keys that go straight to their readers, and gradients back, are fewer bytes than in a (double) ring.

        An exchange sends what moves twice, and its gradients once. A ring sends everything N - 1 times, then N - 2
        times, starting from the keys it ended with, and gradients N - 1 times. Of a double ring, the slow link counts.
        gradient_width: bytes of a gradient of keys over those of a key; 2 for half precision.
        """
        num_ranks, length, (_, moved, far) = self.layout.num_ranks, self.layout.length, self.moved_of(window)
        times = (2 * num_ranks - 3, num_ranks - 1)
        if 1 < inner_degree < num_ranks:
            groups = num_ranks // inner_degree
            moved, times = far, (2 * groups - 2, groups - 1)
        return moved * (2 + gradient_width) < length * (times[0] + gradient_width * times[1])

    def mask(self, window: int = 0) -> Mask:
        """What queries of this batch see, with a sliding window or without."""
        return Mask(causal=True, window=window, documents=self.documents)

    def positions_of(self, rank: int) -> torch.Tensor:
        """Place in its row of every token that a rank of the ring holds: [rows, tokens], int64."""
        starts = torch.tensor(self.layout.chunks[rank]) * self.layout.chunk_size
        stream = starts[:, None] + torch.arange(self.layout.chunk_size)
        return stream.view(self.num_rows, -1) % self.row_length

    def begun_anew(self, positions: torch.Tensor) -> torch.Tensor:
        """Place in its document of every token, from its place in its row [rows, tokens]; -1 for padding."""
        stream = positions + torch.arange(self.num_rows)[:, None] * self.row_length
        offsets = torch.tensor(self.documents.offsets)
        document = torch.bucketize(stream, offsets, right=True) - 1
        is_padding = torch.zeros(len(offsets), dtype=torch.bool)
        is_padding[list(self.documents.padding)] = True
        return (stream - offsets[document]).masked_fill(is_padding[document], -1)

    def encode(self) -> torch.Tensor:
        """The packing as int64 [a power of two], on the CPU; `decode` gives it back."""
        offsets, padding = self.documents.offsets, self.documents.padding
        numbers = [self.num_rows, self.layout.num_ranks, self.layout.chunk_size]
        numbers += [len(offsets), len(padding), len(self.moved), *self.cost, *chain.from_iterable(self.moved)]
        numbers += [*offsets, *padding, *owners_of(self.layout)]
        size = max(SMALLEST, 1 << (len(numbers) - 1).bit_length())
        return torch.tensor(numbers + [0] * (size - len(numbers)), dtype=torch.int64)


def decode(encoded: torch.Tensor) -> Packing:
    """The packing that `Packing.encode` made this tensor of; while it is in use, the same object every time."""
    return _decode(encoded.numpy().tobytes())


@lru_cache(maxsize=64)
def _decode(content: bytes) -> Packing:
    numbers = iter(memoryview(content).cast("q").tolist())

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(numbers) for _ in range(count))

    num_rows, num_ranks, chunk_size, num_offsets, num_padding, num_windows = take(6)
    cost = Cost(*take(len(Cost._fields)))
    moved = tuple(Moved(*take(len(Moved._fields))) for _ in range(num_windows))
    documents = Documents(take(num_offsets), take(num_padding))
    layout = Layout.of_owners(take(documents.length // chunk_size), num_ranks, chunk_size)
    return Packing(documents, layout, num_rows, cost, moved)


@dataclass(frozen=True)
class Packer:
    """Packs batches for one plan, anywhere: it holds no groups and pickles, for the processes that build batches.

    num_ranks, inner_degree: of the ring. chunk_size: tokens of a chunk, or "auto". windows: see `pack`.
    """

    num_ranks: int
    inner_degree: int = 1
    chunk_size: int | Literal["auto"] = "auto"
    windows: tuple[int, ...] = (0,)

    def __call__(self, documents: Documents, num_rows: int) -> Packing:
        """The packing of a batch of documents in rows. ValueError for a chunk size that does not divide a shard."""
        return pack(
            documents,
            num_ranks=self.num_ranks,
            num_rows=num_rows,
            chunk_size=choose_chunk_size(documents.length // num_rows // self.num_ranks, self.chunk_size),
            windows=self.windows,
            inner_degree=self.inner_degree,
        )


def pack(
    documents: Documents,
    *,
    num_ranks: int,
    num_rows: int,
    chunk_size: int,
    windows: Sequence[int] = (0,),
    inner_degree: int = 1,
    layout: Layout | None = None,
) -> Packing:
    """The packing of a batch over a ring of `num_ranks`: its chunks dealt as `balance.deal` does, or laid as given.

    windows: of the layers, 0 for one without; the work of those that see most is made even. inner_degree: ranks of an
    inner ring.
    """
    widest_first = sorted(set(windows), key=lambda window: window or math.inf, reverse=True)
    window = widest_first[0]
    if layout is None:
        layout = deal(documents, num_ranks=num_ranks, num_rows=num_rows, chunk_size=chunk_size, window=window)
    parts, owners = chunk_parts(documents, layout.chunk_size), owners_of(layout)
    work = work_of(parts, window)
    loads = [sum(work[chunk] for chunk in chunks) for chunks in layout.chunks]
    moved = []
    for window in widest_first:
        keys = num_moved(parts, owners, window=window)
        far = num_moved(parts, owners, window=window, inner_degree=inner_degree) if inner_degree > 1 else keys
        moved.append(Moved(window, keys, far))
    return Packing(documents, layout, num_rows, Cost(sum(loads), max(loads)), tuple(moved))


def find_documents(document_ids: torch.Tensor) -> Documents:
    """The documents of a batch from the ids [B, S] of its tokens: equal within a document, negative for padding.

    Raises ValueError for another shape.
    """
    if document_ids.ndim != 2 or document_ids.numel() == 0:
        raise ValueError(f"document_ids {tuple(document_ids.shape)}: must be [B, S], an id for every token")
    ids = document_ids.detach().cpu()
    begins = torch.ones(ids.shape, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    padding = (ids.flatten()[starts] < 0).nonzero().flatten()
    return Documents((*starts.tolist(), ids.numel()), tuple(padding.tolist()))


def join_offsets(offsets: Sequence[Sequence[int]]) -> Documents:
    """The documents of a batch from the offsets of each row, which rise from 0 to the length of all rows.

    Rows may be tensors. Raises ValueError for rows that do not.
    """
    rows = [_integers(number, row) for number, row in enumerate(offsets)]
    length = rows[0][-1] if rows and rows[0] else 0
    for number, row in enumerate(rows):
        if len(row) < 2 or row[0] != 0 or row[-1] != length or any(b <= a for a, b in pairwise(row)):
            raise ValueError(f"offsets[{number}] = {row}: must rise from 0 to the length of all rows, {length}")
    starts = [length * number + offset for number, row in enumerate(rows) for offset in row[:-1]]
    return Documents((*starts, length * len(rows)))


def _integers(number: int, row: Sequence[int] | torch.Tensor) -> list[int]:
    """One row of offsets. ValueError for what is not a list of whole numbers."""
    values = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"offsets[{number}] = {values}: must be a list of whole numbers, a list for each row")
    return list(values)
