"""One block of attention on one device: forward to (out, lse), backward from the final out and lse.

[Note: blocks of one softmax]
A row's softmax runs over all its blocks. Forward gives each block its own normalised output and log-sum-exp, and
`merge` folds them. Backward gets the *final* out and lse for every block: p = exp(s - lse) is then the true
probability, and delta = rowsum(dout * out) the true correction. Block-local values would give wrong gradients without
any error.

This file and `cptrain.distributed` hold every private torch symbol of the project.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from cptrain.context_parallel.schedule import Shape

aten = torch.ops.aten

ROWS_PER_TILE = (
    1024  # query rows the reference kernel scores at once: it never holds more than this many rows of scores
)


@dataclass(frozen=True)
class Kernel:
    """One backend. Shapes: q, out, dout, dq [B, H, T, D]; k, v, dk, dv [B, Hk, Tk, D]; lse [B, H, T].

    forward(q, k, v, causal, scale) -> out (dtype of q), lse (fp32; fp64 for fp64). H may be a multiple of Hk.
    backward(dout, q, k, v, out, lse, causal, scale) -> dq, dk, dv in the dtype of q.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str]
    differing_dims: bool  # whether values may be wider or narrower than keys
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _unit_stride(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with a last dim of stride 1, which flash kernels assume unseen: F.sdpa checks it, they do not."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _unit_stride(q, k, v)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, out = _unit_stride(q, k, v, out)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _unit_stride(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _cuda_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, out = _unit_stride(q, k, v, out)
    # The seed and offset of the dropout generator are asked for even when nothing is dropped.
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.size(2), k.size(2), 0.0, causal, unused, unused, scale=scale
    )


def _expand(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.size(1), dim=1) if x.size(1) != num_heads else x


def _reference_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = _expand(k, q.size(1)).to(wide), _expand(v, q.size(1)).to(wide)
    outs, lses = [], []
    for start in range(0, q.size(2), ROWS_PER_TILE):
        scores = _scores(q[:, :, start : start + ROWS_PER_TILE].to(wide), k, start, causal, scale)
        lse = scores.logsumexp(-1)
        outs.append(torch.exp(scores - lse[..., None]) @ v)
        lses.append(lse)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def _scores(q: torch.Tensor, k: torch.Tensor, start: int, causal: bool, scale: float) -> torch.Tensor:
    """Scaled scores of query rows that begin at `start` of the block, -inf where the causal mask hides the key."""
    scores = (q @ k.mT) * scale
    if causal:
        rows = torch.arange(start, start + q.size(2), device=q.device)
        scores.masked_fill_(torch.arange(k.size(2), device=q.device) > rows[:, None], -math.inf)
    return scores


def _reference_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = _expand(k, q.size(1)).to(wide), _expand(v, q.size(1)).to(wide)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.size(2), ROWS_PER_TILE):
        rows = slice(start, start + ROWS_PER_TILE)
        queries, dtile = q[:, :, rows].to(wide), dout[:, :, rows].to(wide)
        p = torch.exp(_scores(queries, keys, start, causal, scale) - lse[:, :, rows, None])
        delta = (dtile * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
        ds = p * (dtile @ values.mT - delta) * scale
        dq[:, :, rows] = (ds @ keys).to(q.dtype)
        dk += ds.mT @ queries
        dv += p.mT @ dtile
    groups = (k.size(1), q.size(1) // k.size(1))
    dk, dv = dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


CPU_FLASH = Kernel(
    name="cpu flash",
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    devices=frozenset({"cpu"}),
    differing_dims=False,
    forward=_cpu_forward,
    backward=_cpu_backward,
)
CUDA_FLASH = Kernel(
    name="cuda flash",
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    devices=frozenset({"cuda"}),
    differing_dims=False,
    forward=_cuda_forward,
    backward=_cuda_backward,
)
REFERENCE = Kernel(
    name="reference (plain torch)",
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    devices=frozenset({"cpu", "cuda", "meta"}),
    differing_dims=True,
    forward=_reference_forward,
    backward=_reference_backward,
)
KERNELS = (CPU_FLASH, CUDA_FLASH, REFERENCE)  # the first that fits is taken


@lru_cache(maxsize=64)
def choose_kernel(device_type: str, dtype: torch.dtype, *, same_dims: bool = True) -> Kernel:
    """The fastest kernel for this device and dtype, and for values as wide as keys or not.

    Raises NotImplementedError that names what would work.
    """
    for kernel in KERNELS:
        if device_type in kernel.devices and dtype in kernel.dtypes and (same_dims or kernel.differing_dims):
            return kernel
    offered = "; ".join(
        f"{k.name}: {', '.join(sorted(k.devices))} in {', '.join(sorted(str(d)[6:] for d in k.dtypes))}"
        for k in KERNELS
    )
    raise NotImplementedError(f"no attention kernel for {dtype} on {device_type}. There are {offered}")


def forward_block(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of one block; an upper triangle is a lower one with queries and keys reversed."""
    if shape is not Shape.UPPER:
        return kernel.forward(q, k, v, shape is Shape.LOWER, scale)
    out, lse = kernel.forward(q.flip(2), k.flip(2), v.flip(2), True, scale)
    return out.flip(2), lse.flip(2)


def backward_block(
    kernel: Kernel,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    shape: Shape,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of one block from the final out and lse of its rows."""
    if shape is not Shape.UPPER:
        return kernel.backward(dout, q, k, v, out, lse, shape is Shape.LOWER, scale)
    flipped = (x.flip(2) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = kernel.backward(*flipped, True, scale)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def merge(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Fold one block's attention into the running result, in place.

    Shapes: out, block_out [B, H, T, D]; lse, block_lse [B, H, T]. Accumulators are fp32 (fp64 in, fp64 kept).
    A row that has seen no key carries lse = -inf and out = 0, and stays so until a block shows it one.
    Source: online softmax, arXiv:1805.02867, with the block's weight sigmoid(block_lse - lse), which cannot overflow.
    """
    # -inf - -inf is NaN where neither side has seen a key: the weight is then 0 and the row stays as it is.
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(nan=0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, block_lse, out=lse)
