"""Attention of one block in plain torch, tile by tile: for devices without a kernel of their own, and for tests.

Shapes are those of `kernels.Kernel`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cptrain.context_parallel.launches import Segments

# Query rows that are scored at once: no more than this many rows of scores are ever held.
ROWS_PER_TILE = 1024


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.repeat_interleave(num_heads // x.size(1), dim=1) if x.size(1) != num_heads else x


def reduce_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """The gradient of `expand_heads`: repeats are summed."""
    return x if x.size(1) == num_kv_heads else x.unflatten(1, (num_kv_heads, -1)).sum(2)


def reference_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = expand_heads(k, q.size(1)).to(wide), expand_heads(v, q.size(1)).to(wide)
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


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = expand_heads(k, q.size(1)).to(wide), expand_heads(v, q.size(1)).to(wide)
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
    return dq, reduce_heads(dk, k.size(1)).to(k.dtype), reduce_heads(dv, k.size(1)).to(v.dtype)


def reference_forward_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    results = [reference_forward(q[:, :, rows], k[:, :, at], v[:, :, at], causal, scale) for rows, at in packed.cuts]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def reference_backward_packed(
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
    for rows, at in packed.cuts:
        tensors = (dout[:, :, rows], q[:, :, rows], k[:, :, at], v[:, :, at], out[:, :, rows], lse[:, :, rows])
        results.append(reference_backward(*tensors, causal, scale))
    dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
    return dq, dk, dv
