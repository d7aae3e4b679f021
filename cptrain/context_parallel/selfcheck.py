"""Whether a plan computes exact attention here and now, on this mesh, device and version of torch.

Everything is compared with attention over the whole sequence in one process, written out densely in fp64. Sizes are
tiny, groups are the plan's own, random numbers come from a generator of their own, and nothing is kept.
All functions are collective over the ranks of the plan.

[Note: masks with documents]
The documents of a mask are those of a whole batch, its rows joined. So what is said here of tokens has the shape
[rows, length]: one row stands for all of a batch where there are no documents.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F

from cptrain.context_parallel.api import ContextParallel
from cptrain.context_parallel.finding import Finding
from cptrain.context_parallel.kernels import choose_kernel
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Documents, Mask
from cptrain.context_parallel.packed_batch import PackedBatch
from cptrain.context_parallel.packing import Moved, pack
from cptrain.context_parallel.refusals import HEAD_DIM, SEQUENCE_DIM
from cptrain.distributed.divide import divisors

EXACT = 1e-10  # largest difference allowed in fp64, of values of about 1
MOST_ENDS = 8  # ranks whose last token is followed back, where there are more
FP32_ROUNDING = 5e-7  # relative error that accumulators in fp32 may always have
Carried = Literal["", "ring", "exchange"]  # how keys of documents travel; "" where there is one way only


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
    return (
        torch.float64 if torch.float64 in choose_kernel(device.type, dtype, name=kernel, told=False).dtypes else dtype
    )


def visible(mask: Mask, length: int, device: torch.device) -> torch.Tensor:
    """[rows, length, length] bool: which key (last) each query (second) sees; see [Note: masks with documents]."""
    if not mask.causal:
        return torch.ones(1, length, length, dtype=torch.bool, device=device)
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = ((distance >= 0) & (distance < (mask.window or length)))[None]
    if mask.documents is None:
        return seen
    numbers = document_numbers(mask.documents).view(-1, length).to(device)
    return seen & (numbers[:, :, None] == numbers[:, None, :]) & (numbers >= 0)[:, :, None]


def document_numbers(documents: Documents) -> torch.Tensor:
    """[tokens of all rows] int64: the document that each token belongs to, -1 for padding."""
    starts = torch.tensor(documents.offsets)
    numbers = torch.arange(len(starts) - 1)
    numbers[list(documents.padding)] = -1
    return numbers.repeat_interleave(starts.diff())


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """Attention of the whole sequence with a dense mask, one kv head at a time: shares no code with what it checks.

    Padding, which sees nothing, gives 0.
    """
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    seen = visible(mask, q.size(SEQUENCE_DIM), q.device)[:, None]
    blind = ~seen.any(-1, keepdim=True)
    groups = q.unflatten(HEAD_DIM, (k.size(HEAD_DIM), -1))
    outs = []
    for head in range(k.size(HEAD_DIM)):
        keys, values = k[:, head, None], v[:, head, None]
        scores = (groups[:, head] @ keys.mT * scale).masked_fill(~(seen | blind), -math.inf)
        outs.append(scores.softmax(-1).masked_fill(blind, 0.0) @ values)
    return torch.cat(outs, HEAD_DIM)


def single_device_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """What `F.scaled_dot_product_attention` of this device makes of the whole sequence: the rounding to measure by."""
    if not mask.window and mask.documents is None:
        grouped = q.size(HEAD_DIM) != k.size(HEAD_DIM)
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, scale=scale, enable_gqa=grouped)
    # Few CUDA kernels take a dense mask, none of them grouped heads; what torch falls back to would round less.
    k, v = (x.repeat_interleave(q.size(HEAD_DIM) // x.size(HEAD_DIM), dim=HEAD_DIM) for x in (k, v))
    seen = visible(mask, q.size(SEQUENCE_DIM), q.device)[:, None]
    blind = ~seen.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | blind, scale=scale).masked_fill(blind, 0.0)


class Cut:
    """How a plan cuts a batch of `length` tokens a row under a mask: by its layout, or as it deals the documents.

    Documents, whose keys go round the ring or straight to their readers by what is cheaper, take the way that
    `carried` says: a plan must be right in both.
    layout: over the ring, of the sequence, or of all rows joined. rows: that differ; 1 without documents.
    name: what the mask is, as in "causal in 9 documents by ring".
    """

    def __init__(self, plan: ContextParallel, mask: Mask, length: int, carried: Carried = "") -> None:
        self.plan, self.mask, self.length = plan, mask, length
        self._batch = _packed(plan, mask, length, carried) if mask.documents is not None else None
        self.layout = self._batch.packing.layout if self._batch else plan.ring_layout(length)
        self.rows = self._batch.packing.num_rows if self._batch else 1
        self.name = describe_mask(mask) + (f" by {carried}" if carried else "")
        cuts = self._batch or plan
        self.shard, self.unshard = cuts.shard, cuts.unshard

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
        """Output, dq, dk, dv of the plan's attention in global order, on every rank."""
        causal, window = self.mask.causal, self.mask.window or None
        with self._batch or nullcontext():
            results = _with_gradients(
                lambda q, k, v: self.plan.attention(q, k, v, is_causal=causal, window_size=window),
                *self.shard(q, k, v, dout, dim=SEQUENCE_DIM),
            )
        return [self.unshard(x, dim=SEQUENCE_DIM) for x in results]


def cuts_of(plan: ContextParallel, mask: Mask, length: int, *, rows: int = 2) -> list[Cut]:
    """The ways in which a plan may cut a batch for a layer of this mask: one, or, of small documents, one or two."""
    if plan.layout != "balanced":
        return [Cut(plan, mask, length)]
    mask = replace(mask, documents=small_documents(length, ring_degree=plan.ring_degree, rows=rows))
    ways: tuple[Carried, ...] = ("ring", "exchange") if plan.ring_degree > 1 and plan.method != "all_gather" else ("",)
    return [Cut(plan, mask, length, carried) for carried in ways]


def small_documents(length: int, *, ring_degree: int, rows: int = 2) -> Documents:
    """Documents of a batch to check with, the same on every rank and different in each row.

    One is longer than a rank's share of a row, some are single tokens, some begin on the edge of a chunk; every second
    row ends in padding.
    """
    share = length // max(2, ring_degree)
    chunk = small_chunk_size(length, ring_degree)
    chance = random.Random(0)
    offsets: list[int] = []
    padding = []
    for row in range(rows):
        lengths = [1, share + 1, -(share + 2) % chunk] if row % 2 == 0 else [chance.randint(2, share), 1]
        while sum(lengths) < length:
            lengths.append(chance.randint(1, 2 * chunk))
        offsets += [row * length + cut for cut in sorted({0, *accumulate(lengths)}) if cut < length]
        if row % 2:
            padding.append(len(offsets) - 1)
    return Documents((*offsets, rows * length), tuple(padding))


def check_attention(cut: Cut, sizes: Sizes) -> list[Finding]:
    """Output and gradients of the plan's attention, gathered, against one process: four findings.

    fp64: the largest difference. Other dtypes: the relative error (2-norm) against fp64, at most twice that of one
    device, or half a unit in the last place where a device is exact by luck.
    """
    start = time.perf_counter()
    mask, tensors = cut.mask, list(_tensors(cut.plan, sizes))
    exact = _with_gradients(lambda q, k, v: dense_attention(q, k, v, mask), *(x.double() for x in tensors))
    ours = cut.attention(*tensors)
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
        Finding(name=f"attention, {cut.name}: {name}", error=error, allowed=limit, look_at=hint)
        for (name, hint), error, limit in zip(hints.items(), errors, limits, strict=True)
    ]
    return [replace(findings[0], seconds=time.perf_counter() - start), *findings[1:]]


def check_positions(cut: Cut) -> Finding:
    """Whether `shard` gives each rank the tokens that its attention takes them for, and `unshard` puts them back.

    The error is in tokens.
    """
    start = time.perf_counter()
    plan, device = cut.plan, torch.device(cut.plan.mesh.device_type)
    every = torch.arange(cut.layout.length, device=device).view(cut.rows, cut.length)
    mine, again = cut.shard(every, every, dim=1)
    spans = cut.layout.spans(plan.ring_rank)
    shard = torch.cat([torch.arange(span.start, span.start + span.length, device=device) for span in spans])
    expected = shard.view(cut.rows, plan.ulysses_degree, -1)[:, plan.ulysses_rank]
    differences = (mine - expected, again - expected, cut.unshard(mine, dim=1) - every)
    return Finding(
        name="positions of each rank's tokens",
        error=max(difference.abs().max().item() for difference in differences),
        allowed=0,
        look_at="shard and unshard of the plan or batch against Layout.spans: tokens and attention must be cut alike",
        seconds=time.perf_counter() - start,
    )


def check_flow(cut: Cut, sizes: Sizes) -> list[Finding]:
    """Whether gradients of chosen queries reach every key that they see, and no other (exactly zero): two findings.

    Errors are numbers of tokens.
    """
    start = time.perf_counter()
    q, k, v, dout = _tensors(cut.plan, sizes)
    seen = visible(cut.mask, sizes.length, dout.device)
    missed = leaked = 0
    for chosen in probes(cut.layout, dout.device, documents=cut.mask.documents, rows=cut.rows):
        _, dq, dk, dv = cut.attention(q, k, v, dout * chosen[:, None, :, None])
        reached = reach_of(chosen, seen)
        missed += int((reached & (_strength(dv) == 0)).sum())
        leaked += int((~reached & (_strength(dk) + _strength(dv) != 0)).sum())
        leaked += int((~chosen & (_strength(dq) != 0)).sum())
    name = f"flow, {cut.name}"
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
            look_at="the mask: cptrain/context_parallel/schedule.py, what is_causal and window_size arrive as, and "
            "the documents of the batch",
        ),
    ]


def reach_of(chosen: torch.Tensor, depends: torch.Tensor) -> torch.Tensor:
    """[rows, length] bool: the tokens that any of `chosen` [rows, length] depends on [rows, length, length]."""
    return (chosen[:, :, None] & depends).any(1)


def probes(
    layout: Layout, device: torch.device, *, documents: Documents | None = None, rows: int = 1
) -> Iterator[torch.Tensor]:
    """Sets of tokens [rows, length] bool whose loss is followed back; see [Note: masks with documents].

    The last token of each rank in each document, the very last one first, tells whether every rank sees all keys that
    it should. All tokens up to a seam of every even layout, and up to the middle of a chunk, tell whether any of them
    sees more; and every second document, whether one sees another.
    """
    documents = documents or Documents((0, layout.length))
    tokens = torch.arange(layout.length, device=device).view(rows, -1)
    lasts = []
    for rank in range(layout.num_ranks):
        held = documents.cut(layout.spans(rank)).values()
        lasts.append(sorted((parts[-1].start + parts[-1].length - 1 for parts in held), reverse=True))
    lasts.sort(reverse=True)
    for last in lasts[:: -(-len(lasts) // MOST_ENDS)]:
        yield torch.isin(tokens, torch.tensor(last, device=device))
    length = tokens.size(1)
    yield tokens % length < length // 2
    yield tokens % length <= length // 3
    if len(documents.offsets) > 2:
        yield document_numbers(documents).view(rows, -1).to(device) % 2 == 0


def small_chunk_size(length: int, ring_degree: int) -> int:
    """Tokens of a chunk to check with: a few make up a rank's share of a row."""
    share = length // ring_degree
    return max(size for size in divisors(share) if size <= max(1, share // 4))


def small_length(multiple: int, *, at_least: int) -> int:
    """A sequence length to check with: two or more of `multiple`, so that no chunk is a single token."""
    return multiple * max(2, -(-at_least // multiple))


def scaled(mask: Mask, *, length: int, to: int) -> Mask:
    """The mask for `to` tokens that hides about as much as this one does of `length`: its window is scaled."""
    if not mask.window or length == to:
        return mask
    return replace(mask, window=max(min(2, mask.window), round(mask.window * to / length)))


def describe_mask(mask: Mask) -> str:
    """ "causal", "full" or "window 1024"; with documents as in "causal in 9 documents"."""
    name = f"window {mask.window}" if mask.window else "causal" if mask.causal else "full"
    return name if mask.documents is None else f"{name} in {len(list(mask.documents.spans()))} documents"


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


def _packed(plan: ContextParallel, mask: Mask, length: int, carried: Carried) -> PackedBatch:
    """A batch of the documents of the mask in chunks that fit its few tokens, whatever those of the plan are."""
    assert mask.documents is not None
    packing = pack(
        mask.documents,
        num_ranks=plan.ring_degree,
        num_rows=mask.documents.length // length,
        chunk_size=small_chunk_size(length, plan.ring_degree),
        windows=(mask.window,),
        inner_degree=plan.ring_inner_degree,
    )
    if carried:
        # What the choice is made by: as if nothing had to travel, or more than a ring would send.
        moved = 0 if carried == "exchange" else plan.ring_degree * packing.layout.length
        packing = replace(packing, moved=(Moved(mask.window, moved, moved),))
    # Nothing in it could have been read differently: the plan's comparisons are left to batches that were read.
    return replace(plan.packed(packing.encode()), compares=False)


def _strength(x: torch.Tensor) -> torch.Tensor:
    """[B, length]: how much of x [B, H, length, D] there is at each token."""
    return x.abs().sum((1, 3))
