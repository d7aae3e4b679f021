"""`ContextParallel`, the plan that users hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cptrain.context_parallel import dispatch
from cptrain.context_parallel.layout import LAYOUTS, Layout, length_multiple, make_layout, nearest_multiples
from cptrain.context_parallel.ring import ring_attention
from cptrain.context_parallel.ulysses import heads_to_sequence, replicate_kv_heads, sequence_to_heads
from cptrain.distributed.settings import valid_ulysses_degrees
from cptrain.distributed.transport import warm_up

Method = Literal["auto", "ring", "ulysses", "hybrid"]
SEQUENCE_DIM = 2  # of q, k, v [B, H, T, D]
HEAD_DIM = 1


@dataclass(frozen=True)
class ContextParallel:
    """One sequence over the ranks of a mesh: how it is cut, and exact attention over the cuts. Holds no tensors.

    mesh: a DeviceMesh that has the axes named by `ring` and `ulysses`; an axis of None, or of size 1, is not used. The
    sequence is cut over ring x ulysses, ring outermost. Making a plan is collective over the ranks of these axes.
    method: "ring", "ulysses" or "hybrid" assert what the degrees amount to; "auto" takes what they are.
    layout: "zigzag" (even work under a causal mask) or "contiguous", over the ring axis.
    Raises ValueError for an axis the mesh does not have or named twice, and for a method that the degrees contradict.
    """

    mesh: DeviceMesh
    ring: str | None = "ring"
    ulysses: str | None = "ulysses"
    method: Method = "auto"
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    ring_degree: int = field(init=False)
    ulysses_degree: int = field(init=False)
    _axes: tuple[str, ...] = field(init=False, repr=False)
    _kv_group: str = field(init=False, repr=False)
    _grad_group: str = field(init=False, repr=False)
    _heads_group: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = self.mesh.mesh_dim_names or ()
        for key in ("ring", "ulysses"):
            axis = getattr(self, key)
            if axis is not None and axis not in names:
                raise ValueError(f'{key} = "{axis}": the mesh has the axes {", ".join(names) or "without names"}')
        if self.ring is not None and self.ring == self.ulysses:
            raise ValueError(
                f'ring and ulysses are both "{self.ring}": one axis cuts the sequence once; set one to None'
            )
        if self.method not in get_args(Method):
            raise ValueError(f'method = "{self.method}": must be one of {", ".join(get_args(Method))}')
        if self.layout not in LAYOUTS:
            raise ValueError(f'layout = "{self.layout}": must be one of {", ".join(LAYOUTS)}')
        ring, ulysses = self._size(self.ring), self._size(self.ulysses)
        actual = {(True, True): "hybrid", (True, False): "ring", (False, True): "ulysses"}.get(
            (ring > 1, ulysses > 1), self.method
        )
        if self.method not in ("auto", actual):
            raise ValueError(
                f'method = "{self.method}": ring degree {ring} and ulysses degree {ulysses} make "{actual}"'
            )
        derived: dict[str, Any] = {
            "method": actual,
            "ring_degree": ring,
            "ulysses_degree": ulysses,
            "_axes": tuple(axis for axis, size in ((self.ring, ring), (self.ulysses, ulysses)) if axis and size > 1),
            "_kv_group": "",
            "_grad_group": "",
            "_heads_group": "",
        }
        device = torch.device(self.mesh.device_type)
        if ring > 1 and self.ring:
            kv_group = self.mesh.get_group(self.ring)
            # Key gradients never queue behind keys; only the ranks of one ring take part in making the group.
            grad_group = dist.new_group(dist.get_process_group_ranks(kv_group), use_local_synchronization=True)
            warm_up(kv_group, device)
            warm_up(grad_group, device)
            derived.update(_kv_group=kv_group.group_name, _grad_group=grad_group.group_name)
        if ulysses > 1 and self.ulysses:
            heads_group = self.mesh.get_group(self.ulysses)
            warm_up(heads_group, device)
            derived["_heads_group"] = heads_group.group_name
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def degree(self) -> int:
        """Ranks that share one sequence."""
        return self.ring_degree * self.ulysses_degree

    def shard(self, *tensors: torch.Tensor, dim: int = 1, as_dtensor: bool = False) -> Any:
        """This rank's part of each global tensor, all cut along `dim` by the same permutation; one tensor, or a tuple.

        The length along `dim` must be one for all, a multiple of ring x ulysses and, for zigzag, of 2 x ring; else
        ValueError. With as_dtensor=True the parts come as DTensors of the whole permuted sequence, Shard(dim) on each
        axis of the plan.
        """
        if len({x.size(dim) for x in tensors}) > 1:
            raise ValueError(f"lengths {[x.size(dim) for x in tensors]} along dim {dim}: they must be one sequence")
        parts = []
        for x in tensors:
            index = self._indices(x.size(dim)).to(x.device)
            part = x.index_select(dim, index)
            parts.append(self._as_dtensor(part, dim) if as_dtensor else part)
        return parts[0] if len(parts) == 1 else tuple(parts)

    def unshard(self, x: torch.Tensor, *, dim: int) -> torch.Tensor:
        """The global tensor in global order, on every rank: the inverse of `shard`. Differentiable."""
        if not self._axes:
            return x.full_tensor() if isinstance(x, DTensor) else x
        whole = (x if isinstance(x, DTensor) else self._as_dtensor(x, dim)).full_tensor()
        return whole.index_select(dim, self._layout(whole.size(dim)).inverse().to(whole.device))

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, scale: float | None = None
    ) -> torch.Tensor:
        """Exact attention over the whole sequence for this rank's queries. Differentiable.

        Shapes: q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, Dv] local shards -> [B, H, T, Dv]; H a multiple of Hk, kv
        heads need not be expanded. scale: of the scores, by default 1 / sqrt(D). DTensors come back as DTensors: they
        must be Shard(2) on the axes of the plan, and may be Shard(1) (heads) or Shard(0) (batch) on others.
        Raises ValueError for shapes that do not fit each other or the degrees.
        """
        if isinstance(q, DTensor) or isinstance(k, DTensor) or isinstance(v, DTensor):
            return self._dtensor_attention(q, k, v, is_causal=is_causal, scale=scale)
        self._check_shapes(q, k, v)
        if self.ulysses_degree > 1:
            k, v = (replicate_kv_heads(x, self.ulysses_degree) for x in (k, v))
            q, k, v = (sequence_to_heads(x, self._heads_group) for x in (q, k, v))
        scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
        out, _, _ = ring_attention(q, k, v, self.layout, is_causal, scale, self._kv_group, self._grad_group)
        return heads_to_sequence(out, self._heads_group) if self.ulysses_degree > 1 else out

    def apply(self, model: nn.Module, *, modules: str) -> list[str]:
        """Make `F.scaled_dot_product_attention` inside the modules that match (`"*.attention"`) context parallel.

        Returns their names. Raises ValueError when the pattern matches nothing; see `dispatch.apply`.
        """
        return dispatch.apply(model, modules=modules, attention=self.attention)

    def describe(self) -> str:
        """One line: method, degrees and layout."""
        if self.degree == 1:
            return "no context parallelism (one rank holds the whole sequence)"
        hops = f", {self.ring_degree - 1} hops" if self.ring_degree > 1 else ""
        layout = f", {self.layout}" if self.ring_degree > 1 else ""
        return f"{self.method} (ring {self.ring_degree} x ulysses {self.ulysses_degree}{layout}{hops})"

    def _size(self, axis: str | None) -> int:
        return self.mesh.size((self.mesh.mesh_dim_names or ()).index(axis)) if axis else 1

    def _layout(self, length: int) -> Layout:
        """How the ring cuts a sequence of `length`; each shard is then cut evenly by ulysses."""
        return make_layout(self.layout, self.ring_degree, length)

    def _indices(self, length: int) -> torch.Tensor:
        """Global positions of this rank's tokens, in local order."""
        multiple = math.lcm(length_multiple(self.layout, self.ring_degree), self.degree)
        if length % multiple or length == 0:
            raise ValueError(
                f"a sequence of {length} tokens does not divide over ring {self.ring_degree} x ulysses "
                f"{self.ulysses_degree} ({self.layout}): it must be a multiple of {multiple}; "
                f"try {nearest_multiples(length, multiple)}"
            )
        rank = 0
        for axis in self._axes:
            rank = rank * self._size(axis) + self.mesh.get_local_rank(axis)
        each = length // self.degree
        return self._layout(length).permutation()[rank * each : (rank + 1) * each]

    def _as_dtensor(self, part: torch.Tensor, dim: int) -> DTensor:
        if not self._axes:
            return DTensor.from_local(part, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return DTensor.from_local(part, self.mesh[self._axes], [Shard(dim)] * len(self._axes), run_check=False)

    def _check_shapes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if {q.ndim, k.ndim, v.ndim} != {4}:
            raise ValueError(f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dims; they must be [B, H, T, D]")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype")
        heads, kv_heads = q.size(HEAD_DIM), k.size(HEAD_DIM)
        if k.shape[:3] != v.shape[:3] or q.size(0) != k.size(0) or q.size(-1) != k.size(-1):
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
        if q.size(SEQUENCE_DIM) != k.size(SEQUENCE_DIM):
            raise NotImplementedError(
                f"{q.size(SEQUENCE_DIM)} query and {k.size(SEQUENCE_DIM)} key tokens per rank: only self-attention is "
                "context parallel; give queries and keys the same sharding"
            )
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
        valid = valid_ulysses_degrees(heads, kv_heads)
        if self.ulysses_degree not in valid:
            raise ValueError(
                f"ulysses degree {self.ulysses_degree}: {heads} heads and {kv_heads} kv heads on this rank allow "
                f"{', '.join(map(str, valid))}; or give the rest to the ring"
            )

    def _dtensor_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, scale: float | None
    ) -> torch.Tensor:
        """`attention` for DTensors: placements are checked against the plan, the work is on local tensors."""
        local = []
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, DTensor):
                raise ValueError(
                    f"{name} is a plain tensor while another of q, k, v is a DTensor; make all of them one kind"
                )
            axes = x.device_mesh.mesh_dim_names or ()
            missing = [axis for axis in self._axes if axis not in axes]
            if missing:
                raise ValueError(
                    f"{name} is a DTensor on the axes {axes}; the sequence is cut over {', '.join(missing)}"
                )
            for axis, placement in zip(axes, x.placements, strict=True):
                allowed = [Shard(SEQUENCE_DIM)] if axis in self._axes else [Replicate(), Shard(0), Shard(HEAD_DIM)]
                if placement not in allowed:
                    raise ValueError(
                        f"{name} is {placement} on {axis}; needed is {' or '.join(map(str, allowed))}: redistribute it"
                    )
            local.append(x.to_local())
        assert isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)
        # Local head groups would pair the wrong heads if queries were cut and keys were not.
        if not (q.device_mesh == k.device_mesh == v.device_mesh and q.placements == k.placements == v.placements):
            raise ValueError(
                f"q, k, v are {q.placements}, {k.placements}, {v.placements} on axes {q.device_mesh.mesh_dim_names}; "
                "they must be cut alike: redistribute them"
            )
        out = self.attention(*local, is_causal=is_causal, scale=scale)
        return DTensor.from_local(out, q.device_mesh, q.placements, run_check=False)
