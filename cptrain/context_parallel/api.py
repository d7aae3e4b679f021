"""`ContextParallel`, the plan that users hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cptrain.context_parallel import description, dispatch, huggingface
from cptrain.context_parallel.attention import Route
from cptrain.context_parallel.attention import attention as attention_operator
from cptrain.context_parallel.groups import Groups, make_groups
from cptrain.context_parallel.layout import Layout, length_multiple, make_layout, nearest_multiples
from cptrain.context_parallel.memory_order import arranged
from cptrain.context_parallel.packed_batch import Entered, PackedBatch, rows_joined, rows_split
from cptrain.context_parallel.packing import Packer, decode, find_documents, join_offsets
from cptrain.context_parallel.refusals import (
    OUTSIDE,
    check_entered,
    check_heads,
    check_mesh,
    check_method,
    check_placements,
    check_plan,
    check_tensors,
    check_whole,
    check_window,
)
from cptrain.context_parallel.regroup import regrouped_mesh
from cptrain.context_parallel.traffic import Call
from cptrain.context_parallel.ulysses import heads_to_sequence, replicate_kv_heads, sequence_to_heads
from cptrain.distributed.sending import send
from cptrain.distributed.transport import warm_up

Method = Literal["auto", "ring", "ulysses", "hybrid", "all_gather"]


@dataclass(frozen=True)
class ContextParallel:
    """One sequence over the ranks of a mesh: how it is cut, and exact attention over the cuts. Holds no tensors.

    mesh: a DeviceMesh that has the axes named by `ring` and `ulysses`; an axis of None, or of size 1, is not used. The
    sequence is cut over the ring, and each of its shards over ulysses. Making a plan is collective over these ranks.
    method: "ring", "ulysses" and "hybrid" assert what the degrees amount to; "auto" takes what they are; "all_gather"
    gathers keys over the ring axis instead of passing them on.
    layout: over the ring axis, "zigzag" (even work under a causal mask), "contiguous", or "balanced" for packed
    documents, whose chunks are dealt anew for every batch: such a plan works on what `pack` returns, on nothing else.
    chunk_size: tokens of a chunk that "balanced" deals, a divisor of the tokens of a ring's rank; or "auto".
    ring_inner_degree: ranks of an inner ring (double ring), a divisor of the ring degree; 1 is a single ring.
    kernel: name of an attention kernel (see `kernels.KERNELS`), or "auto" for the fastest that fits the tensors.
    overlap: messages travel while blocks are computed; False waits for each, to measure what overlapping is worth.
    Raises ValueError for an axis the mesh does not have and for what the degrees contradict.
    """

    mesh: DeviceMesh
    ring: str | None = "ring"
    ulysses: str | None = "ulysses"
    method: Method = "auto"
    layout: Literal["zigzag", "contiguous", "balanced"] = "zigzag"
    chunk_size: int | Literal["auto"] = "auto"
    ring_inner_degree: int = 1
    overlap: bool = True
    kernel: str = "auto"
    ring_degree: int = field(init=False)
    ulysses_degree: int = field(init=False)
    _axes: tuple[str, ...] = field(init=False, repr=False)
    _groups: Groups = field(init=False, repr=False)
    _heads_group: str = field(init=False, repr=False)
    _route: str = field(init=False, repr=False)
    _exchange_route: str = field(init=False, repr=False)
    _entered: Entered = field(init=False, repr=False, compare=False)
    _applied: WeakKeyDictionary[nn.Module, str] = field(init=False, repr=False, compare=False)  # name by module
    _family: dict[tuple[Any, ...], ContextParallel] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        ring, ulysses = self._size("ring"), self._size("ulysses")
        check_plan(self, ring, ulysses)
        if self.method == "auto":
            kinds = {(True, True): "hybrid", (True, False): "ring", (False, True): "ulysses", (False, False): "auto"}
            self._set("method", kinds[ring > 1, ulysses > 1])
        self._set("ring_degree", ring)
        self._set("ulysses_degree", ulysses)
        used = [axis for axis, size in ((self.ring, ring), (self.ulysses, ulysses)) if axis and size > 1]
        self._set("_axes", tuple(axis for axis in self.mesh.mesh_dim_names or () if axis in used))
        device = torch.device(self.mesh.device_type)
        groups, heads_group = Groups(), ""
        if ring > 1 and self.ring:
            groups = make_groups(self.mesh.get_group(self.ring), self.ring_inner_degree, device)
        if ulysses > 1 and self.ulysses:
            warm_up(self.mesh.get_group(self.ulysses), device)
            heads_group = self.mesh.get_group(self.ulysses).group_name
        self._set("_groups", groups)
        self._set("_heads_group", heads_group)
        carried_by = "all_gather" if self.method == "all_gather" else "ring"
        self._set("_applied", WeakKeyDictionary())
        self._set("_family", {})
        self._set("_entered", Entered())
        route = Route(carried_by, ring, self.layout, self.overlap, self.kernel, groups)
        self._set("_route", route.encode())
        self._set("_exchange_route", replace(route, method="exchange").encode())

    @property
    def degree(self) -> int:
        """Ranks that share one sequence."""
        return self.ring_degree * self.ulysses_degree

    @property
    def ring_rank(self) -> int:
        """This rank's place on the ring; 0 where the plan has none."""
        return self.mesh.get_local_rank(self.ring) if self.ring in self._axes else 0

    @property
    def ulysses_rank(self) -> int:
        """This rank's place on the ulysses axis; 0 where the plan has none."""
        return self.mesh.get_local_rank(self.ulysses) if self.ulysses in self._axes else 0

    def shard(self, *tensors: torch.Tensor, dim: int = 1, as_dtensor: bool = False) -> Any:
        """This rank's part of each global tensor, all cut along `dim` by the same permutation; one tensor, or a tuple.

        The length along `dim` must be one for all, a multiple of ring x ulysses and, for zigzag, of 2 x ring; else, and
        for DTensors, ValueError. With as_dtensor=True the parts come as DTensors of the whole permuted sequence,
        Shard(dim) on each axis of the plan.
        """
        if len({x.size(dim) for x in tensors}) > 1:
            raise ValueError(f"lengths {[x.size(dim) for x in tensors]} along dim {dim}: they must be one sequence")
        self._refuse_balanced("shard", "pack(document_ids).shard")
        check_whole(tensors)
        parts = []
        for x in tensors:
            part = x.index_select(dim, send(self._pieces(x.size(dim))[self._place()], x.device))
            parts.append(self._as_dtensor(part, dim) if as_dtensor else part)
        return parts[0] if len(parts) == 1 else tuple(parts)

    def unshard(self, x: torch.Tensor, *, dim: int) -> torch.Tensor:
        """The global tensor in global order, on every rank: the inverse of `shard`.

        Differentiable where all ranks go on alike with what they get: the gradient of a part is that on its own rank.
        """
        self._refuse_balanced("unshard", "pack(document_ids).unshard")
        whole = self._gathered(x, dim)
        order = torch.argsort(self._pieces(whole.size(dim)).flatten())
        return whole.index_select(dim, send(order, whole.device))

    def pack(
        self,
        document_ids: torch.Tensor | None = None,
        *,
        offsets: Sequence[Sequence[int]] | None = None,
        windows: Sequence[int] | None = None,
    ) -> PackedBatch:
        """A batch of packed documents, whose tokens see only their own: cuts its tensors, and is entered for attention.

        Either document_ids [B, S], equal within a document and negative for padding (an id per token, on any device,
        the same on all ranks; an id that comes back after another begins a new document), or the offsets of every row's
        documents, rising from 0 to S.

            batch = cp.pack(document_ids)
            tokens, labels, positions = batch.shard(tokens, labels, positions)
            with batch:
                loss = model(tokens, positions) ...
                loss.backward()

        windows: the sliding windows of the layers, 0 for those without one; by default those of the modules that the
        plan was applied to. Work is even for the layers that see most, and keys travel by what each kind sees. Planning
        takes milliseconds of the host; a `packer` does it elsewhere, in a data loader, and `packed` takes the result.
        Raises ValueError for a plan that is not laid out "balanced", and for documents that do not fit it.
        """
        self._check_balanced()
        if document_ids is not None and offsets is None:
            documents, num_rows = find_documents(document_ids), document_ids.size(0)
        elif offsets is not None and document_ids is None:
            documents, num_rows = join_offsets(offsets), len(offsets)
        else:
            raise ValueError("give either document_ids or offsets")
        self._check_length(documents.length // num_rows)
        return self.packed(self.packer(windows)(documents, num_rows).encode())

    def packer(self, windows: Sequence[int] | None = None) -> Packer:
        """What packs batches for this plan where they are built, ahead of the step; see `pack` and `packed`.

        Raises ValueError for windows below 0.
        """
        windows = tuple(sorted({window for _, window in self._served()} if windows is None else set(windows))) or (0,)
        if windows[0] < 0:
            raise ValueError(f"windows = {windows}: each must be at least 1 token, or 0 for layers without one")
        return Packer(self.ring_degree, self.ring_inner_degree, self.chunk_size, windows)

    def packed(self, encoded: torch.Tensor) -> PackedBatch:
        """The batch of a packing that was made, and encoded, for a ring of this degree. ValueError for another."""
        self._check_balanced()
        packing = decode(encoded)
        if packing.layout.num_ranks != self.ring_degree:
            raise ValueError(
                f"the batch was packed for a ring of {packing.layout.num_ranks}, this plan has {self.ring_degree}"
            )
        self._check_length(packing.row_length)
        return PackedBatch(self, packing, encoded)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        is_causal: bool,
        window_size: int | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Exact attention over the whole sequence for this rank's queries. Differentiable.

        Shapes: q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, Dv] local shards -> [B, H, T, Dv]; H a multiple of Hk, kv
        heads need not be expanded. window_size: a query sees the last so many keys, itself among them; needs is_causal.
        scale: of the scores, by default 1 / sqrt(D). Without is_causal, keys may be of another sequence than queries
        (cross-attention) of another length, cut over the same ranks.
        On a "balanced" plan the batch must be entered (see `pack`), and queries see keys of their own document alone.
        DTensors come back as DTensors: they must be Shard(2) on the axes of the plan, and may be Shard(1) (heads) or
        Shard(0) (batch) on others. Raises ValueError for shapes that do not fit each other or the degrees.
        """
        if isinstance(q, DTensor) or isinstance(k, DTensor) or isinstance(v, DTensor):
            return self._dtensor_attention(q, k, v, is_causal=is_causal, window_size=window_size, scale=scale)
        check_tensors(
            q,
            k,
            v,
            is_causal=is_causal,
            window_size=window_size,
            scale=scale,
            ulysses_degree=self.ulysses_degree,
        )
        packing, route = self._entered.packing, self._entered.route(window_size or 0, q.dtype) or self._route
        if self.layout == "balanced":
            check_entered(self._entered.shape, q, is_causal=is_causal, degree=self.degree)
        if self.ulysses_degree > 1:
            k, v = (replicate_kv_heads(x, self.ulysses_degree) for x in (k, v))
            q, k, v = sequence_to_heads([q, k, v], self._heads_group)
        scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
        batch = q.size(0)
        if packing is not None:
            q, k, v = (rows_joined(x) for x in (q, k, v))
        q, k, v = (arranged(x) for x in (q, k, v))
        out, _, _ = attention_operator(q, k, v, packing, route, is_causal, window_size or 0, scale)
        if packing is not None:
            out = self._entered.guard(rows_split(out, batch))
        return heads_to_sequence([out], self._heads_group)[0] if self.ulysses_degree > 1 else out

    def apply(self, model: nn.Module, *, modules: str | Sequence[str], window_size: int | None = None) -> list[str]:
        """Make `F.scaled_dot_product_attention` inside the modules that match (`"*.attention"`) context parallel.

        Several patterns may be given, each of which must match something; "" is the model itself.
        Modules that already are take this plan instead of theirs. A Hugging Face transformers model needs nothing else:
        see [Note: transformers models] in `huggingface`.
        window_size: gives these modules a sliding window, which the function itself cannot express; models whose layers
        differ call this once per kind of layer. A module wrapped for activation checkpointing is found by its own name.
        Returns the names. Raises ValueError when the pattern matches nothing,
        NotImplementedError for a transformers model that would not be exact; see `dispatch.apply`.
        """
        check_window(window_size)
        matched = dispatch.match(model, modules)
        windows = huggingface.prepare(
            model,
            matched,
            positions=self._positions_allowed,
            degree=self.degree,
            window_size=window_size,
            packed=self.layout == "balanced",
        )
        for name, module in matched.items():
            dispatch.install(name, module, self.attention, windows.get(name, window_size))
            self._applied[module] = name
        return list(matched)

    def regroup(
        self, *, ring: int, ulysses: int, method: Method = "auto", ring_inner_degree: int = 1, data: str = "dp_shard"
    ) -> ContextParallel:
        """A plan with other degrees over the same ranks; the mesh axis `data` takes the ranks that they leave.

        Plans are kept, so that changing back and forth makes no new groups. `apply` the new plan to switch a model.
        Collective over all ranks. Raises ValueError when ring x ulysses does not divide the ranks of data x context.
        """
        check_method(method, ring, ulysses)
        sizes = zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=False)
        others = tuple((axis, size) for axis, size in sizes if axis not in (data, self.ring, self.ulysses))
        ours = (self.ring_degree, self.ulysses_degree, self.ring_inner_degree, self.method == "all_gather")
        self._family.setdefault((*ours, data, others), self)
        key = (ring, ulysses, ring_inner_degree, method == "all_gather", data, others)
        if key not in self._family:
            plan = ContextParallel(
                regrouped_mesh(self.mesh, (self.ring or "ring", self.ulysses or "ulysses"), (ring, ulysses), data=data),
                ring=self.ring or "ring",
                ulysses=self.ulysses or "ulysses",
                method=method,
                layout=self.layout,
                chunk_size=self.chunk_size,
                ring_inner_degree=ring_inner_degree,
                overlap=self.overlap,
                kernel=self.kernel,
            )
            plan._set("_family", self._family)
            self._family[key] = plan
        return self._family[key]

    def summary(self) -> str:
        """One line: method, degrees, layout and hops."""
        return description.summary(self)

    def describe(
        self,
        seq_len: int | None = None,
        *,
        num_heads: int = 0,
        num_kv_heads: int = 0,
        head_dim: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        batch: int = 1,
    ) -> str:
        """The plan in lines: its summary, and for each kind of module it was applied to how the keys travel.

        Given the global length and the heads (of one tensor-parallel rank), also the messages of one call, with bytes
        per hop as a rank sends them, and its buffers. For packed documents they differ by batch.
        """
        if bool(num_heads) != bool(head_dim) or (num_kv_heads and not num_heads):
            raise ValueError(
                f"num_heads = {num_heads}, num_kv_heads = {num_kv_heads}, head_dim = {head_dim}: give num_heads and "
                "head_dim, or none of them"
            )
        if num_heads:
            check_heads(num_heads, num_kv_heads or num_heads, self.ulysses_degree)
        shapes = {"heads": num_heads, "kv_heads": num_kv_heads or num_heads, "key_dim": head_dim, "value_dim": head_dim}
        call = Call(batch=batch, itemsize=dtype.itemsize, **shapes) if num_heads and head_dim else None
        return description.describe(self, self._served(), seq_len, call)

    def _served(self) -> list[tuple[str, int]]:
        """Name and window (0: without one) of the modules whose attention is still this plan's; no deep copies."""
        switches = [(name, dispatch.switch_of(module)) for module, name in self._applied.items()]
        return [(name, s.window_size or 0) for name, s in switches if s is not None and s.attention == self.attention]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _size(self, kind: Literal["ring", "ulysses"]) -> int:
        axis, names = getattr(self, kind), self.mesh.mesh_dim_names or ()
        if axis is None:
            return 1
        if axis not in names:
            theirs = f"the mesh has the axes {', '.join(names)}" if names else "the axes of the mesh have no names"
            raise ValueError(f'{kind} = "{axis}": {theirs}; name one, or set {kind}=None')
        return self.mesh.size(names.index(axis))

    def _place(self) -> int:
        """This rank's place in the order of `_pieces`."""
        place = 0
        for axis in self._axes:
            place = place * self.mesh.size((self.mesh.mesh_dim_names or ()).index(axis)) + self.mesh.get_local_rank(
                axis
            )
        return place

    def _pieces(self, length: int) -> torch.Tensor:
        """Global positions of every rank's tokens, ranks in the order of the mesh. Shape [degree, length / degree].

        The ring cuts the sequence as its layout says, ulysses cuts each shard evenly, whichever axis is the outer one.
        """
        self._check_length(length)
        return self._pieces_of(self.ring_layout(length).permutation().view(self.ring_degree, -1))

    def _pieces_of(self, shards: torch.Tensor) -> torch.Tensor:
        """[degree, ..., T] in the order of the mesh, from what each rank of the ring holds [ring, ..., ulysses * T]."""
        pieces = shards.unflatten(-1, (self.ulysses_degree, -1)).movedim(-2, 1)
        if len(self._axes) == 2 and self._axes[0] == self.ulysses:
            pieces = pieces.transpose(0, 1)
        return pieces.flatten(0, 1)

    def _check_length(self, length: int) -> None:
        multiple = math.lcm(length_multiple(self.layout, self.ring_degree), self.degree)
        if length % multiple or length == 0:
            raise ValueError(
                f"a sequence of {length} tokens does not divide over ring {self.ring_degree} x ulysses "
                f"{self.ulysses_degree} ({self.layout}): it must be a multiple of {multiple}; "
                f"try {nearest_multiples(length, multiple)}"
            )

    def _check_balanced(self) -> None:
        if self.layout != "balanced":
            raise ValueError(f'layout = "{self.layout}": packed documents need a plan with layout="balanced"')

    def _refuse_balanced(self, name: str, instead: str) -> None:
        if self.layout == "balanced":
            raise ValueError(
                f'{name} of a plan with layout="balanced": where tokens lie differs by batch; use {instead}'
            )

    def _gathered(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The whole tensor along `dim`, on every rank, in the order of the shards."""
        if not self._axes:
            return x.full_tensor() if isinstance(x, DTensor) else x
        cut = x if isinstance(x, DTensor) else self._as_dtensor(x, dim)
        for axis in reversed(range(cut.device_mesh.ndim)):
            # One axis after the other, the innermost first, as full_tensor does, which warns of it on every rank.
            cut = cut.redistribute(placements=[*cut.placements[:axis], *[Replicate()] * (cut.device_mesh.ndim - axis)])
        return cut.full_tensor()

    def _positions_allowed(self, length: int) -> tuple[torch.Tensor, ...]:
        """Positions that this rank's tokens may have, each [rows, length], where -1 leaves one open.

        length: of what this rank holds of a row; those of a batch that was entered have its own shape.
        Raises RuntimeError for a "balanced" plan outside of a batch.
        """
        if self.layout != "balanced":
            return (self._pieces(length * self.degree)[self._place()][None],)
        if self._entered.batch is None:
            raise RuntimeError(OUTSIDE)
        return self._entered.batch._positions

    def ring_layout(self, length: int) -> Layout:
        """How the ring cuts a sequence of `length`. ValueError for a plan that deals chunks anew for every batch."""
        self._refuse_balanced("ring_layout", "pack(document_ids).packing.layout")
        return make_layout(self.layout, self.ring_degree, length)

    def _as_dtensor(self, part: torch.Tensor, dim: int) -> DTensor:
        if not self._axes:
            return DTensor.from_local(part, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return DTensor.from_local(part, self.mesh[self._axes], [Shard(dim)] * len(self._axes), run_check=False)

    def _dtensor_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        """`attention` for DTensors: placements are checked against the plan, the work is on local tensors."""
        q, k, v = check_placements(q, k, v, mesh=self.mesh, axes=self._axes)
        out = self.attention(q.to_local(), k.to_local(), v.to_local(), **options)
        return DTensor.from_local(out, q.device_mesh, q.placements, run_check=False)
