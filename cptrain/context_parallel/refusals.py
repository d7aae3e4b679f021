"""What a plan, and attention under one, refuse by name: each with the value, the rule and a way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.distributed import get_process_group_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cptrain.context_parallel.kernels import KERNELS
from cptrain.context_parallel.layout import LAYOUTS
from cptrain.distributed.divide import divisors, valid_ulysses_degrees

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
    if plan.chunk_size != "auto" and (not isinstance(plan.chunk_size, int) or plan.chunk_size < 1):
        raise ValueError(f'chunk_size = {plan.chunk_size!r}: must be a number of tokens, or "auto"')
    if plan.chunk_size != "auto" and plan.layout != "balanced":
        raise ValueError(
            f'chunk_size = {plan.chunk_size}: layout = "{plan.layout}" deals no chunks; leave it out, or set layout to '
            '"balanced"'
        )
    check_method(plan.method, ring, ulysses)
    names = ["auto", *(kernel.name for kernel in KERNELS)]
    if plan.kernel not in names:
        raise ValueError(f'kernel = "{plan.kernel}": must be one of {", ".join(names)}')
    if plan.ring_inner_degree not in divisors(ring):
        raise ValueError(
            f"ring_inner_degree = {plan.ring_inner_degree!r}: a ring of {ring} allows "
            f"{', '.join(map(str, divisors(ring)))}"
        )
    if plan.ring_inner_degree > 1 and plan.method == "all_gather":
        raise ValueError(
            f'ring_inner_degree = {plan.ring_inner_degree}: method = "all_gather" has no ring; leave it out, or set '
            'method to "ring"'
        )


def check_mesh(mesh: object) -> None:
    """ValueError for what is no mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(
            f"mesh = {mesh!r}: must be a DeviceMesh, as torch.distributed.device_mesh.init_device_mesh makes it"
        )


def check_method(method: str, ring: int, ulysses: int) -> None:
    """ValueError for a method that is not what the degrees amount to."""
    possible = {
        "auto": True,
        "ring": ulysses == 1,
        "all_gather": ulysses == 1,
        "ulysses": ring == 1,
        "hybrid": (ring > 1) == (ulysses > 1),
    }
    if method not in possible:
        raise ValueError(f'method = "{method}": must be one of {", ".join(possible)}')
    if not possible[method]:
        fitting = [name for name, fits in possible.items() if fits]
        raise ValueError(
            f'method = "{method}": ring degree {ring} and ulysses degree {ulysses} allow {", ".join(fitting)}'
        )


def check_whole(tensors: Sequence[torch.Tensor]) -> None:
    """ValueError for DTensors, which are cut already, or look so."""
    if any(isinstance(x, DTensor) for x in tensors):
        raise ValueError("shard takes whole, plain tensors: hand over x.full_tensor() of a DTensor")


def check_window(window_size: int | None) -> None:
    """ValueError for what is no number of tokens."""
    if window_size is not None and (not isinstance(window_size, int) or isinstance(window_size, bool)):
        raise ValueError(f"window_size = {window_size!r}: must be a whole number of tokens, or None")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size = {window_size}: must be at least 1; or leave it out")


def check_heads(heads: int, kv_heads: int, ulysses_degree: int) -> None:
    """ValueError for numbers of heads that do not fit each other or the degree."""
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"{heads} query heads and {kv_heads} kv heads: there must be at least 1 of each")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
    valid = valid_ulysses_degrees(heads, kv_heads)
    if ulysses_degree not in valid:
        raise ValueError(
            f"ulysses degree {ulysses_degree}: {heads} heads and {kv_heads} kv heads on this rank allow "
            f"{', '.join(map(str, valid))}; or give the rest to the ring"
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
    if not q.size(-1) or not v.size(-1):
        raise ValueError(f"q {tuple(q.shape)}, v {tuple(v.shape)}: heads have no elements")
    heads, kv_heads = q.size(HEAD_DIM), k.size(HEAD_DIM)
    if k.shape[:3] != v.shape[:3] or q.size(0) != k.size(0) or q.size(-1) != k.size(-1):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if is_causal and q.size(SEQUENCE_DIM) != k.size(SEQUENCE_DIM):
        raise ValueError(
            f"{q.size(SEQUENCE_DIM)} query and {k.size(SEQUENCE_DIM)} key tokens per rank: a causal mask needs as "
            "many keys as queries; use is_causal=False for cross-attention"
        )
    check_window(window_size)
    if window_size is not None and not is_causal:
        raise ValueError(f"window_size = {window_size}: needs is_causal=True; or leave it out")
    check_heads(heads, kv_heads, ulysses_degree)


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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mesh: DeviceMesh, axes: tuple[str, ...]
) -> tuple[DTensor, DTensor, DTensor]:
    """The same tensors; ValueError unless they are DTensors cut alike, along the sequence over `axes` of the plan.

    mesh: of the plan. Axes of one rank cut nothing, whatever the placement says.
    """
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
        for axis, size, placement in zip(theirs, x.device_mesh.shape, x.placements, strict=True):
            allowed = [Shard(SEQUENCE_DIM)] if axis in axes else [Replicate(), Shard(0), Shard(HEAD_DIM)]
            if size > 1 and placement not in allowed:
                raise ValueError(
                    f"{name} is {placement} on {axis}; needed is {' or '.join(map(str, allowed))}: redistribute it"
                )
        found.append(x)
    query, key, value = found
    # Local head groups would pair the wrong heads if queries were cut and keys were not.
    cuts = [
        [placement for size, placement in zip(x.device_mesh.shape, x.placements, strict=True) if size > 1]
        for x in found
    ]
    if not (query.device_mesh == key.device_mesh == value.device_mesh and cuts[0] == cuts[1] == cuts[2]):
        raise ValueError(
            f"q, k, v are {query.placements}, {key.placements}, {value.placements} on axes "
            f"{query.device_mesh.mesh_dim_names}; they must be cut alike: redistribute them"
        )
    if query.device_mesh == mesh:
        return query, key, value
    for axis in axes:
        (ranks, there), (ours, here) = _place(query.device_mesh, axis), _place(mesh, axis)
        if (ranks, there) != (ours, here):
            raise ValueError(
                f"q, k, v are DTensors on a mesh whose {axis} has the ranks {ranks}, this one at {there}; in the plan "
                f"it has {ours}, this one at {here}: cut them with this plan's shard, or distribute them on its mesh"
            )
    return query, key, value


def _place(mesh: DeviceMesh, axis: str) -> tuple[list[int], int]:
    """The ranks with which this one shares an axis, and its place in their order."""
    # Not from the tensor of a mesh, which takes a fifth of a millisecond to look into; a group has its ranks sorted.
    dim, coordinate = (mesh.mesh_dim_names or ()).index(axis), mesh.get_coordinate()
    return ([], -1) if coordinate is None else (get_process_group_ranks(mesh.get_group(axis)), coordinate[dim])
