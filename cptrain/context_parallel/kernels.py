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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cptrain.context_parallel.launches import Launch, Segments, segments
from cptrain.context_parallel.schedule import Shape

aten = torch.ops.aten

# Query rows the reference kernel scores at once: it never holds more than this many rows of scores.
ROWS_PER_TILE = 1024

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]
ForwardPacked = Callable[[Tensor, Tensor, Tensor, Segments, bool, float], tuple[Tensor, Tensor]]
BackwardPacked = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Segments, bool, float], tuple[Tensor, Tensor, Tensor]
]


@dataclass(frozen=True)
class Kernel:
    """One backend and what it can do. Shapes: q, out, dout [B, H, T, D]; k, v [B, Hk, Tk, D]; lse [B, H, T].

    forward(q, k, v, causal, scale) -> out (dtype of q), lse (fp32; fp64 for fp64). H may be a multiple of Hk.
    backward(dout, q, k, v, out, lse, causal, scale) -> dq, dk, dv in the dtype of q.
    forward_packed, backward_packed: the same for several blocks at once, one behind the other along T and Tk, B = 1.
    A causal block is square. Sliding windows need nothing of a kernel: schedules cut them into full and causal blocks.
    """

    name: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    forward: Forward
    backward: Backward
    forward_packed: ForwardPacked | None = None
    backward_packed: BackwardPacked | None = None
    groups_heads: bool = True  # kv heads stay as few as they are; otherwise they are repeated for the call
    differing_dims: bool = False  # values may be wider or narrower than keys
    by_itself: bool = True  # chosen by "auto"; otherwise only by name


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a last dim of stride 1, which flash kernels assume unseen: F.sdpa checks it, they do not."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q, k, v)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out = _unit_stride(q, k, v, out)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


# The CUDA backends' backward asks for the state of a dropout generator, which nothing reads at dropout 0, and for
# offsets of packed sequences, which None leaves out.


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out = _unit_stride(q, k, v, out)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.size(2), k.size(2), 0.0, causal, unused, unused, scale=scale
    )


def _cuda_forward_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_by_token(x) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *packed, 0.0, causal, False, scale=scale)
    return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)


def _cuda_backward_packed(
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
        *tensors, lse[0].contiguous(), *packed, 0.0, causal, unused, unused, scale=scale
    )
    dq, dk, dv = (grad.transpose(0, 1).unsqueeze(0) for grad in grads)
    return dq, dk, dv


def _by_token(x: Tensor) -> Tensor:
    """x [1, H, T, D] as [T, H, D], which kernels of packed segments take."""
    return _unit_stride(x[0].transpose(0, 1))[0]


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.view(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out = _unit_stride(q, k, v, out)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    lse = lse.contiguous().unsqueeze(-1)
    lengths = (None, None, q.size(2), k.size(2))
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, unused, unused, None, *lengths, 0.0, causal, scale=scale
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = _expand(k, q.size(1)), _expand(v, q.size(1))
    q, k, v = _unit_stride(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.size(2)]


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _expand(k, q.size(1)), _expand(v, q.size(1))
    q, keys, values, out = _unit_stride(q, keys, values, out)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    # This backend reads lse in whole tiles of 32 rows; +inf gives the rows behind the last one no probability.
    padded = torch.nn.functional.pad(lse, (0, -lse.size(2) % 32), value=math.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, keys, values, None, out, padded, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, _reduce(dk, k.size(1)), _reduce(dv, k.size(1))


def _expand(x: Tensor, num_heads: int) -> Tensor:
    return x.repeat_interleave(num_heads // x.size(1), dim=1) if x.size(1) != num_heads else x


def _reduce(x: Tensor, num_kv_heads: int) -> Tensor:
    """The gradient of `_expand`: repeats are summed."""
    return x if x.size(1) == num_kv_heads else x.unflatten(1, (num_kv_heads, -1)).sum(2)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = _expand(k, q.size(1)).to(wide), _expand(v, q.size(1)).to(wide)
    outs, lses = [], []
    for start in range(0, q.size(2), ROWS_PER_TILE):
        scores = _scores(q[:, :, start : start + ROWS_PER_TILE].to(wide), k, start, causal, scale)
        lse = scores.logsumexp(-1)
        outs.append(torch.exp(scores - lse[..., None]) @ v)
        lses.append(lse)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def _scores(q: Tensor, k: Tensor, start: int, causal: bool, scale: float) -> Tensor:
    """Scaled scores of query rows that begin at `start` of the block, -inf where the causal mask hides the key."""
    scores = (q @ k.mT) * scale
    if causal:
        rows = torch.arange(start, start + q.size(2), device=q.device)
        scores.masked_fill_(torch.arange(k.size(2), device=q.device) > rows[:, None], -math.inf)
    return scores


def _reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
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
    return dq, _reduce(dk, k.size(1)).to(k.dtype), _reduce(dv, k.size(1)).to(v.dtype)


def _reference_forward_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    results = [_reference_forward(q[:, :, rows], k[:, :, at], v[:, :, at], causal, scale) for rows, at in _cuts(packed)]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _reference_backward_packed(
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
    results = []
    for rows, at in _cuts(packed):
        tensors = (dout[:, :, rows], q[:, :, rows], k[:, :, at], v[:, :, at], out[:, :, rows], lse[:, :, rows])
        results.append(_reference_backward(*tensors, causal, scale))
    dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
    return dq, dk, dv


def _cuts(packed: Segments) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each segment."""
    queries, keys = packed.q_offsets.tolist(), packed.k_offsets.tolist()
    for number in range(len(queries) - 1):
        yield slice(*queries[number : number + 2]), slice(*keys[number : number + 2])


_HALF = frozenset({torch.bfloat16, torch.float16})
_ANY = frozenset({torch.float64, torch.float32, *_HALF})
CPU_FLASH = Kernel("cpu flash", frozenset({"cpu"}), _ANY, _cpu_forward, _cpu_backward)
# Also FlashAttention 3 or 4, once torch.nn.attention.activate_flash_attention_impl has put it behind the same operator.
CUDA_FLASH = Kernel(
    "cuda flash",
    frozenset({"cuda"}),
    _HALF,
    _cuda_forward,
    _cuda_backward,
    forward_packed=_cuda_forward_packed,
    backward_packed=_cuda_backward_packed,
)
CUDNN = Kernel("cudnn", frozenset({"cuda"}), _HALF, _cudnn_forward, _cudnn_backward, by_itself=False)
EFFICIENT = Kernel(
    "efficient",
    frozenset({"cuda"}),
    frozenset({torch.float32, *_HALF}),
    _efficient_forward,
    _efficient_backward,
    groups_heads=False,
    differing_dims=True,
)
REFERENCE = Kernel(
    "reference",  # plain torch, on any device; several times slower than a flash kernel
    frozenset({"cpu", "cuda", "meta"}),
    _ANY,
    _reference_forward,
    _reference_backward,
    forward_packed=_reference_forward_packed,
    backward_packed=_reference_backward_packed,
    groups_heads=False,
    differing_dims=True,
)
KERNELS = (CPU_FLASH, CUDA_FLASH, CUDNN, EFFICIENT, REFERENCE)  # the first that fits is taken


@lru_cache(maxsize=64)
def choose_kernel(device_type: str, dtype: torch.dtype, *, same_dims: bool = True, name: str = "auto") -> Kernel:
    """The kernel of this name, or by "auto" the fastest, for a device, a dtype, and values as wide as keys or not.

    Raises NotImplementedError that names what would work.
    """
    fitting = [
        kernel
        for kernel in KERNELS
        if device_type in kernel.devices and dtype in kernel.dtypes and (same_dims or kernel.differing_dims)
    ]
    for kernel in fitting:
        if kernel.name == name or (name == "auto" and kernel.by_itself):
            return kernel
    what = f"{dtype} on {device_type}{'' if same_dims else ' with values of another width than keys'}"
    wanted = "no attention kernel" if name == "auto" else f'the attention kernel "{name}" is not there'
    offered = (
        ", ".join(kernel.name for kernel in fitting) or "none; cast to bfloat16 or float32, or move to cpu or cuda"
    )
    raise NotImplementedError(f"{wanted} for {what}; what works there: {offered}")


def forward_block(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse of one block; an upper triangle is a lower one with queries and keys reversed."""
    if shape is not Shape.UPPER:
        return kernel.forward(q, k, v, shape is Shape.LOWER, scale)
    out, lse = kernel.forward(q.flip(2), k.flip(2), v.flip(2), True, scale)
    return out.flip(2), lse.flip(2)


def backward_block(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: Shape,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block from the final out and lse of its rows."""
    if shape is not Shape.UPPER:
        return kernel.backward(dout, q, k, v, out, lse, shape is Shape.LOWER, scale)
    dout, q, k, v, out, lse = (x.flip(2) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, True, scale)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def packs(kernel: Kernel, q: Tensor) -> bool:
    """Whether several blocks of q [B, H, T, D] may go into one call."""
    return kernel.forward_packed is not None and q.size(0) == 1


def forward_launch(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse of the rows of a launch, given its rows and columns one block behind the other."""
    if len(launch.blocks) == 1 or kernel.forward_packed is None:
        return forward_block(kernel, q, k, v, launch.shape, scale)
    packed, upper = segments(launch, q.device), launch.shape is Shape.UPPER
    if upper:
        q, k, v = (x.flip(2) for x in (q, k, v))
    out, lse = kernel.forward_packed(q, k, v, packed, launch.shape is not Shape.FULL, scale)
    return (out.flip(2), lse.flip(2)) if upper else (out, lse)


def backward_launch(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    launch: Launch,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq of the rows and dk, dv of the columns of a launch, from the final out and lse of its rows."""
    if len(launch.blocks) == 1 or kernel.backward_packed is None:
        return backward_block(kernel, dout, q, k, v, out, lse, launch.shape, scale)
    packed, upper = segments(launch, q.device), launch.shape is Shape.UPPER
    tensors = (dout, q, k, v, out, lse)
    if upper:
        tensors = tuple(x.flip(2) for x in tensors)  # type: ignore[assignment]
    dq, dk, dv = kernel.backward_packed(*tensors, packed, launch.shape is not Shape.FULL, scale)
    return (dq.flip(2), dk.flip(2), dv.flip(2)) if upper else (dq, dk, dv)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Fold one block's attention into the running result, in place.

    Shapes: out, block_out [B, H, T, D]; lse, block_lse [B, H, T]. Accumulators are fp32 (fp64 in, fp64 kept).
    A row that has seen no key carries lse = -inf and out = 0, and stays so until a block shows it one.
    Source: online softmax, arXiv:1805.02867, with the block's weight sigmoid(block_lse - lse), which cannot overflow.
    """
    # -inf - -inf is NaN where neither side has seen a key: the weight is then 0 and the row stays as it is.
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(nan=0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, block_lse, out=lse)
