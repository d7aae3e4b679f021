"""Exchanging chunks between ranks, two at a time, until hardly any exchange leaves fewer keys to travel.

[Note: trading chunks]
A rank that holds a part of a document needs all of the document before it. The keys that travel are therefore, over all
ranks and documents, where the last part that a rank holds ends (its reach in the document), less all tokens. Two things
follow. Only a chunk that is the last of a document on its rank is worth giving away. And what an exchange saves depends
on the chunks of its two ranks alone, so exchanges of other ranks can be made in the same round, the best first. Work
stays within a limit. Sliding windows are not counted, but fewer keys travel with one, too: what reaches less far lies
closer together.

Of the keys that a full ring moves, windows of 64K tokens of Python files on 8 ranks need 0.57 as dealt and 0.49 after
trading; annealing over a million tries finds 0.46 at the same limit of work. Kernels have fewer and larger blocks.

This is numpy, and not torch, because all ranks must come to the same: of equal values torch.argmin may take any.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np

MOST_ROUNDS = 24  # of exchanges; twice as many save one more key in a hundred, on 32 ranks
MOST_TRIED = 16  # chunks for which a round looks for a partner; twice as many take longer and save hardly more

# Of a chunk: (document, where it ends here), for each that lies in several chunks; these are two at most, one that goes
# on and one that begins. Numbered from 1; (0, 0) stands for none.
Ends = tuple[tuple[int, int], tuple[int, int]]


def trade(owners: Sequence[int], work: Sequence[int], shared: Sequence[Ends], room: np.ndarray) -> list[int]:
    """The owners of the chunks of one row after exchanges that leave fewer keys to travel; see [Note: trading chunks].

    work, shared: of each chunk. room: work that each rank may still take, [ranks], brought up to date.
    """
    held = Held(owners, work, shared, room)
    for _ in range(MOST_ROUNDS):
        mine = held.worth_trying()
        if not len(mine):
            break
        theirs, saved = held.partners(mine)
        held.untried[mine[saved == 0]] = False
        busy: set[int] = set()
        for best in np.argsort(-saved, kind="stable")[: np.count_nonzero(saved)].tolist():
            ranks = {int(held.owners[mine[best]]), int(held.owners[theirs[best]])}
            if not ranks & busy:
                held.exchange(int(mine[best]), int(theirs[best]))
                busy |= ranks
    return [int(owner) for owner in held.owners]


class Held:
    """Which rank holds which chunk of a row, and which exchange saves how many keys.

    Arrays are [chunks], or [2, chunks] where they tell of both documents of a chunk.
    """

    def __init__(self, owners: Sequence[int], work: Sequence[int], shared: Sequence[Ends], room: np.ndarray) -> None:
        self.shared, self.room = shared, room
        self.documents, self.ends = np.array(shared, dtype=np.int64).transpose(2, 1, 0)
        self.owners, self.work = np.array(owners), np.array(work, dtype=np.int64)
        self.reach = np.zeros((len(room), 1 + int(self.documents.max())), dtype=np.int64)
        self.saves = np.zeros_like(self.ends)  # by how much its owner's reach shrinks without the chunk
        self.untried = np.ones(len(work), dtype=bool)  # since its owner's chunks last changed
        # By rank and document: where each part ends, and which document of which chunk that is; rising.
        self.parts: list[dict[int, list[tuple[int, int, int]]]] = [{} for _ in room]
        for chunk, owner in enumerate(owners):
            self._put(owner, chunk)

    def worth_trying(self) -> np.ndarray:
        """The chunks to find a partner for: those that their owners do best without, MOST_TRIED at most."""
        saves = np.where(self.untried, self.saves.sum(0), 0)
        return np.argsort(-saves, kind="stable")[: min(MOST_TRIED, np.count_nonzero(saves))]

    def partners(self, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of these chunks the best one to exchange it for, and how many keys fewer travel then; 0 for none."""
        places, owners, saves = np.arange(len(mine)), self.owners[mine], self.saves.sum(0)
        more = -saves - saves[mine, None]  # keys, [mine, theirs]
        reach = self.reach[owners]  # of my chunk's owner without it, [mine, documents]
        for documents, saved in zip(self.documents, self.saves, strict=True):
            reach[places, documents[mine]] -= saved[mine]
        for documents, ends in zip(self.documents, self.ends, strict=True):
            more += np.maximum(ends - reach.take(documents, axis=1), 0)
            some = np.flatnonzero(documents[mine])
            chunks = mine[some]
            more[some] += np.maximum(ends[chunks, None] - self._reach_without(documents[chunks]), 0)
        fits = (self.work <= (self.work[mine] + self.room[owners])[:, None]) & (self.owners != owners[:, None])
        fits &= self.work + self.room[self.owners] >= self.work[mine, None]
        more = np.where(fits, more, 0)
        theirs = more.argmin(1)
        return theirs, -more[places, theirs]

    def exchange(self, mine: int, theirs: int) -> None:
        """Give each of two chunks to the other's owner."""
        one, other = int(self.owners[mine]), int(self.owners[theirs])
        change = self.work[theirs] - self.work[mine]
        self.room[one] -= change
        self.room[other] += change
        # Both are taken away before any is given: `saves` of a chunk is one number, whoever holds it.
        self._put(one, mine, away=True)
        self._put(other, theirs, away=True)
        self._put(one, theirs)
        self._put(other, mine)
        self.owners[mine], self.owners[theirs] = other, one
        self.untried |= (self.owners == one) | (self.owners == other)

    def _reach_without(self, wanted: np.ndarray) -> np.ndarray:
        """How far the owner of each chunk would reach in these documents without it: [documents, chunks]."""
        reach = self.reach.T[wanted].take(self.owners, axis=1)
        for documents, saved in zip(self.documents, self.saves, strict=True):
            reach -= (documents == wanted[:, None]) * saved
        return reach

    def _put(self, rank: int, chunk: int, *, away: bool = False) -> None:
        """Count a chunk among those of a rank, or no longer."""
        for place, (document, end) in enumerate(self.shared[chunk]):
            if not document:
                continue
            parts = self.parts[rank].setdefault(document, [])
            if parts:
                self.saves[parts[-1][1:]] = 0
            if away:
                parts.remove((end, place, chunk))
            else:
                insort(parts, (end, place, chunk))
            self.reach[rank, document] = parts[-1][0] if parts else 0
            if parts:
                self.saves[parts[-1][1:]] = parts[-1][0] - (parts[-2][0] if len(parts) > 1 else 0)
