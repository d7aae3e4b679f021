"""What a query may see, as a description: never a dense [S, S] tensor."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from cptrain.context_parallel.layout import Span


@dataclass(frozen=True)
class Documents:
    """Where documents begin in a stream of tokens that see only tokens of their own document.

    offsets: rising, from 0 to the length of the stream; document d holds tokens [offsets[d], offsets[d + 1]).
    padding: which of these are no documents but filling, whose tokens neither see nor are seen: rising.
    The rows of a batch follow one another in the stream, so a row begins a document.
    Raises ValueError for offsets that do not rise from 0.
    """

    offsets: tuple[int, ...]
    padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        offsets = self.offsets
        if len(offsets) < 2 or offsets[0] != 0 or any(a >= b for a, b in pairwise(offsets)):
            raise ValueError(f"offsets of documents must rise from 0, got {_shortened(offsets)}")
        if any(not 0 <= number < len(offsets) - 1 for number in self.padding):
            raise ValueError(f"padding = {_shortened(self.padding)}: there are {len(offsets) - 1} documents")
        # Schedules are looked up by mask at every hop of every layer, and a pack has thousands of documents.
        object.__setattr__(self, "_hash", hash((offsets, self.padding)))
        object.__setattr__(self, "_is_padding", frozenset(self.padding))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def length(self) -> int:
        """Tokens of the stream, padding included."""
        return self.offsets[-1]

    def of(self, token: int) -> int:
        """The number of the document that a token belongs to; -1 for padding."""
        document = bisect_right(self.offsets, token) - 1
        return -1 if document in self._is_padding else document  # type: ignore[attr-defined]

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of every document, without padding."""
        for document in range(len(self.offsets) - 1):
            if document not in self._is_padding:  # type: ignore[attr-defined]
                yield self.offsets[document], self.offsets[document + 1]

    def cut(self, spans: Iterable[Span]) -> dict[int, list[Span]]:
        """The parts of these spans by document, in their order, without padding."""
        parts: dict[int, list[Span]] = {}
        for local, start, length in spans:
            stop = start + length
            document = bisect_right(self.offsets, start) - 1
            while start < stop:
                end = min(stop, self.offsets[document + 1])
                if document not in self._is_padding:  # type: ignore[attr-defined]
                    parts.setdefault(document, []).append(Span(local, start, end - start))
                local, start, document = local + end - start, end, document + 1
        return parts


@dataclass(frozen=True)
class Mask:
    """causal: a query sees the keys at its own position and before it. Otherwise it sees every key.

    window: of these keys only the last `window`, its own among them (Mistral's sliding window); 0 is no limit.
    documents: of these keys only those of its own document; None is one document.
    Raises ValueError for a negative window, and for a window or documents without causal.
    """

    causal: bool
    window: int = 0
    documents: Documents | None = None

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window = {self.window}: must be at least 1, or 0 for no limit")
        if self.window and not self.causal:
            raise ValueError(f"window = {self.window}: a sliding window is causal; set is_causal=True")
        if self.documents is not None and not self.causal:
            raise ValueError("attention inside packed documents is causal; set is_causal=True")

    def visible(self, query: int, key: int) -> bool:
        """Whether the query at this global position sees the key at that one: what schedules must meet."""
        if not self.causal:
            return True
        if self.documents is not None and not self.documents.of(query) == self.documents.of(key) >= 0:
            return False
        return key <= query and (not self.window or key > query - self.window)


CAUSAL = Mask(causal=True)
FULL = Mask(causal=False)


def num_visible(queries: int, window: int = 0) -> int:
    """(query, key) pairs that the first `queries` tokens of a document see: the unit of attention work."""
    seen = min(queries, window or queries)
    return seen * (seen + 1) // 2 + (queries - seen) * seen


def _shortened(numbers: tuple[int, ...]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"({', '.join(map(str, numbers[:8]))}, ... {len(numbers)} in all)"
