"""Whether a plan computes exact attention here and now, on this mesh, device and version of torch.

Everything is compared with attention over the whole sequence in one process, written out densely in fp64. Sizes are
tiny, groups are the plan's own, random numbers come from a generator of their own, and nothing is kept.
All functions are collective over the ranks of the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from cptrain.context_parallel.api import HEAD_DIM, SEQUENCE_DIM, ContextParallel
from cptrain.context_parallel.finding import Finding
from cptrain.context_parallel.kernels import choose_kernel
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask

EXACT = 1e-10  # largest difference allowed in fp64, of values of about 1
MOST_ENDS = 8  # ranks whose last token is followed back, where there are more
FP32_ROUNDING = 5e-7  # relative error that accumulators in fp32 may always have


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the attention to check: heads of one rank, tokens of the global sequence, and the dtype it runs in."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int = 2


def exact_dtype(device: torch.device, dtype: torch.dtype, kernel: str) -> torch.dtype:
    """fp64 where the kernel that computes `dtype` has it, so that nothing hides in rounding; else `dtype` itself."""
    return torch.float64 if torch.float64 in choose_kernel(device.type, dtype, name=kernel).dtypes else dtype


def visible(mask: Mask, length: int, device: torch.device) -> torch.Tensor:
    """[length, length] bool: which key (column) each query (row) sees. For checks only."""
    if not mask.causal:
        return torch.ones(length, length, dtype=torch.bool, device=device)
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < (mask.window or length))


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """Attention of the whole sequence with a dense mask, one kv head at a time: shares no code with what it checks."""
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    seen = visible(mask, q.size(SEQUENCE_DIM), q.device)
    groups = q.unflatten(HEAD_DIM, (k.size(HEAD_DIM), -1))
    outs = []
    for head in range(k.size(HEAD_DIM)):
        keys, values = k[:, head, None], v[:, head, None]
        scores = (groups[:, head] @ keys.mT * scale).masked_fill(~seen, -math.inf)
        outs.append(scores.softmax(-1) @ values)
    return torch.cat(outs, HEAD_DIM)


def single_device_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """What `F.scaled_dot_product_attention` of this device makes of the whole sequence: the rounding to measure by."""
    if not mask.window:
        grouped = q.size(HEAD_DIM) != k.size(HEAD_DIM)
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, scale=scale, enable_gqa=grouped)
    # Few CUDA kernels take a dense mask, none of them grouped heads; what torch falls back to would round less.
    k, v = (x.repeat_interleave(q.size(HEAD_DIM) // x.size(HEAD_DIM), dim=HEAD_DIM) for x in (k, v))
    seen = visible(mask, q.size(SEQUENCE_DIM), q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def check_attention(plan: ContextParallel, mask: Mask, sizes: Sizes) -> list[Finding]:
    """Output and gradients of `plan.attention`, gathered, against one process: four findings.

    fp64: the largest difference. Other dtypes: the relative error (2-norm) against fp64, at most twice that of one
    device, or half a unit in the last place where a device is exact by luck.
    """
    start = time.perf_counter()
    tensors = list(_tensors(plan, sizes))
    exact = _with_gradients(lambda q, k, v: dense_attention(q, k, v, mask), *(x.double() for x in tensors))
    ours = _sharded(plan, mask, *tensors)
    if sizes.dtype == torch.float64:
        errors = [(a - e).abs().max().item() for a, e in zip(ours, exact, strict=True)]
        limits = [EXACT] * len(errors)
    else:
        single = _with_gradients(lambda q, k, v: single_device_attention(q, k, v, mask), *tensors)
        errors = [relative_error(a, e) for a, e in zip(ours, exact, strict=True)]
        rounding = max(FP32_ROUNDING, torch.finfo(sizes.dtype).eps / 2)
        limits = [max(2 * relative_error(s, e), rounding) for s, e in zip(single, exact, strict=True)]
    hints = {
        "out": "the method's forward in cptrain/context_parallel (hops, blocks, merge), and attention_kernel",
        "dq": "the method's backward in cptrain/context_parallel: blocks need the final out and lse",
        "dk": "how the method brings gradients of keys home (ring.py, exchange.py, all_gather.py)",
        "dv": "how the method brings gradients of values home (ring.py, exchange.py, all_gather.py)",
    }
    findings = [
        Finding(name=f"attention, {describe_mask(mask)}: {name}", error=error, allowed=limit, look_at=hint)
        for (name, hint), error, limit in zip(hints.items(), errors, limits, strict=True)
    ]
    return [replace(findings[0], seconds=time.perf_counter() - start), *findings[1:]]


def check_positions(plan: ContextParallel, length: int) -> Finding:
    """Whether `plan.shard` gives each rank the tokens that its attention takes them for, and `unshard` puts them back.

    The error is in tokens.
    """
    start = time.perf_counter()
    device = torch.device(plan.mesh.device_type)
    every = torch.arange(length, device=device)[None]
    mine, again = plan.shard(every, every, dim=1)
    spans = plan.ring_layout(length).spans(place(plan, "ring"))
    shard = torch.cat([torch.arange(span.start, span.start + span.length, device=device) for span in spans])
    expected = shard.view(plan.ulysses_degree, -1)[place(plan, "ulysses")]
    differences = (mine[0] - expected, again[0] - expected, (plan.unshard(mine, dim=1) - every)[0])
    return Finding(
        name="positions of each rank's tokens",
        error=max(difference.abs().max().item() for difference in differences),
        allowed=0,
        look_at="ContextParallel.shard and unshard against Layout.spans: tokens and attention must be cut alike",
        seconds=time.perf_counter() - start,
    )


def check_flow(plan: ContextParallel, mask: Mask, sizes: Sizes) -> list[Finding]:
    """Whether gradients of chosen queries reach every key that they see, and no other (exactly zero): two findings.

    Errors are numbers of tokens.
    """
    start = time.perf_counter()
    q, k, v, dout = _tensors(plan, sizes)
    seen = visible(mask, sizes.length, dout.device)
    missed = leaked = 0
    for chosen in probes(plan.ring_layout(sizes.length), dout.device):
        _, dq, dk, dv = _sharded(plan, mask, q, k, v, dout * chosen[:, None])
        reached = seen[chosen].any(0)
        missed += int((reached & (_strength(dv) == 0)).sum())
        leaked += int((~reached & (_strength(dk) + _strength(dv) != 0)).sum())
        leaked += int((~chosen & (_strength(dq) != 0)).sum())
    name = f"flow, {describe_mask(mask)}"
    return [
        Finding(
            name=f"{name}: tokens not reached",
            error=missed,
            allowed=0,
            look_at="hops that are not computed, or whose gradients are not sent back",
            seconds=time.perf_counter() - start,
        ),
        Finding(
            name=f"{name}: leaks",
            error=leaked,
            allowed=0,
            look_at="the mask: cptrain/context_parallel/schedule.py and what is_causal and window_size arrive as",
        ),
    ]


def probes(layout: Layout, device: torch.device) -> Iterator[torch.Tensor]:
    """Sets of tokens [length] bool whose loss is followed back.

    The last token of each rank, the very last one first, tells whether every rank sees all keys that it should. All
    tokens up to a seam of every even layout, and up to the middle of a chunk, tell whether any of them sees more.
    """
    tokens = torch.arange(layout.length, device=device)
    ends = sorted((layout.spans(rank)[-1] for rank in range(layout.num_ranks)), key=lambda span: -span.start)
    for span in ends[:: -(-len(ends) // MOST_ENDS)]:
        yield tokens == span.start + span.length - 1
    yield tokens < layout.length // 2
    yield tokens <= layout.length // 3


def small_length(multiple: int, *, at_least: int) -> int:
    """A sequence length to check with: two or more of `multiple`, so that no chunk is a single token."""
    return multiple * max(2, -(-at_least // multiple))


def scaled(mask: Mask, *, length: int, to: int) -> Mask:
    """The mask for `to` tokens that hides about as much as this one does of `length`: its window is scaled."""
    if not mask.window or length == to:
        return mask
    return replace(mask, window=max(min(2, mask.window), round(mask.window * to / length)))


def place(plan: ContextParallel, kind: str) -> int:
    """This rank's place on the plan's ring or ulysses axis; 0 where the plan does not use it."""
    axis, degree = (plan.ring, plan.ring_degree) if kind == "ring" else (plan.ulysses, plan.ulysses_degree)
    return plan.mesh.get_local_rank(axis) if axis and degree > 1 else 0


def describe_mask(mask: Mask) -> str:
    """ "causal", "full" or "window 1024"."""
    return f"window {mask.window}" if mask.window else "causal" if mask.causal else "full"


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The 2-norm of the difference over that of `exact`."""
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _tensors(plan: ContextParallel, sizes: Sizes) -> Iterator[torch.Tensor]:
    """Global q, k, v and the gradient of the output, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads):
        shape = (sizes.batch, heads, sizes.length, sizes.head_dim)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield values.to(plan.mesh.device_type, sizes.dtype)


def _with_gradients(attention, q, k, v, dout) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Output, dq, dk, dv; zeros for what the output does not depend on."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out = attention(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), dout, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def _sharded(
    plan: ContextParallel, mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> list[torch.Tensor]:
    """Output, dq, dk, dv of the plan's attention in global order, on every rank."""
    results = _with_gradients(
        lambda q, k, v: plan.attention(q, k, v, is_causal=mask.causal, window_size=mask.window or None),
        *plan.shard(q, k, v, dout, dim=SEQUENCE_DIM),
    )
    return [plan.unshard(x, dim=SEQUENCE_DIM) for x in results]


def _strength(x: torch.Tensor) -> torch.Tensor:
    """[length]: how much of x [B, H, length, D] there is at each token."""
    return x.abs().sum((0, 1, 3))
