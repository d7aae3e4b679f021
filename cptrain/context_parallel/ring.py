"""Ring attention as one custom operator: keys and values travel, queries stay.

[Note: the ring is one operator]
Forward and backward are `torch.library` operators, so that selective activation checkpointing can keep the result (the
recompute then sends nothing) and torch.compile sees one opaque call. A policy that keeps only the inner kernel's output
would still repeat every message. An operator's outputs must alias neither its inputs nor each other.

[Note: the way back]
At hop i of the forward pass, rank r holds the keys of r - i, so it ends with those of r + 1. Backward starts from these
and walks the other way: the gradient of source s starts on rank s - 1 and is home at s after N - 1 hops, always beside
the keys it belongs to, and the rank's own keys, which come last, need not be sent at all. Bytes sent per rank, with
m the bytes of the local keys and values and w the accumulator's width over theirs: forward (N-1) m, backward
(N-2) m + (N-1) w m. Gradients have a communicator of their own, so that they never queue behind keys.

[Note: two buffers]
Keys and values of one hop are one flat message. While a block is computed from one buffer the next hop is received into
the other: memory is O(S/N) for any number of ranks.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from cptrain.context_parallel.kernels import choose_kernel, merge
from cptrain.context_parallel.layout import make_layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import Hop, ring_schedule
from cptrain.distributed.transport import Rotation, group_rank, group_size


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over hops are kept in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def _hops(layout: str, num_ranks: int, length: int, causal: bool, rank: int) -> tuple[Hop, ...]:
    return ring_schedule(make_layout(layout, num_ranks, length), Mask(causal=causal), rank)


def _pack(k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """k and v as one flat message. Always a copy: accumulators and messages must never alias an input."""
    message = torch.empty(k.numel() + v.numel(), dtype=dtype, device=k.device)
    packed_k, packed_v = _unpack(message, k.shape, v.shape)
    packed_k.copy_(k)
    packed_v.copy_(v)
    return message


def _unpack(message: torch.Tensor, k_shape: torch.Size, v_shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of k [B, Hk, T, Dk] and v [B, Hk, T, Dv] in a flat message, stored [B, T, Hk, D] as projections are."""
    num_k = k_shape.numel()
    return _as_heads(message[:num_k], k_shape), _as_heads(message[num_k:], v_shape)


def _as_heads(flat: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    batch, heads, length, dim = shape
    return flat.view(batch, length, heads, dim).transpose(1, 2)


def _new_heads(like: torch.Tensor, dtype: torch.dtype, dim: int | None = None) -> torch.Tensor:
    """Uninitialised [B, H, T, D] stored as [B, T, H, D]: the model's next reshape is then a view."""
    batch, heads, length, own = like.shape
    return torch.empty(batch, length, heads, dim or own, dtype=dtype, device=like.device).transpose(1, 2)


@torch.library.custom_op("cptrain::ring_attention", mutates_args=())
def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    causal: bool,
    scale: float,
    kv_group: str,
    grad_group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact attention of this rank's queries over the whole sequence.

    Shapes: q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, Dv] local shards. Returns out [B, H, T, Dv] in the dtype of q,
    lse [B, H, T] in fp32 (fp64), and the flat keys and values that this rank held last, from which backward starts.
    """
    kernel = choose_kernel(q.device.type, q.dtype)
    rank, size = group_rank(kv_group), group_size(kv_group)
    hops = _hops(layout, size, size * q.size(2), causal, rank)
    wide = accumulator_dtype(q.dtype)
    held = _pack(k, v, k.dtype) if size > 1 else k.new_empty(0)
    spare = torch.empty_like(held)
    rotation = Rotation(kv_group, step=1) if size > 1 else None
    out = lse = None
    for index, hop in enumerate(hops):
        last = index == size - 1
        if rotation and not last:
            rotation.post(send=held, receive=spare)
        keys, values = (k, v) if hop.source == rank else _unpack(held, k.shape, v.shape)
        for block in hop.blocks:
            rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
            block_out, block_lse = kernel.forward(
                q[:, :, rows], keys[:, :, columns], values[:, :, columns], block.causal, scale
            )
            if out is None and block_out.size(2) == q.size(2):
                # The first block covers every row: its result, in buffers of its own, starts the accumulation.
                out, lse = block_out.to(wide), block_lse.contiguous()
                continue
            if out is None or lse is None:
                out = _new_heads(q, wide, v.size(-1)).zero_()
                lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
            merge(out[:, :, rows], lse[:, :, rows], block_out, block_lse)
        if rotation and not last:
            rotation.wait()
            held, spare = spare, held
    assert out is not None and lse is not None, "a schedule has at least the rank's own block"
    return _stored_by_token(out.to(q.dtype)), lse, held


def _stored_by_token(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] stored as [B, T, H, D], which is what the operator's fake promises; a copy only if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@ring_attention.register_fake
def _(q, k, v, layout, causal, scale, kv_group, grad_group):  # type: ignore[no-untyped-def]
    out = _new_heads(q, q.dtype, v.size(-1))
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    last = k.new_empty(k.numel() + v.numel() if group_size(kv_group) > 1 else 0)
    return out, lse, last


@torch.library.custom_op("cptrain::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    last: torch.Tensor,
    layout: str,
    causal: bool,
    scale: float,
    kv_group: str,
    grad_group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `ring_attention`, shaped and typed as q, k, v; see [Note: the way back]."""
    kernel = choose_kernel(q.device.type, q.dtype)
    rank, size = group_rank(kv_group), group_size(kv_group)
    if size == 1:
        dq_, dk_, dv_ = kernel.backward(dout, q, k, v, out, lse, causal, scale)
        return _stored_by_token(dq_), _stored_by_token(dk_), _stored_by_token(dv_)
    hops = _hops(layout, size, size * q.size(2), causal, rank)[::-1]
    wide = accumulator_dtype(q.dtype)
    rotation, grad_rotation = Rotation(kv_group, step=-1), Rotation(grad_group, step=-1)
    # Three key buffers at the most: `last` is the operator's input, so nothing may be received into it.
    held, spare = last, None
    dq = None
    dkv = torch.zeros(k.numel() + v.numel(), dtype=wide, device=k.device)
    dkv_spare = torch.empty_like(dkv)
    for index, hop in enumerate(hops):
        fetch = index < size - 2  # the rank's own keys come last and are here already
        if fetch:
            spare = torch.empty_like(last) if spare is None or spare is last else spare
            rotation.post(send=held, receive=spare)
        own = hop.source == rank
        keys, values = (k, v) if own else _unpack(held, k.shape, v.shape)
        grads = []
        for block in hop.blocks:
            rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
            block_dq, block_dk, block_dv = kernel.backward(
                dout[:, :, rows],
                q[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                block.causal,
                scale,
            )
            if dq is None and block_dq.size(2) == q.size(2):
                dq = block_dq.to(wide)
            else:
                dq = _new_heads(q, wide).zero_() if dq is None else dq
                dq[:, :, rows] += block_dq
            grads.append((columns, block_dk, block_dv))
        if index > 0:
            # What the previous holder summed for this source; it travelled while this hop's blocks ran.
            grad_rotation.wait()
            dkv, dkv_spare = dkv_spare, dkv
        dk, dv = _unpack(dkv, k.shape, v.shape)
        for columns, block_dk, block_dv in grads:
            dk[:, :, columns] += block_dk
            dv[:, :, columns] += block_dv
        if index < size - 1:
            grad_rotation.post(send=dkv, receive=dkv_spare)
        if fetch and spare is not None:
            rotation.wait()
            held, spare = spare, held
    assert dq is not None, "a schedule has at least the rank's own block"
    dk, dv = _unpack(dkv, k.shape, v.shape)
    # Copies, since outputs of an operator may not share one buffer.
    return _stored_by_token(dq.to(q.dtype)), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@ring_attention_backward.register_fake
def _(dout, q, k, v, out, lse, last, layout, causal, scale, kv_group, grad_group):  # type: ignore[no-untyped-def]
    return _new_heads(q, q.dtype), _new_heads(k, k.dtype), _new_heads(v, v.dtype)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, *ctx.settings = inputs
    out, lse, last = output
    ctx.mark_non_differentiable(lse, last)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, last)


def _backward(ctx, dout, dlse, dlast):  # type: ignore[no-untyped-def]
    return (*ring_attention_backward(dout, *ctx.saved_tensors, *ctx.settings), *(None for _ in ctx.settings))


ring_attention.register_autograd(_backward, setup_context=_setup_context)
