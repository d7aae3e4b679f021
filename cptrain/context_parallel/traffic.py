"""What one attention call sends, as formulas of shapes, layout and mask: no processes, no tensors.

Counted per rank: every message that it takes part in, with the bytes of it that leave the rank. With m the bytes of the
rank's keys and values, g those of their gradients (fp32, or fp64 for fp64), N the ring and P the Ulysses degree:

| | forward | backward |
|---|---|---|
| ring, double ring | N-1 sends of m | N-2 sends of m, N-1 sends of g |
| windows, documents: needed keys | a send to each reader of what it sees | the same, and gradients to each source |
| all_gather, each kv head | (N-1) m / heads | the same, and a reduce-scatter of (N-1) g / heads |
| Ulysses | an all-to-all of (P-1)/P of q, k, v together, one of out | one of dout, one of dq, dk, dv together |

A window sends needed keys only where that is fewer bytes than all of them to all. A batch of packed documents does
where a ring would be dearer (`Packing.exchange_is_cheaper`); layout and mask are then those of all its rows joined.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cptrain.context_parallel.attention import sends_needed_only
from cptrain.context_parallel.hops import needed_keys
from cptrain.context_parallel.launches import num_tokens
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.distributed.transport import Message

Traffic = Counter[Message]  # how many of each


@dataclass(frozen=True, kw_only=True)
class Call:
    """Shapes of one attention call as a rank makes it, its tokens apart; itemsize: bytes of one element."""

    batch: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    @property
    def wide_itemsize(self) -> int:
        """Bytes of what gradients of keys are summed in."""
        return max(self.itemsize, 4)


def attention_traffic(
    call: Call,
    mask: Mask,
    layout: Layout,
    *,
    ring_rank: int,
    gathers: bool = False,
    exchanges: bool = False,
    ulysses_degree: int = 1,
) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one call on rank `ring_rank` of the ring that `layout` cuts the sequence over.

    gathers: whether the method is all_gather. An inner ring changes which link carries a message, not its size.
    exchanges: whether the needed keys of documents go straight to their readers (`PackedBatch.exchanges`); other masks
    decide it by themselves.
    """
    forward, backward = Traffic(), Traffic()
    packed = mask.documents is not None
    batch = 1 if packed else call.batch
    needed_only = exchanges if packed else sends_needed_only(layout, mask)
    tokens = layout.shard_length // ulysses_degree
    kv_heads = max(call.kv_heads, ulysses_degree)  # fewer are repeated before they are exchanged
    if ulysses_degree > 1:
        given = call.heads * call.key_dim + kv_heads * (call.key_dim + call.value_dim)  # elements of a token's q, k, v
        for elements in (given, call.heads * call.value_dim):
            num_bytes = batch * tokens * elements * call.itemsize
            exchanged = Message("all_to_all", num_bytes - num_bytes // ulysses_degree)
            forward[exchanged] += 1
            backward[exchanged] += 1
    heads = kv_heads // ulysses_degree
    elements = batch * heads * (call.key_dim + call.value_dim)  # of one token's keys and values
    key, gradient = elements * call.itemsize, elements * call.wide_itemsize
    size, others = layout.num_ranks, layout.num_ranks - 1
    if size == 1:
        pass
    elif needed_only:
        for hop in range(1, size):
            reader, source = (ring_rank + hop) % size, (ring_rank - hop) % size
            if read := num_tokens(needed_keys(layout, mask, reader, ring_rank)):
                forward[Message("send", read * key)] += 1
                backward[Message("send", read * key)] += 1
            if held := num_tokens(needed_keys(layout, mask, ring_rank, source)):
                backward[Message("send", held * gradient)] += 1
    elif gathers:
        gathered = Message("all_gather", others * layout.shard_length * key // heads)
        forward[gathered] += heads
        backward[gathered] += heads
        backward[Message("reduce_scatter", others * layout.shard_length * gradient // heads)] += heads
    else:
        forward[Message("send", layout.shard_length * key)] += others
        backward[Message("send", layout.shard_length * key)] += others - 1
        backward[Message("send", layout.shard_length * gradient)] += others
    return +forward, +backward


def num_bytes(traffic: Traffic) -> int:
    """Bytes that leave the rank."""
    return sum(message.num_bytes * count for message, count in traffic.items())
