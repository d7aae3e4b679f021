"""What a plan, and attention under one, refuse by name: each with the value, the rule and a way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.distributed.tensor import DTensor, Replicate, Shard

from cptrain.context_parallel.kernels import KERNELS
from cptrain.context_parallel.layout import LAYOUTS
from cptrain.distributed.settings import divisors, valid_ulysses_degrees

if TYPE_CHECKING:
    from cptrain.context_parallel.api import ContextParallel

SEQUENCE_DIM = 2  # of q, k, v [B, H, T, D]
HEAD_DIM = 1
OUTSIDE = (
    'attention of a plan with layout="balanced" outside of a batch: forward and backward (which may recompute) belong '
    "inside of `with cp.pack(document_ids) as batch:`"
)


def check_plan(plan: ContextParallel, ring: int, ulysses: int) -> None:
    """ValueError for what the fields of a plan, or its degrees, contradict."""
    if plan.ring is not None and plan.ring == plan.ulysses:
        raise ValueError(f'ring and ulysses are both "{plan.ring}": one axis cuts the sequence once; set one to None')
    if plan.layout not in (*LAYOUTS, "balanced"):
        raise ValueError(f'layout = "{plan.layout}": must be one of {", ".join((*LAYOUTS, "balanced"))}')
    if plan.chunk_size != "auto" and plan.chunk_size < 1:
        raise ValueError(f'chunk_size = {plan.chunk_size}: must be a number of tokens, or "auto"')
    names = ["auto", *(kernel.name for kernel in KERNELS)]
    if plan.kernel not in names:
        raise ValueError(f'kernel = "{plan.kernel}": must be one of {", ".join(names)}')
    possible = {
        "auto": True,
        "ring": ulysses == 1,
        "all_gather": ulysses == 1,
        "ulysses": ring == 1,
        "hybrid": (ring > 1) == (ulysses > 1),
    }
    if plan.method not in possible:
        raise ValueError(f'method = "{plan.method}": must be one of {", ".join(possible)}')
    if not possible[plan.method]:
        fitting = [name for name, fits in possible.items() if fits]
        raise ValueError(
            f'method = "{plan.method}": ring degree {ring} and ulysses degree {ulysses} allow {", ".join(fitting)}'
        )
    if plan.ring_inner_degree not in divisors(ring):
        raise ValueError(
            f"ring_inner_degree = {plan.ring_inner_degree}: a ring of {ring} allows "
            f"{', '.join(map(str, divisors(ring)))}"
        )


def check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool,
    window_size: int | None,
    scale: float | None,
    ulysses_degree: int,
) -> None:
    """ValueError for local tensors that do not fit each other, the mask or the degree.

    NotImplementedError for tangents of forward-mode differentiation, which an operator without a rule for them drops.
    """
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise NotImplementedError(
            "forward-mode differentiation (torch.func.jvp) is not supported under context parallelism: take backward()"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale = {scale}: must be above 0; causal kernels give NaN for others")
    if {q.ndim, k.ndim, v.ndim} != {4}:
        raise ValueError(f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dims; they must be [B, H, T, D]")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype")
    heads, kv_heads = q.size(HEAD_DIM), k.size(HEAD_DIM)
    if k.shape[:3] != v.shape[:3] or q.size(0) != k.size(0) or q.size(-1) != k.size(-1):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if is_causal and q.size(SEQUENCE_DIM) != k.size(SEQUENCE_DIM):
        raise ValueError(
            f"{q.size(SEQUENCE_DIM)} query and {k.size(SEQUENCE_DIM)} key tokens per rank: a causal mask needs as "
            "many keys as queries; use is_causal=False for cross-attention"
        )
    if window_size is not None and (window_size < 1 or not is_causal):
        raise ValueError(f"window_size = {window_size}: must be at least 1, with is_causal=True; or leave it out")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
    valid = valid_ulysses_degrees(heads, kv_heads)
    if ulysses_degree not in valid:
        raise ValueError(
            f"ulysses degree {ulysses_degree}: {heads} heads and {kv_heads} kv heads on this rank allow "
            f"{', '.join(map(str, valid))}; or give the rest to the ring"
        )


def check_entered(shape: tuple[int, int], q: torch.Tensor, *, is_causal: bool, degree: int) -> None:
    """RuntimeError or ValueError unless q is of the batch that was entered, of `shape` (rows, tokens of a row).

    Without this, tokens would silently see other documents, or keys that lie elsewhere.
    """
    rows, length = shape
    if not rows:
        raise RuntimeError(OUTSIDE)
    if not is_causal:
        raise NotImplementedError(
            "is_causal=False inside of packed documents is not supported: attention there is causal"
        )
    if (q.size(0), q.size(SEQUENCE_DIM) * degree) != (rows, length):
        raise ValueError(
            f"q {tuple(q.shape)} on {degree} ranks is not the batch that was entered, of {rows} rows and "
            f"{length} tokens"
        )


def check_placements(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, axes: tuple[str, ...]
) -> tuple[DTensor, DTensor, DTensor]:
    """The same tensors; ValueError unless they are DTensors cut alike, along the sequence over `axes` of the plan."""
    found = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise ValueError(
                f"{name} is a plain tensor while another of q, k, v is a DTensor; make all of them one kind"
            )
        theirs = x.device_mesh.mesh_dim_names or ()
        missing = [axis for axis in axes if axis not in theirs]
        if missing:
            raise ValueError(f"{name} is a DTensor on the axes {theirs}; the sequence is cut over {', '.join(missing)}")
        for axis, placement in zip(theirs, x.placements, strict=True):
            allowed = [Shard(SEQUENCE_DIM)] if axis in axes else [Replicate(), Shard(0), Shard(HEAD_DIM)]
            if placement not in allowed:
                raise ValueError(
                    f"{name} is {placement} on {axis}; needed is {' or '.join(map(str, allowed))}: redistribute it"
                )
        found.append(x)
    query, key, value = found
    # Local head groups would pair the wrong heads if queries were cut and keys were not.
    if not (
        query.device_mesh == key.device_mesh == value.device_mesh
        and query.placements == key.placements == value.placements
    ):
        raise ValueError(
            f"q, k, v are {query.placements}, {key.placements}, {value.placements} on axes "
            f"{query.device_mesh.mesh_dim_names}; they must be cut alike: redistribute them"
        )
    return query, key, value
