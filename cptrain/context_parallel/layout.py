"""Which global token sits where: a permutation of equal chunks over ranks. Index arithmetic only, no processes.

[Note: layouts are chunk permutations]
The sequence is cut into chunks of equal length, and every rank holds the same number of them. A contiguous layout has
one chunk per rank. Zigzag has two, r and 2N-1-r, so that under a causal mask every rank sees the same number of
(query, key) pairs. Any other dealing of chunks is expressed the same way, and everything that follows (schedules,
positions, inverse) reads only the chunks, never the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """`length` tokens from global position `start` on, held from local index `local` on."""

    local: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Chunk `chunks[r][i]` of the global sequence is the i-th chunk of rank r; each is `chunk_size` tokens long.

    Raises ValueError unless the chunks are a permutation dealt evenly, in rising order on every rank (a rank that kept
    its chunks out of order could not run its own causal block as one kernel).
    """

    chunk_size: int
    chunks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        dealt = [chunk for shard in self.chunks for chunk in shard]
        if sorted(dealt) != list(range(len(dealt))):
            raise ValueError(f"chunks must hold every index once, got {self.chunks}")
        if len({len(shard) for shard in self.chunks}) != 1:
            raise ValueError(
                "every rank must hold the same number of chunks, got " + str([len(s) for s in self.chunks])
            )
        if any(list(shard) != sorted(shard) for shard in self.chunks):
            raise ValueError(f"every rank must hold its chunks in rising order, got {self.chunks}")
        # Schedules are looked up by layout at every hop of every layer, and a long sequence has hundreds of chunks.
        object.__setattr__(self, "_hash", hash((self.chunk_size, self.chunks)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @classmethod
    def of_owners(cls, owners: Sequence[int], num_ranks: int, chunk_size: int) -> Layout:
        """The layout in which chunk c is held by rank `owners[c]`."""
        held: list[list[int]] = [[] for _ in range(num_ranks)]
        for chunk, owner in enumerate(owners):
            held[owner].append(chunk)
        return cls(chunk_size, tuple(map(tuple, held)))

    @property
    def num_ranks(self) -> int:
        return len(self.chunks)

    @property
    def shard_length(self) -> int:
        """Tokens per rank."""
        return len(self.chunks[0]) * self.chunk_size

    @property
    def length(self) -> int:
        """Tokens of the global sequence."""
        return self.num_ranks * self.shard_length

    def spans(self, rank: int) -> list[Span]:
        """What `rank` holds, neighbouring chunks joined."""
        joined: list[Span] = []
        for i, chunk in enumerate(self.chunks[rank]):
            start = chunk * self.chunk_size
            if joined and joined[-1].start + joined[-1].length == start:
                joined[-1] = joined[-1]._replace(length=joined[-1].length + self.chunk_size)
            else:
                joined.append(Span(i * self.chunk_size, start, self.chunk_size))
        return joined

    def permutation(self) -> torch.Tensor:
        """Global index of every token in sharded order (rank 0's shard first). Shape [length], int64."""
        starts = torch.tensor([chunk for shard in self.chunks for chunk in shard]) * self.chunk_size
        return (starts[:, None] + torch.arange(self.chunk_size)).flatten()


def contiguous(num_ranks: int, length: int) -> Layout:
    """Rank r holds the r-th of `num_ranks` equal pieces. Raises ValueError when `length` does not divide evenly."""
    return Layout(_chunk_size(length, num_ranks, "contiguous"), tuple((rank,) for rank in range(num_ranks)))


def zigzag(num_ranks: int, length: int) -> Layout:
    """Rank r holds pieces r and 2N-1-r of 2N, which is even work under a causal mask.

    Raises ValueError unless 2N divides `length`.
    Source: zigzag ring attention (zhuzilin/ring-flash-attention), Llama 3 (arXiv:2407.21783 section 3.3.2).
    """
    return Layout(
        _chunk_size(length, 2 * num_ranks, "zigzag"),
        tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks)),
    )


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}  # those that depend on nothing but the length


def make_layout(name: str, num_ranks: int, length: int) -> Layout:
    """The layout of this name. One rank holds everything in order, at any length."""
    return LAYOUTS[name](num_ranks, length) if num_ranks > 1 else contiguous(1, length)


def length_multiple(name: str, num_ranks: int) -> int:
    """What divides every sequence length that the layout of this name can cut over the ranks."""
    return 2 * num_ranks if name == "zigzag" and num_ranks > 1 else num_ranks


def _chunk_size(length: int, pieces: int, name: str) -> int:
    if length % pieces or length == 0:
        raise ValueError(
            f"a {name} layout needs a sequence length that is a multiple of {pieces}, got {length}; "
            f"try {nearest_multiples(length, pieces)}"
        )
    return length // pieces


def nearest_multiples(length: int, multiple: int) -> str:
    """The positive multiples right below and above a length, as text for errors."""
    below = length // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)
