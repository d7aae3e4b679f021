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

from collections.abc import Callable

import torch

from cptrain.context_parallel.carrier import (
    Computes,
    Piece,
    accumulator_dtype,
    cached_shard_blocks,
    collected,
    key_shapes,
    new_sums,
    unpack,
)
from cptrain.context_parallel.hops import Group, Hop, groups_of, num_tokens
from cptrain.context_parallel.launches import Ranges, copy_ranges
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.sums import Sum
from cptrain.distributed.transport import Messenger, group_rank, group_size


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
        wide = accumulator_dtype(k.dtype)
        total = new_sums(k, v)
        homecoming: list[tuple[Ranges, torch.Tensor]] = []  # own keys, and gradients of them that are on their way

        def take_home() -> None:
            self._grad_messenger.wait()
            for ranges, message in homecoming:
                for whole, part in zip(total, unpack(message, *key_shapes(num_tokens(ranges), k, v)), strict=True):
                    whole.add(ranges, part)
            homecoming.clear()

        def visit(piece: Piece, group: Group | None) -> None:
            if group is None:
                compute(piece, total)
                return
            shapes = piece.keys.shape, piece.values.shape
            sums = torch.empty(sum(shape.numel() for shape in shapes), dtype=wide, device=k.device)
            of_keys, of_values = (Sum(x) for x in unpack(sums, *shapes))
            compute(piece, (of_keys, of_values))
            both = of_keys.result(), of_values.result()
            take_home()
            for hop, place in zip(group.hops, group.keys.places, strict=True):
                message = sums if len(group.hops) == 1 else _packed(place, *both)
                homecoming.append((hop.outgoing, self._send_back(hop, message, k, v)))

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
        under_way = [self._post(hop, k, v) for hop in groups[0].hops] if groups else []
        visit(Piece(k, v, cached_shard_blocks(self._layout, self._mask, self._rank, self._rank)), None)
        for number, group in enumerate(groups):
            received = under_way
            self._messenger.wait()
            if number + 1 < len(groups):
                under_way = [self._post(hop, k, v) for hop in groups[number + 1].hops]
            if group.hops:
                visit(Piece(*self._in_order(group, received, k, v), group.keys.blocks), group)

    def _post(self, hop: Hop, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Start a hop; returns the buffer in which its keys arrive."""
        send = None
        if hop.outgoing:
            send = _packed(hop.outgoing, k, v)
        receive = k.new_empty(_numel(hop.incoming, k, v))
        self._messenger.post(send=send, to=hop.reader, receive=receive if receive.numel() else None, source=hop.source)
        return receive

    def _in_order(
        self, group: Group, received: list[torch.Tensor], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a group of hops in the order of the sequence."""
        if len(received) == 1:
            return unpack(received[0], *key_shapes(group.keys.num_keys, k, v))
        parts = (
            (place, unpack(message, *key_shapes(num_tokens(hop.incoming), k, v)))
            for hop, place, message in zip(group.hops, group.keys.places, received, strict=True)
        )
        return collected(group.keys.num_keys, (k, v), parts)

    def _send_back(self, hop: Hop, send: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Start sending the gradients of a hop's keys to their owner; returns the buffer in which own ones arrive."""
        receive = send.new_empty(_numel(hop.outgoing, k, v))
        self._grad_messenger.post(
            send=send if send.numel() else None,
            to=hop.source,
            receive=receive if receive.numel() else None,
            source=hop.reader,
        )
        return receive


def _packed(ranges: Ranges, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys and values (or gradients of them) of these ranges, one behind the other, as one flat message."""
    message = k.new_empty(_numel(ranges, k, v))
    for x, part in zip((k, v), unpack(message, *key_shapes(num_tokens(ranges), k, v)), strict=True):
        copy_ranges(x, ranges, part)
    return message


def _numel(ranges: Ranges, k: torch.Tensor, v: torch.Tensor) -> int:
    return sum(shape.numel() for shape in key_shapes(num_tokens(ranges), k, v))
