"""Only the keys that somebody sees travel, straight from their owner: for masks that hide most of the sequence.

At hop i a rank sends to the i-th rank after it the keys that some query there sees, and receives likewise; gradients go
straight back and are summed by the owner in fp32. All go through the hops in the same order and leave out those that
move nothing for them: what two ranks exchange belongs to one hop of both, so neither waits for one that the other has
left out. Which keys travel, and which hops are computed together, is in `hops`.

[Note: one order of messages]
Keys and gradients have a communicator each, and ranks must start messages of both in one order, or two that each wait
for the other in another one wait for ever: always where messages do not overlap the computation, and on CUDA where both
wait for the device at that moment, as memory that runs short makes them. So backward looks ahead to the keys of the
next hops by number, keys 1, 2, gradients 1, keys 3, gradients 2, also where these hops move nothing here. Forward,
which sends keys alone, looks ahead to the next hops that do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cptrain.context_parallel.carrier import Computes, Piece, cached_shard_blocks, new_sums
from cptrain.context_parallel.hops import Group, Hop, groups_of
from cptrain.context_parallel.launches import Ranges, num_tokens
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.memory_order import new_tokens
from cptrain.context_parallel.parts import Parts, empty_parts, parts_of
from cptrain.distributed.transport import Messenger, Pair, group_rank, group_size


class Exchange:
    """Carries needed keys straight from owner to reader over `group`, and gradients back over `grad_group`.

    at_once: hops that are computed together.
    """

    def __init__(self, layout: Layout, mask: Mask, *, group: str, grad_group: str, at_once: int, overlap: bool) -> None:
        assert group_size(group) == layout.num_ranks
        self._at_once = at_once
        self._layout, self._mask, self._rank = layout, mask, group_rank(group)
        self._messenger = Messenger(group, overlap=overlap)
        self._grad_messenger = Messenger(grad_group, overlap=overlap)

    def forward(self, k: torch.Tensor, v: torch.Tensor, compute: Callable[[Piece], None]) -> torch.Tensor:
        self._visit(self._groups(empty=False), k, v, lambda piece, group: compute(piece))
        return k.new_empty(0)

    def backward(
        self, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, compute: Computes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = new_sums(k, v)
        homecoming: list[tuple[Ranges, list[torch.Tensor]]] = []  # own keys, and gradients of them on their way here

        def take_home() -> None:
            self._grad_messenger.wait()
            for ranges, parts in homecoming:
                for whole, part in zip(total, parts, strict=True):
                    whole.add(ranges, part)
            homecoming.clear()

        def visit(piece: Piece, group: Group | None) -> None:
            if group is None:
                compute(piece, total)
                return
            sums = new_sums(piece.keys, piece.values)
            compute(piece, sums)
            whole = tuple(x.result() for x in sums)
            take_home()
            home = self._swap(self._grad_messenger, group.hops, whole, group.keys.places, back=True)
            homecoming.extend(
                (hop.outgoing, parts) for hop, *parts in zip(group.hops, *(x.tensors for x in home), strict=True)
            )

        self._visit(self._groups(empty=True), k, v, visit)
        take_home()
        return total[0].result(), total[1].result()

    def _groups(self, *, empty: bool) -> list[Group]:
        """This rank's groups of hops; empty: also those that move nothing here."""
        groups = groups_of(self._layout, self._mask, self._rank, self._at_once)
        return [group for group in groups if empty or group.hops]

    def _visit(
        self, groups: list[Group], k: torch.Tensor, v: torch.Tensor, visit: Callable[[Piece, Group | None], None]
    ) -> None:
        """Own keys first, then those of each group of hops, the next group always under way."""
        under_way = self._post(groups[0], k, v) if groups else ()
        visit(Piece(k, v, cached_shard_blocks(self._layout, self._mask, self._rank, self._rank)), None)
        for number, group in enumerate(groups):
            received = under_way
            self._messenger.wait()
            if number + 1 < len(groups):
                under_way = self._post(groups[number + 1], k, v)
            if group.hops:
                keys, values = (_in_sequence(group, x) for x in received)
                visit(Piece(keys, values, group.keys.blocks), group)

    def _post(self, group: Group, k: torch.Tensor, v: torch.Tensor) -> tuple[Parts, ...]:
        """Start the hops of a group; returns the keys and values that arrive."""
        return self._swap(self._messenger, group.hops, (k, v), [hop.outgoing for hop in group.hops])

    def _swap(
        self,
        messenger: Messenger,
        hops: tuple[Hop, ...],
        sent: tuple[torch.Tensor, ...],
        ranges: Sequence[Ranges],
        back: bool = False,
    ) -> tuple[Parts, ...]:
        """Start sending of each tensor the ranges of each hop to its reader, or back to its source; what will come."""
        sends = [parts_of(x, ranges) for x in sent]
        lengths = [num_tokens(hop.outgoing if back else hop.incoming) for hop in hops]
        receives = tuple(empty_parts(x, lengths) for x in sent)
        pairs = []
        for hop, *tensors in zip(hops, *(x.messages() for x in (*sends, *receives)), strict=True):
            out, there = (tuple(x for x in some if x.numel()) for some in (tensors[: len(sent)], tensors[len(sent) :]))
            pairs.append(Pair(hop.source, out, hop.reader, there) if back else Pair(hop.reader, out, hop.source, there))
        messenger.post(*pairs)
        return receives


def _in_sequence(group: Group, received: Parts) -> torch.Tensor:
    """Keys (values) of a group of hops in the order of the sequence."""
    if len(group.hops) == 1:
        return received.tensors[0]
    whole = new_tokens(received.tensors[0], group.keys.num_keys)
    received.put_into(whole, group.keys.places)
    return whole
