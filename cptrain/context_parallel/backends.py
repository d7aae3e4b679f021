"""Attention kernels of torch for one block: its private operators, each called as it wants to be.

This file and `cptrain.distributed` hold every private torch symbol of the project. Shapes are those of
`kernels.Kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cptrain.context_parallel.launches import Segments
from cptrain.context_parallel.reference import expand_heads, reduce_heads

aten = torch.ops.aten


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a last dim of stride 1, which flash kernels assume unseen: F.sdpa checks it, they do not."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q, k, v)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = _unit_stride(dout, q, k, v, out)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


# The CUDA backends' backward asks for the state of a dropout generator, which nothing reads at dropout 0, and for
# offsets of packed sequences, which None leaves out.


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = _unit_stride(dout, q, k, v, out)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.size(2), k.size(2), 0.0, causal, unused, unused, scale=scale
    )


def flash_forward_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_by_token(x) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *packed[:4], 0.0, causal, False, scale=scale)
    return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)


def flash_backward_packed(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packed: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [_by_token(x) for x in (dout, q, k, v, out)]
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        *tensors, lse[0].contiguous(), *packed[:4], 0.0, causal, unused, unused, scale=scale
    )
    dq, dk, dv = (grad.transpose(0, 1).unsqueeze(0) for grad in grads)
    return dq, dk, dv


def _by_token(x: Tensor) -> Tensor:
    """x [1, H, T, D] as [T, H, D], which kernels of packed segments take."""
    return _unit_stride(x[0].transpose(0, 1))[0]


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if k.size(2) == 1:  # which cuDNN does not take
        return efficient_forward(q, k, v, causal, scale)
    q, k, v = _unit_stride(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.view(q.shape[:3])


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if k.size(2) == 1:
        return efficient_backward(dout, q, k, v, out, lse, causal, scale)
    dout, q, k, v, out = _unit_stride(dout, q, k, v, out)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    lse = lse.contiguous().unsqueeze(-1)
    lengths = (None, None, q.size(2), k.size(2))
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, unused, unused, None, *lengths, 0.0, causal, scale=scale
    )


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = expand_heads(k, q.size(1)), expand_heads(v, q.size(1))
    q, k, v = _unit_stride(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.size(2)]


def efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = expand_heads(k, q.size(1)), expand_heads(v, q.size(1))
    dout, q, keys, values = _unit_stride(dout, q, keys, values)
    # In half precision this backend takes the rows of out to lie H * D apart, whatever their stride says.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    # This backend reads lse in whole tiles of 32 rows; +inf gives the rows behind the last one no probability.
    padded = torch.nn.functional.pad(lse, (0, -lse.size(2) % 32), value=math.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, keys, values, None, out, padded, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, reduce_heads(dk, k.size(1)), reduce_heads(dv, k.size(1))


def saved_tensors_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """What packs and unpacks the tensors that are saved for backward right now, as checkpointing does; None if nothing.

    Not of a kernel: there is no public way to ask.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
