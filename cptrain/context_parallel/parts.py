"""Ranges of a tensor's tokens for several peers, each peer's contiguous: what messages send and receive.

Where tokens are outermost in memory, as for one sequence on CUDA, the parts of all peers are one tensor, which one
operation fills or empties: a host that is to start a hundred small copies a call would keep a GPU waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cptrain.context_parallel.launches import Ranges, num_tokens, put, take
from cptrain.context_parallel.memory_order import by_head, in_order, new_tokens, stored


class Parts(NamedTuple):
    """Tokens for, or from, each peer.

    tensors: [B, H, T', D] each. whole: all of them, one behind the other, where memory holds them so.
    """

    tensors: tuple[torch.Tensor, ...]
    whole: torch.Tensor | None = None

    def messages(self) -> tuple[torch.Tensor, ...]:
        """The tensors in the order in which they lie in memory."""
        return tuple(stored(x) for x in self.tensors)

    def put_into(self, x: torch.Tensor, places: Sequence[Ranges]) -> None:
        """Write each part into its places of x."""
        if self.whole is not None:
            put(x, tuple(one for place in places for one in place), self.whole)
            return
        for place, part in zip(places, self.tensors, strict=True):
            put(x, place, part)


def parts_of(x: torch.Tensor, ranges: Sequence[Ranges]) -> Parts:
    """x [B, H, T, D] at the ranges of each peer, in the order of its device; views where it lies in that."""
    if not _tokens_outermost(x):
        return Parts(tuple(in_order(take(x, each)) for each in ranges))
    whole = in_order(take(x, tuple(one for each in ranges for one in each)))
    return _split(whole, [num_tokens(each) for each in ranges])


def empty_parts(like: torch.Tensor, lengths: Sequence[int]) -> Parts:
    """Uninitialised parts of so many tokens each, with the heads of `like` [B, H, T, D]."""
    if not _tokens_outermost(like):
        return Parts(tuple(new_tokens(like, length) for length in lengths))
    return _split(new_tokens(like, sum(lengths)), lengths)


def _split(whole: torch.Tensor, lengths: Sequence[int]) -> Parts:
    return Parts(tuple(whole.split(list(lengths), 2)), whole)


def _tokens_outermost(x: torch.Tensor) -> bool:
    return x.size(0) == 1 and not by_head(x.device)
