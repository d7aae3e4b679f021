"""Ring and double ring: keys and values travel from neighbour to neighbour, queries stay.

[Note: the way back]
At the last hop of the forward pass, rank r of a ring holds the keys of r + 1. Backward starts from these and walks the
other way: the gradient of source s starts on rank s - 1 and is home at s after N - 1 hops, always beside the keys it
belongs to, and the rank's own keys, which come last, need not be sent at all. Bytes sent per rank, with m the bytes of
the local keys and values and w the accumulator's width over theirs: forward (N-1) m, backward (N-2) m + (N-1) w m.
Gradients have a communicator of their own, so that they never queue behind keys.

[Note: two buffers]
Keys and values of one hop are one flat message. While a block is computed from one buffer the next hop is received into
the other: memory is O(S/N) for any number of ranks.

[Note: double ring]
N ranks are R groups of w neighbours. Keys go round inside a group (w hops on its fast link) while the keys that the
group started from are on their way to the next group, in one message that has a whole inner revolution to arrive. So
the slow link carries R - 1 messages instead of N - 1. A single ring is a double ring of one group. Going back, both
rings turn the other way; a gradient goes round its inner ring, and from there, once per revolution, to the next group.
Source: LoongTrain, arXiv:2406.18485.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cptrain.context_parallel.carrier import (
    Computes,
    Piece,
    accumulator_dtype,
    add,
    cached_shard_blocks,
    pack,
    unpack,
)
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.distributed.transport import Messenger, group_rank, group_size


class _Axis:
    """One ring: its size, this rank's place, and messages one rank on (+1) or back (-1)."""

    def __init__(self, group: str, *, overlap: bool) -> None:
        self.size, self.rank = group_size(group), group_rank(group)
        self._messenger = Messenger(group, overlap=overlap) if self.size > 1 else None

    def post(self, send: torch.Tensor, receive: torch.Tensor, *, step: int) -> None:
        assert self._messenger is not None
        to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
        self._messenger.post(send=send, to=to, receive=receive, source=source)

    def wait(self) -> None:
        if self._messenger is not None:
            self._messenger.wait()


class _Buffers:
    """Flat messages of one size and dtype, made when first needed and used again when given back."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._free: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        return self._free.pop() if self._free else torch.empty_like(self._like)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)


class Ring:
    """Carries keys round `inner`, and from group to group round `outer` (names of groups; "" for a ring of one).

    Rank o * w + p of the layout is rank p of its inner ring and rank o of its outer ring. The grad groups have the same
    ranks as theirs, and another communicator.
    """

    def __init__(
        self,
        layout: Layout,
        mask: Mask,
        *,
        inner: str,
        outer: str,
        inner_grad: str,
        outer_grad: str,
        overlap: bool,
    ) -> None:
        self._layout, self._mask = layout, mask
        self._inner, self._outer = _Axis(inner, overlap=overlap), _Axis(outer, overlap=overlap)
        self._inner_grad, self._outer_grad = (
            _Axis(inner_grad, overlap=overlap),
            _Axis(outer_grad, overlap=overlap),
        )
        self._rank = self._outer.rank * self._inner.size + self._inner.rank

    def _piece(self, revolution: int, hop: int, k: torch.Tensor, v: torch.Tensor, held: torch.Tensor) -> Piece:
        """Whatever is held at this hop: the keys that set out `revolution` groups and `hop` ranks before this one."""
        group = (self._outer.rank - revolution) % self._outer.size
        source = group * self._inner.size + (self._inner.rank - hop) % self._inner.size
        found = cached_shard_blocks(self._layout, self._mask, self._rank, source)
        keys, values = (k, v) if source == self._rank else unpack(held, k.shape, v.shape)
        return Piece(keys, values, found)

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        start = pack(k, v)
        buffers = _Buffers(start)
        held = start
        for revolution in range(self._outer.size):
            goes_on = revolution < self._outer.size - 1
            following = start
            if goes_on:
                following = buffers.take()
                self._outer.post(start, following, step=1)
            for hop in range(self._inner.size):
                moves = hop < self._inner.size - 1
                spare = held
                if moves:
                    spare = buffers.take()
                    self._inner.post(held, spare, step=1)
                compute(self._piece(revolution, hop, k, v, held))
                if moves:
                    self._inner.wait()
                    # The start of a revolution is still being sent to the next group.
                    if not (goes_on and held is start):
                        buffers.give_back(held)
                    held = spare
            if goes_on:
                self._outer.wait()
                buffers.give_back(start)
                if held is not start:
                    buffers.give_back(held)
                start = held = following
        return held

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = held = kept
        buffers = _Buffers(kept)
        grad = torch.zeros(kept.shape, dtype=accumulator_dtype(k.dtype), device=k.device)
        grad_buffers = _Buffers(grad)
        leaving = arriving = None  # gradients between groups: due at the end of the revolution after their start
        for revolution in reversed(range(self._outer.size)):
            # The rank's own keys come last and are here already: they need not travel to get home.
            goes_on = revolution > (1 if self._inner.size == 1 else 0)
            following = start
            if goes_on:
                following = buffers.take()
                self._outer.post(start, following, step=-1)
            incoming: torch.Tensor | None = None  # gradients that travel inside the group, beside their keys
            for hop in reversed(range(self._inner.size)):
                moves = hop > (1 if revolution == 0 else 0)
                spare = held
                if moves:
                    spare = buffers.take()
                    self._inner.post(held, spare, step=-1)
                gradients = compute(self._piece(revolution, hop, k, v, held))
                if incoming is not None:
                    # What the previous holders summed for these keys; it travelled while the blocks ran.
                    self._inner_grad.wait()
                    grad_buffers.give_back(grad)
                    grad = incoming
                add(unpack(grad, k.shape, v.shape), gradients)
                if hop > 0:
                    incoming = grad_buffers.take()
                    self._inner_grad.post(grad, incoming, step=-1)
                if moves:
                    self._inner.wait()
                    if not (goes_on and held is start) and held is not kept:
                        buffers.give_back(held)
                    held = spare
            if arriving is not None and leaving is not None:
                self._outer_grad.wait()
                grad.add_(arriving)
                grad_buffers.give_back(arriving)
                grad_buffers.give_back(leaving)
            if revolution > 0:
                leaving, arriving = grad, grad_buffers.take()
                self._outer_grad.post(leaving, arriving, step=-1)
                grad = grad_buffers.take().zero_()
            if goes_on:
                self._outer.wait()
                for buffer in {id(b): b for b in (start, held) if b is not kept}.values():
                    buffers.give_back(buffer)
                start = held = following
        return unpack(grad, k.shape, v.shape)
