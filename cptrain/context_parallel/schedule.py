"""Which blocks of attention to compute for given queries and keys: a pure function of spans and mask.

[Note: one schedule for every method]
A block is a rectangle of queries x keys that one kernel call computes: in full, or a triangle of a square. Every method
executes the same blocks; methods differ only in how the keys of a source get here (see `carrier`). A schedule is
therefore checked without processes: every visible (query, key) pair lies in exactly one block, no invisible one in any.

[Note: triangles]
A causal mask cuts a rectangle along a diagonal, a sliding window along a second one below it. Between two diagonals the
rectangle falls into full blocks, LOWER triangles (query i of the block sees keys up to i) and UPPER triangles (query i
sees keys from i on). An upper triangle is a lower one with queries and keys reversed, so kernels need to know causal
masks of squares only, and no kernel ever gets a dense mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from cptrain.context_parallel.layout import Layout, Span
from cptrain.context_parallel.mask import Mask


class Shape(Enum):
    """Which pairs of a block's rectangle are computed; see [Note: triangles]."""

    FULL = "full"
    LOWER = "lower"
    UPPER = "upper"


class Block(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop), both indices into what is held locally."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    shape: Shape = Shape.FULL

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs, the unit of attention work."""
        queries, keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return queries * keys if self.shape is Shape.FULL else queries * (queries + 1) // 2


def blocks(queries: Sequence[Span], keys: Sequence[Span], mask: Mask) -> tuple[Block, ...]:
    """The blocks of these queries against these keys, each given as the spans of the global sequence it holds.

    Lower triangles come first. Where the keys include the queries' own, each query that sees any key is in exactly one
    of them, the one with its own key: what its other blocks find is merged into the result of that.
    """
    if not mask.causal:
        return (Block(0, _length(queries), 0, _length(keys)),)
    if mask.documents is None:
        return _sorted(_causal_blocks(queries, keys, mask.window))
    theirs = mask.documents.cut(keys)
    found: list[Block] = []
    for document, ours in mask.documents.cut(queries).items():
        if document in theirs:
            found += _causal_blocks(ours, theirs[document], mask.window)
    return _sorted(found)


def _causal_blocks(queries: Sequence[Span], keys: Sequence[Span], window: int) -> list[Block]:
    """The blocks of queries and keys of one document, both in rising order and without gaps in what is held here."""
    first, last = queries[0], queries[-1]
    windowed = window and last.start + last.length - 1 - keys[0].start >= window
    if list(queries) == list(keys) and not windowed:
        # Local order is global order, so the causal mask of the shard is the causal mask of the sequence.
        start, stop = first.local, last.local + last.length
        return [Block(start, stop, start, stop, Shape.LOWER)]
    return _joined([block for q in queries for block in _row(q, keys, window)])


def _row(q: Span, keys: Sequence[Span], window: int) -> Iterator[Block]:
    """The blocks of one span of queries against all of keys; the keys before it that all of it sees are one block."""
    stop = q.start + q.length
    first_seen = stop - window if window else 0  # by all of the queries
    seen: list[Span] = []
    for k in keys:
        if k.start >= first_seen and k.start + k.length <= q.start:
            seen.append(k)
        elif k.start < stop and (not window or k.start + k.length > q.start - window + 1):
            yield from _rectangle(q, k, window)
    if seen:
        yield Block(q.local, q.local + q.length, seen[0].local, seen[-1].local + seen[-1].length)


def _sorted(found: list[Block]) -> tuple[Block, ...]:
    return tuple(sorted(found, key=lambda block: block.shape is not Shape.LOWER))


def shard_blocks(layout: Layout, mask: Mask, rank: int, source: int) -> tuple[Block, ...]:
    """The blocks of the queries of `rank` against the keys of `source`."""
    return blocks(layout.spans(rank), layout.spans(source), mask)


def whole_blocks(layout: Layout, mask: Mask, rank: int) -> tuple[Block, ...]:
    """The blocks of the queries of `rank` against all keys, held in global order."""
    return blocks(layout.spans(rank), [Span(0, 0, layout.length)], mask)


def needed(found: Sequence[Block]) -> tuple[tuple[int, int], ...]:
    """The ranges of keys that these blocks read, ascending and apart."""
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted({(block.k_start, block.k_stop) for block in found}):
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
        else:
            ranges.append((start, stop))
    return tuple(ranges)


def _length(spans: Sequence[Span]) -> int:
    return sum(span.length for span in spans)


def _rectangle(q: Span, k: Span, window: int) -> Iterator[Block]:
    """The blocks of one span of queries against one span of keys.

    Row r sees the columns r + low .. r + high, cut to [0, width). Rows are split where one of these diagonals enters or
    leaves the rectangle; within a strip each diagonal is then either wholly inside it or wholly beside it.
    """
    width, high = k.length, q.start - k.start
    low = high - window + 1 if window else -q.length - width
    edges = {0, q.length, -high, width - high, -low, width - low}
    cuts = sorted(edge for edge in edges if 0 <= edge <= q.length)
    for begin, end in pairwise(cuts):
        if begin + high < 0 or begin + low >= width:
            continue  # the keys of these rows all come later, or the window has left them all behind
        cut_high, cut_low = begin + high < width, begin + low >= 0
        # Where both diagonals cross the strip it must be no higher than the band between them is wide.
        step = max(1, window - 1) if cut_high and cut_low else end - begin
        for row in range(begin, end, step):
            yield from _strip(q, k, row, min(row + step, end), low if cut_low else None, high if cut_high else None)


def _strip(q: Span, k: Span, begin: int, end: int, low: int | None, high: int | None) -> Iterator[Block]:
    """Rows [begin, end) whose diagonals, where they are not None, lie wholly inside: upper, full and lower part."""
    rows = (q.local + begin, q.local + end)
    left, right, height = 0, k.length, end - begin
    if low is not None and high is not None and high == low:
        # A window of one: each query sees itself, which a triangle of one row is.
        yield Block(*rows, k.local + begin + high, k.local + end + high, Shape.LOWER)
        return
    if low is not None:
        left = begin + low
        yield Block(*rows, k.local + left, k.local + left + height, Shape.UPPER)
        left += height
    if high is not None:
        right = begin + high
        yield Block(*rows, k.local + right, k.local + right + height, Shape.LOWER)
    if left < right:
        yield Block(*rows, k.local + left, k.local + right)


def _joined(found: list[Block]) -> list[Block]:
    """The same pairs in fewer full blocks: neighbours along the keys are joined first, then along the queries."""
    along_keys: list[Block] = []
    for block in found:
        last = next((i for i, b in enumerate(along_keys) if b[:2] == block[:2] and _meets(b.k_stop, b, block)), None)
        if last is None:
            along_keys.append(block)
        else:
            along_keys[last] = along_keys[last]._replace(k_stop=block.k_stop)
    along_queries: list[Block] = []
    for block in along_keys:
        above = next((i for i, b in enumerate(along_queries) if b[2:4] == block[2:4] and _stacks(b, block)), None)
        if above is None:
            along_queries.append(block)
        else:
            along_queries[above] = along_queries[above]._replace(q_stop=block.q_stop)
    return along_queries


def _meets(k_stop: int, first: Block, second: Block) -> bool:
    return first.shape is second.shape is Shape.FULL and k_stop == second.k_start


def _stacks(first: Block, second: Block) -> bool:
    return first.shape is second.shape is Shape.FULL and first.q_stop == second.q_start
