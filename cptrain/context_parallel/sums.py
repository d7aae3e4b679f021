"""Results that come for some rows at a time: which rows are reached, and sums that nothing clears beforehand.

What reaches rows first is written and not added: a sum of many small blocks would else be cleared, which is a pass over
memory that for most rows the first block repeats. Rows that nothing reaches are cleared at the end.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from cptrain.context_parallel.launches import Ranges, accumulate, num_tokens, put


class Reached:
    """The rows, of so many, for which there is a result."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._ranges: Ranges = ()

    def add(self, ranges: Ranges) -> tuple[bool, Ranges]:
        """Now these ranges have one, too: whether all are new and apart, and which parts of them are new."""
        all_new, new, self._ranges = _reach(self._ranges, ranges)
        return all_new, new

    def rest(self) -> Ranges:
        """The rows without a result."""
        return _without(((0, self._length),), self._ranges)


class Sum:
    """The sum of what is found for ranges of T, in x [B, H, T, D], which may hold anything before."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x
        self._reached = Reached(x.size(2))

    @classmethod
    def of(cls, x: torch.Tensor) -> Sum:
        """The sum that x already is."""
        found = cls(x)
        found._reached.add(((0, x.size(2)),))
        return found

    def add(self, ranges: Ranges, values: torch.Tensor) -> None:
        """Add values [B, H, T', D] of these ranges, one behind the other; they may overlap."""
        all_new, new = self._reached.add(ranges)
        if all_new:
            put(self._x, ranges, values)
            return
        _clear(self._x, new)
        accumulate(self._x, ranges, values)

    def result(self) -> torch.Tensor:
        """x, 0 where nothing was found."""
        _clear(self._x, self._reached.rest())
        return self._x


def _clear(x: torch.Tensor, ranges: Ranges) -> None:
    for start, stop in ranges:
        x[:, :, start:stop].zero_()


@lru_cache(maxsize=256)
def _reach(reached: Ranges, ranges: Ranges) -> tuple[bool, Ranges, Ranges]:
    """Whether the ranges are all new and apart, which parts of them are new, and what is reached with them."""
    new = _without(_union(ranges), reached)
    return num_tokens(new) == num_tokens(ranges), new, _union(reached + ranges)


def _union(ranges: Ranges) -> Ranges:
    """The same rows in ascending ranges that are apart."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


def _without(ranges: Ranges, taken: Ranges) -> Ranges:
    """The rows of the first ranges that are not among the second; both ascend and are apart."""
    found, at = [], 0
    for start, stop in ranges:
        while at < len(taken) and taken[at][1] <= start:
            at += 1
        here = at  # the last of those that reach in here may reach into the next one
        while here < len(taken) and taken[here][0] < stop:
            if taken[here][0] > start:
                found.append((start, taken[here][0]))
            start = taken[here][1]
            here += 1
        if start < stop:
            found.append((start, stop))
    return tuple(found)
