"""Ring and double ring: keys and values travel from neighbour to neighbour, queries stay.

[Note: the way back]
At the last hop of the forward pass, rank r of a ring holds the keys of r + 1. Backward starts from these and walks the
other way: the gradient of source s starts on rank s - 1 and is home at s after N - 1 hops, always beside the keys it
belongs to, and the rank's own keys, which come last, need not be sent at all. Bytes sent per rank, with m the bytes of
the local keys and values and w the accumulator's width over theirs: forward (N-1) m, backward (N-2) m + (N-1) w m.
Gradients have a communicator of their own, so that they never queue behind keys.

[Note: two buffers]
Keys and values of one hop are one flat message. While a block is computed from one buffer the next hop is received into
the other: memory is O(S/N) for any number of ranks. Where hops are computed together (see the note in `hops`), so many
messages take the place of each: all hops of the next batch are on their way while one is computed, each sending on what
the one before it receives. What is needed of them is copied into the order of the sequence.

[Note: sums on the side]
A gradient that arrives is added to and sent on, once per hop, also where several hops are computed together. On CUDA
that chain has a stream of its own (see [Note: on the side]): blocks need not wait for each of its messages.

[Note: double ring]
N ranks are R groups of w neighbours. Keys go round inside a group (w hops on its fast link) while the keys that the
group started from are on their way to the next group, in one message that has a whole inner revolution to arrive. So
the slow link carries R - 1 messages instead of N - 1. A single ring is a double ring of one group. Going back, both
rings turn the other way; a gradient goes round its inner ring, and from there, once per revolution, to the next group.
Source: LoongTrain, arXiv:2406.18485.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch

from cptrain.context_parallel.carrier import (
    Computes,
    Gradients,
    Piece,
    accumulator_dtype,
    cached_shard_blocks,
    pack,
    unpack,
)
from cptrain.context_parallel.hops import Pace, batches, together
from cptrain.context_parallel.launches import Ranges, matched, put, take
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.memory_order import new_tokens
from cptrain.context_parallel.sums import Sum
from cptrain.distributed.side_stream import SideStream
from cptrain.distributed.transport import Messenger, Pair, group_rank, group_size


class _Axis:
    """One ring: its size, this rank's place, and messages one rank on (+1) or back (-1)."""

    def __init__(self, group: str, *, overlap: bool) -> None:
        self.size, self.rank = group_size(group), group_rank(group)
        self._messenger = Messenger(group, overlap=overlap) if self.size > 1 else None

    def post(self, send: torch.Tensor, receive: torch.Tensor, *, step: int) -> None:
        assert self._messenger is not None
        to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
        self._messenger.post(Pair(to, (send,), source, (receive,)))

    def wait(self) -> None:
        if self._messenger is not None:
            self._messenger.wait()


class _Buffers:
    """Flat messages of one size and dtype, made when first needed and used again when given back."""

    def __init__(self, like: torch.Tensor, *, made: int = 0) -> None:
        self._like = like
        self._free = [torch.empty_like(like) for _ in range(made)]

    def take(self) -> torch.Tensor:
        return self._free.pop() if self._free else torch.empty_like(self._like)

    def give_back(self, *buffers: torch.Tensor) -> None:
        self._free += buffers


class Ring:
    """Carries keys round `inner`, and from group to group round `outer` (names of groups; "" for a ring of one).

    Rank o * w + p of the layout is rank p of its inner ring and rank o of its outer ring. The grad groups have the same
    ranks as theirs, and another communicator. pace: of the inner ring.
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
        pace: Pace,
        overlap: bool,
    ) -> None:
        self._layout, self._mask, self._pace = layout, mask, pace
        self._inner, self._outer = _Axis(inner, overlap=overlap), _Axis(outer, overlap=overlap)
        self._inner_grad, self._outer_grad = (
            _Axis(inner_grad, overlap=overlap),
            _Axis(outer_grad, overlap=overlap),
        )
        self._rank = self._outer.rank * self._inner.size + self._inner.rank

    def _sources(self, revolution: int, hops: Sequence[int]) -> tuple[int, ...]:
        """Whose keys are held at these hops: they set out `revolution` groups and a hop's ranks before this one."""
        first = (self._outer.rank - revolution) % self._outer.size * self._inner.size
        return tuple(first + (self._inner.rank - hop) % self._inner.size for hop in hops)

    def _piece(self, sources: tuple[int, ...], k: torch.Tensor, v: torch.Tensor, held: Sequence[torch.Tensor]) -> Piece:
        """What is held, a message from each source."""
        if sources == (self._rank,):
            return Piece(k, v, cached_shard_blocks(self._layout, self._mask, self._rank, self._rank))
        parts = [unpack(message, k.shape, v.shape) for message in held]
        if len(sources) == 1:
            return Piece(*parts[0], cached_shard_blocks(self._layout, self._mask, self._rank, *sources))
        found = together(self._layout, self._mask, self._rank, sources)
        whole = new_tokens(k, found.num_keys), new_tokens(v, found.num_keys)
        for place, needed, part in zip(found.places, found.needed, parts, strict=True):
            for there, here in zip(whole, part, strict=True):
                put(there, place, take(here, needed))
        return Piece(*whole, found.blocks)

    def _add(self, total: Sequence[Sum], sources: tuple[int, ...], number: int, gradients: Gradients) -> None:
        """Add what the gradients of the keys of these sources hold for one of them."""
        needed: Ranges = ((0, self._layout.shard_length),)
        places = needed
        if len(sources) > 1:
            found = together(self._layout, self._mask, self._rank, sources)
            needed, places = found.needed[number], found.places[number]
        for columns, *both in gradients:
            for ours, theirs in matched(needed, places):
                first, last = max(theirs.start, columns.start), min(theirs.stop, columns.stop)
                if first < last:
                    shift = ours.start - theirs.start
                    for whole, part in zip(total, both, strict=True):
                        whole.add(
                            ((first + shift, last + shift),), part[:, :, first - columns.start : last - columns.start]
                        )
        for whole in total:
            whole.result()

    def _pass_on(self, held: torch.Tensor, count: int, buffers: _Buffers, *, step: int) -> list[torch.Tensor]:
        """Start so many hops, of which each sends on what the one before receives; returns what they receive."""
        arriving: list[torch.Tensor] = []
        for _ in range(count):
            arriving.append(buffers.take())
            self._inner.post(arriving[-2] if len(arriving) > 1 else held, arriving[-1], step=step)
        return arriving

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        start = pack(k, v)
        buffers = _Buffers(start)
        held = [start]
        hops = batches(range(self._inner.size), self._pace)
        for revolution in range(self._outer.size):
            goes_on = revolution < self._outer.size - 1
            following = start
            if goes_on:
                following = buffers.take()
                self._outer.post(start, following, step=1)
            for batch, after in zip_longest(hops, hops[1:], fillvalue=()):
                arriving = self._pass_on(held[-1], len(after), buffers, step=1)
                compute(self._piece(self._sources(revolution, batch), k, v, held))
                self._inner.wait()
                if arriving:
                    # The start of a revolution is still being sent to the next group.
                    buffers.give_back(*(buffer for buffer in held if not (goes_on and buffer is start)))
                    held = arriving
            if goes_on:
                self._outer.wait()
                buffers.give_back(start, *(buffer for buffer in held if buffer is not start))
                start, held = following, [following]
        return held[-1]

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, held = kept, [kept]
        buffers = _Buffers(kept)
        grad = torch.empty(kept.shape, dtype=accumulator_dtype(k.dtype), device=k.device)
        # Made here and not on the side: memory belongs to the stream on which it was made.
        grad_buffers = _Buffers(grad, made=(self._inner.size > 1) + 2 * (self._outer.size > 1))
        side = SideStream(k.device)
        leaving = arrives = None  # gradients between groups: due at the end of the revolution after their start
        for revolution in reversed(range(self._outer.size)):
            # The rank's own keys come last and are here already: they need not travel to get home.
            goes_on = revolution > (1 if self._inner.size == 1 else 0)
            following = start
            if goes_on:
                following = buffers.take()
                self._outer.post(start, following, step=-1)
            incoming: torch.Tensor | None = None  # gradients that travel inside the group, beside their keys
            travelling = range(self._inner.size - 1, 0 if revolution == 0 else -1, -1)
            hops = [*batches(travelling, self._pace), *([range(1)] if revolution == 0 else [])]
            for batch, after in zip_longest(hops, hops[1:], fillvalue=()):
                arriving = self._pass_on(held[-1], sum(bool(hop or revolution) for hop in after), buffers, step=-1)
                sources = self._sources(revolution, batch)
                piece = self._piece(sources, k, v, held)
                gradients = compute(piece)
                with side.after(*(x for _, *both in gradients for x in both)):
                    for number, hop in enumerate(batch):
                        if incoming is not None:
                            # What the previous holders summed for these keys; it travelled while blocks ran.
                            self._inner_grad.wait()
                            grad_buffers.give_back(grad)
                            grad = incoming
                        begin = Sum if incoming is None else Sum.of
                        self._add([begin(x) for x in unpack(grad, k.shape, v.shape)], sources, number, gradients)
                        if hop > 0:
                            incoming = grad_buffers.take()
                            self._inner_grad.post(grad, incoming, step=-1)
                del piece, gradients  # before the next are made
                self._inner.wait()
                if arriving:
                    buffers.give_back(*(b for b in held if not (goes_on and b is start) and b is not kept))
                    held = arriving
            with side.after():
                if arrives is not None and leaving is not None:
                    self._outer_grad.wait()
                    grad.add_(arrives)
                    grad_buffers.give_back(arrives, leaving)
                if revolution > 0:
                    leaving, arrives = grad, grad_buffers.take()
                    self._outer_grad.post(leaving, arrives, step=-1)
                    grad = grad_buffers.take()
            if goes_on:
                self._outer.wait()
                buffers.give_back(*{id(b): b for b in (start, *held) if b is not kept}.values())
                start, held = following, [following]
        side.join()
        return unpack(grad, k.shape, v.shape)
