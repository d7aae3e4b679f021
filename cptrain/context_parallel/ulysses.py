"""Ulysses: an all-to-all turns a shard of the sequence with all heads into the whole sequence with some of the heads.

As DTensor placements this is Shard(sequence) -> Shard(heads) and back. It is written as two operators, each the other's
gradient, rather than as a redistribution, so that selective activation checkpointing can keep the result and
torch.compile sees one call. Tensors stay [B, T, H, D] in memory on both sides, which for one sequence makes the
receiving side a view.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

import torch

from cptrain.distributed.transport import all_to_all, group_size


@torch.library.custom_op("cptrain::sequence_to_heads", mutates_args=())
def sequence_to_heads(x: torch.Tensor, group: str) -> torch.Tensor:
    """x [B, H, T, D] of this rank's tokens -> [B, H/P, P*T, D]: head group p of all tokens goes to rank p.

    H must be a multiple of P. Tokens come in rank order. The gradient is `heads_to_sequence`.
    """
    size = group_size(group)
    batch, heads, length, dim = x.shape
    send = x.view(batch, size, heads // size, length, dim).permute(1, 0, 3, 2, 4).contiguous()  # [P, B, T, H/P, D]
    received = all_to_all(group, send)
    return _stored_by_token(received.transpose(0, 1).reshape(batch, size * length, heads // size, dim))


@torch.library.custom_op("cptrain::heads_to_sequence", mutates_args=())
def heads_to_sequence(x: torch.Tensor, group: str) -> torch.Tensor:
    """x [B, H/P, P*T, D] -> [B, H, T, D]: the inverse of `sequence_to_heads`, and its gradient."""
    size = group_size(group)
    batch, heads, length, dim = x.shape
    send = x.transpose(1, 2).reshape(batch, size, length // size, heads, dim).transpose(0, 1).contiguous()
    received = all_to_all(group, send)  # [P, B, T, H/P, D]
    return _stored_by_token(received.permute(1, 2, 0, 3, 4).reshape(batch, length // size, size * heads, dim))


def _stored_by_token(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D] as [B, H, T, D], in memory as the fake promises; one head per rank makes the reshape a view."""
    return x.contiguous().transpose(1, 2)


def _fake(x: torch.Tensor, heads: int, length: int) -> torch.Tensor:
    return x.new_empty(x.size(0), length, heads, x.size(3)).transpose(1, 2)


@sequence_to_heads.register_fake
def _(x, group):  # type: ignore[no-untyped-def]
    return _fake(x, x.size(1) // group_size(group), x.size(2) * group_size(group))


@heads_to_sequence.register_fake
def _(x, group):  # type: ignore[no-untyped-def]
    return _fake(x, x.size(1) * group_size(group), x.size(2) // group_size(group))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.group = inputs[1]


sequence_to_heads.register_autograd(
    lambda ctx, grad: (heads_to_sequence(grad, ctx.group), None), setup_context=_setup_context
)
heads_to_sequence.register_autograd(
    lambda ctx, grad: (sequence_to_heads(grad, ctx.group), None), setup_context=_setup_context
)


def replicate_kv_heads(x: torch.Tensor, degree: int) -> torch.Tensor:
    """x [B, Hk, T, D] with as many kv heads as `degree` needs: each repeated where the degree is larger than Hk.

    Repeats stand side by side, so that head group p of the queries meets its own kv head on rank p; autograd sums the
    gradients of the repeats.
    """
    return x.repeat_interleave(degree // x.size(1), dim=1) if x.size(1) < degree else x
