"""Which rank holds which chunk of packed documents, so that attention is even work and few keys travel.

[Note: dealing chunks]
Attention inside documents is uneven work: a chunk at the end of a long document looks at thousands of times as many
pairs as one of short documents, and any fixed pattern leaves some ranks with two to four times the work of others. So
chunks of equal length are dealt, the heaviest first, as many to every rank: a rank takes a chunk only as long as its
work, with what the lightest chunks left over would add to fill it up, stays under its share. Of the ranks that may take
a chunk, the one gets it for which the fewest keys have to travel: a rank that holds later chunks of a document receives
its earlier ones anyway. The end of a long document therefore goes to few ranks, and short ones stay whole. Swaps even
out what is left, and trades use what imbalance is allowed to move fewer keys, see [Note: trading chunks]. A window that
is mostly one document is better cut in zigzag; both are tried and the cheaper is taken.

Everything here is arithmetic on a few thousand integers, the same on every rank: no processes, no tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Documents, num_visible
from cptrain.context_parallel.trading import Ends, trade
from cptrain.distributed.divide import MOST_CHUNKS, divisors

SLACK = 0.02  # of a rank's share of the work: what may be given away for locality while dealing
LIMIT = 1.03  # largest work of a rank over the mean that is not evened out by swaps
WORTH_MORE_BLOCKS = 0.1  # fewer keys that dealing must move than zigzag, whose blocks are larger
AUTO_CHUNKS = 16  # chunks per rank that "auto" aims at; more balance no better and cut more documents
AUTO_SMALLEST = 256  # tokens of a chunk below which kernels get slow
FEWEST_CHUNKS = 4  # per rank, below which work is uneven: two are 1.2 to 1.4 of the mean on 8 to 32 ranks, four 1.03
MOST_CANDIDATES = 32  # chunks of a rank that a swap looks at


class Part(NamedTuple):
    """Tokens [begin, end) of a document, counted from its start, as far as they lie in one chunk."""

    document: int
    begin: int
    end: int


def choose_chunk_size(shard_length: int, wanted: int | str = "auto") -> int:
    """Tokens of a chunk for ranks that hold `shard_length` tokens of a sequence: the divisor nearest to what is wanted.

    "auto" wants max(256, shard_length / 16), or a quarter of a shard where that is less. Raises ValueError for a number
    that does not divide.
    """
    fitting = [size for size in divisors(shard_length) if shard_length // size <= MOST_CHUNKS]
    if wanted == "auto":
        target = min(max(AUTO_SMALLEST, shard_length / AUTO_CHUNKS), max(1.0, shard_length / FEWEST_CHUNKS))
        return min(fitting, key=lambda size: (max(size / target, target / size), size))
    size = int(wanted)
    if size not in fitting:
        near = sorted(sorted(fitting, key=lambda other: max(other / max(size, 1), max(size, 1) / other))[:2])
        raise ValueError(
            f"chunk_size = {wanted}: must divide the {shard_length} tokens of a sequence that a ring rank holds, into "
            f"{MOST_CHUNKS} chunks at most; try {' or '.join(map(str, near))}"
        )
    return size


def deal(documents: Documents, *, num_ranks: int, num_rows: int, chunk_size: int, window: int = 0) -> Layout:
    """The layout of a stream of `num_rows` rows, dealt by work; every rank gets as many chunks of each row.

    window: of the layers that see most; work counts only the pairs inside of it.
    Source: longest-processing-time-first, R. Graham, "Bounds on Multiprocessing Timing Anomalies", 1969.
    """
    length = documents.length // num_rows
    if num_ranks == 1:
        return Layout(documents.length, ((0,),))
    parts = chunk_parts(documents, chunk_size)
    work = work_of(parts, window)
    shared = shared_documents(parts, documents)
    dealt = _deal(work, shared, num_ranks, num_rows)
    _swap(dealt, work, num_ranks, length // chunk_size)
    _trade(dealt, work, shared, num_ranks, length // chunk_size)
    fixed = _zigzag(length // chunk_size, num_ranks, num_rows)
    if fixed is not None and imbalance(work, fixed, num_ranks) <= LIMIT:
        moved, moved_dealt = (num_moved(parts, owners, window=window) for owners in (fixed, dealt))
        if moved <= moved_dealt * (1 + WORTH_MORE_BLOCKS):
            dealt = fixed
    return Layout.of_owners(dealt, num_ranks, chunk_size)


def owners_of(layout: Layout) -> list[int]:
    """The rank that holds each chunk."""
    owners = [0] * sum(map(len, layout.chunks))
    for rank, chunks in enumerate(layout.chunks):
        for chunk in chunks:
            owners[chunk] = rank
    return owners


def work_of(parts: Sequence[Sequence[Part]], window: int = 0) -> list[int]:
    """(query, key) pairs of the queries of each chunk."""
    return [sum(num_visible(p.end, window) - num_visible(p.begin, window) for p in chunk) for chunk in parts]


def chunk_parts(documents: Documents, chunk_size: int) -> list[list[Part]]:
    """What lies in each chunk of the stream, without padding."""
    parts: list[list[Part]] = [[] for _ in range(documents.length // chunk_size)]
    for number, (start, stop) in enumerate(documents.spans()):
        first = start
        while first < stop:
            chunk = first // chunk_size
            end = min(stop, (chunk + 1) * chunk_size)
            parts[chunk].append(Part(number, first - start, end - start))
            first = end
    return parts


def shared_documents(parts: list[list[Part]], documents: Documents) -> list[Ends]:
    """Where documents end in each chunk; of one that lies inside a chunk nothing ever travels, and it is left out."""
    lengths = [stop - start for start, stop in documents.spans()]
    numbers: dict[int, int] = {}
    shared: list[Ends] = []
    for chunk in parts:
        cut = (part for part in chunk if part.begin > 0 or part.end < lengths[part.document])
        ends = [(numbers.setdefault(part.document, len(numbers) + 1), part.end) for part in cut]
        first, second = (*ends, (0, 0), (0, 0))[:2]  # at most one goes on here, and one begins
        shared.append((first, second))
    return shared


def imbalance(work: Sequence[int], owners: Sequence[int], num_ranks: int) -> float:
    """The largest work of a rank over the mean of all; 1.0 is even."""
    loads = [0] * num_ranks
    for amount, owner in zip(work, owners, strict=True):
        loads[owner] += amount
    return max(loads) * num_ranks / max(sum(loads), 1)


def num_moved(parts: Sequence[Sequence[Part]], owners: Sequence[int], *, window: int = 0, inner_degree: int = 1) -> int:
    """Keys that travel from their owner to a rank whose queries see them, over all pairs of ranks.

    inner_degree: above 1 only pairs of ranks of different inner rings count.
    """
    begins: dict[int, dict[int, list[int]]] = {}  # of the parts of each document that a rank holds, rising
    for chunk, owner in zip(parts, owners, strict=True):
        for part in chunk:
            begins.setdefault(part.document, {}).setdefault(owner, []).append(part.begin)
    moved = 0
    for chunk, owner in zip(parts, owners, strict=True):
        for part in chunk:
            for rank, held in begins[part.document].items():
                is_far = rank // inner_degree != owner // inner_degree if inner_degree > 1 else rank != owner
                if is_far and held[-1] > part.begin:
                    nearest = held[bisect_right(held, part.begin)]  # it sees most of this part, if there is a window
                    first = max(part.begin, nearest - window + 1) if window else part.begin
                    moved += max(0, part.end - first)
    return moved


def _zigzag(chunks_per_row: int, num_ranks: int, num_rows: int) -> list[int] | None:
    """The owner of each chunk if every row is cut in zigzag; None where chunks do not divide so."""
    half, rest = divmod(chunks_per_row, 2 * num_ranks)
    if rest:
        return None
    row = [min(place, 2 * num_ranks - 1 - place) for place in (chunk // half for chunk in range(chunks_per_row))]
    return row * num_rows


def _deal(work: list[int], shared: list[Ends], num_ranks: int, num_rows: int) -> list[int]:
    """The owner of each chunk; see [Note: dealing chunks]."""
    num_chunks, per_row = len(work), len(work) // num_rows
    num_slots = num_chunks // num_ranks
    most = sum(work) / num_ranks * (1 + SLACK)
    order = sorted(range(num_chunks), key=lambda chunk: (-work[chunk], chunk))
    lightest = [0]  # work of the i lightest chunks
    for chunk in reversed(order):
        lightest.append(lightest[-1] + work[chunk])
    loads, free = [0] * num_ranks, [num_slots] * num_ranks
    free_of_row = [[per_row // num_ranks] * num_ranks for _ in range(num_rows)]
    num_shared = max(number for ends in shared for number, _ in ends)
    reach = [[0] * num_ranks for _ in range(num_shared + 1)]  # where the last part ends that a rank holds of a document
    reserved = 0  # slots that ranks which hold something have still to fill
    owners = [0] * num_chunks
    for left, chunk in zip(reversed(range(num_chunks)), order, strict=True):
        free_here, best, choice = free_of_row[chunk // per_row], (math.inf, 0, 0), 0
        (first, first_end), (second, second_end) = shared[chunk]
        first_reach, second_reach = reach[first], reach[second]
        # The lightest chunks left over fill the slots of all ranks that hold something, this one's among them.
        begun, fresh = (_mean(lightest, min(left, reserved + extra - 1)) for extra in (0, num_slots))
        ranks = zip(free_here, free, loads, first_reach, second_reach, strict=True)
        # Runs for every chunk and rank: without calls it takes half the time.
        for rank, (is_free, slots, load, near, far) in enumerate(ranks):
            if is_free:
                filled = load + work[chunk] + (slots - 1) * (begun if slots < num_slots else fresh)
                excess = filled - most if filled > most else 0.0
                if excess <= best[0]:
                    keys = (first_end - near if first_end > near else 0) + (second_end - far if second_end > far else 0)
                    if (excess, keys, load) < best:
                        best, choice = (excess, keys, load), rank
        reserved += -1 if free[choice] < num_slots else num_slots - 1
        owners[chunk] = choice
        loads[choice] += work[chunk]
        free[choice] -= 1
        free_here[choice] -= 1
        for number, end in shared[chunk]:
            reach[number][choice] = max(reach[number][choice], end)
    return owners


def _mean(sums: list[int], count: int) -> float:
    """Of the first `count` numbers, whose running sums these are; 0.0 for none."""
    return sums[count] / count if count > 0 else 0.0


def _swap(owners: list[int], work: list[int], num_ranks: int, per_row: int) -> None:
    """Exchange chunks of one row between the rank with most work and others, until it has no more than LIMIT."""
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for chunk, owner in enumerate(owners):
        held[owner].append(chunk)
        loads[owner] += work[chunk]
    limit = LIMIT * sum(loads) / num_ranks
    for _ in range(4 * num_ranks):
        most = max(range(num_ranks), key=loads.__getitem__)
        if loads[most] <= limit:
            return
        best: tuple[int, int, int, int] | None = None
        for rank in sorted(range(num_ranks), key=loads.__getitem__)[:4]:
            gap = loads[most] - loads[rank]
            for mine in _some(held[most], work):
                for theirs in _some(held[rank], work):
                    change = work[mine] - work[theirs]
                    if 0 < change < gap and mine // per_row == theirs // per_row:
                        after = max(loads[most] - change, loads[rank] + change)
                        if best is None or after < best[0]:
                            best = (after, rank, mine, theirs)
        if best is None:
            return
        _, rank, mine, theirs = best
        owners[mine], owners[theirs] = rank, most
        held[most].remove(mine)
        held[rank].remove(theirs)
        held[most].append(theirs)
        held[rank].append(mine)
        change = work[mine] - work[theirs]
        loads[most] -= change
        loads[rank] += change


def _some(chunks: list[int], work: list[int]) -> list[int]:
    """At most MOST_CANDIDATES of these chunks, light and heavy ones."""
    if len(chunks) <= MOST_CANDIDATES:
        return chunks
    return sorted(chunks, key=lambda chunk: (work[chunk], chunk))[:: -(-len(chunks) // MOST_CANDIDATES)]


def _trade(owners: list[int], work: list[int], shared: list[Ends], num_ranks: int, per_row: int) -> None:
    """Exchange chunks of one row between any ranks that leave fewer keys to travel, up to LIMIT of work."""
    most = int(LIMIT * sum(work) / num_ranks)
    loads = [0] * num_ranks
    for owner, amount in zip(owners, work, strict=True):
        loads[owner] += amount
    # A rank that is above LIMIT trades, too, but takes nothing heavier.
    room = np.array([max(0, most - load) for load in loads], dtype=np.int64)
    for begin in range(0, len(owners), per_row):
        row = slice(begin, begin + per_row)
        owners[row] = trade(owners[row], work[row], shared[row], room)
