"""Ulysses: an all-to-all turns shards of the sequence with all heads into the whole sequence with some of the heads.

As DTensor placements this is Shard(sequence) -> Shard(heads) and back. It is written as two operators, each the other's
gradient, rather than as a redistribution, so that selective activation checkpointing can keep the result and
torch.compile sees one call. Queries, keys and values travel together: every all-to-all is a moment at which all ranks
wait for the slowest. The part that stays here is copied meanwhile, straight to its place.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cptrain.context_parallel.memory_order import new_tokens, stored
from cptrain.distributed.transport import Pair, all_to_all, end, group_rank, group_size


@torch.library.custom_op("cptrain::sequence_to_heads", mutates_args=())
def sequence_to_heads(xs: Sequence[torch.Tensor], group: str) -> list[torch.Tensor]:
    """Each x [B, H, T, D] of this rank's tokens -> [B, H/P, P*T, D]: head group p of all tokens goes to rank p.

    H must be a multiple of P; it may differ between tensors, as may D. Tokens come in rank order. Results are stored as
    kernels want them (see [Note: memory order]). The gradient is `heads_to_sequence`.
    """
    results = _whole_sequences(xs, group)
    _exchange(xs, results, group, from_dim=1, to_dim=2, order=stored)
    return results


@torch.library.custom_op("cptrain::heads_to_sequence", mutates_args=())
def heads_to_sequence(xs: Sequence[torch.Tensor], group: str) -> list[torch.Tensor]:
    """Each x [B, H/P, P*T, D] -> [B, H, T, D]: the inverse of `sequence_to_heads`, and its gradient."""
    results = _all_heads(xs, group)
    _exchange(xs, results, group, from_dim=2, to_dim=1, order=_by_token)
    return results


def _exchange(
    xs: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    group: str,
    *,
    from_dim: int,
    to_dim: int,
    order: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Part p of every x along `from_dim` goes to rank p, where it becomes the part of this rank along `to_dim`.

    order: gives a tensor in the order in which results are in memory, and messages too.
    """
    size, rank = group_size(group), group_rank(group)
    given = [x.chunk(size, from_dim) for x in xs]
    places = [result.chunk(size, to_dim) for result in results]
    pairs, landed = [], []
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        send = tuple(order(parts[to]).contiguous() for parts in given)
        targets = [order(parts[source]) for parts in places]
        # What comes to a place without gaps needs no buffer.
        receive = tuple(x if x.is_contiguous() else x.new_empty(x.shape) for x in targets)
        landed += [(target, x) for target, x in zip(targets, receive, strict=True) if target is not x]
        pairs.append(Pair(to, send, source, receive))
    works = all_to_all(group, pairs)
    for place, parts in zip(places, given, strict=True):
        place[rank].copy_(parts[rank])
    end(works)
    for target, x in landed:
        target.copy_(x)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _whole_sequences(xs: Sequence[torch.Tensor], group: str) -> list[torch.Tensor]:
    size = group_size(group)
    return [new_tokens(x[:, : x.size(1) // size], x.size(2) * size) for x in xs]


def _all_heads(xs: Sequence[torch.Tensor], group: str) -> list[torch.Tensor]:
    """Stored tokens first: the next reshape of the model is a view."""
    size = group_size(group)
    return [x.new_empty(x.size(0), x.size(2) // size, x.size(1) * size, x.size(3)).transpose(1, 2) for x in xs]


sequence_to_heads.register_fake(_whole_sequences)
heads_to_sequence.register_fake(_all_heads)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.group = inputs[1]


sequence_to_heads.register_autograd(
    lambda ctx, grads: (heads_to_sequence(grads, ctx.group), None), setup_context=_setup_context
)
heads_to_sequence.register_autograd(
    lambda ctx, grads: (sequence_to_heads(grads, ctx.group), None), setup_context=_setup_context
)


def replicate_kv_heads(x: torch.Tensor, degree: int) -> torch.Tensor:
    """x [B, Hk, T, D] with as many kv heads as `degree` needs: each repeated where the degree is larger than Hk.

    Repeats stand side by side, so that head group p of the queries meets its own kv head on rank p; autograd sums the
    gradients of the repeats.
    """
    return x.repeat_interleave(degree // x.size(1), dim=1) if x.size(1) < degree else x
