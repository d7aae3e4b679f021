"""A batch of packed documents under a plan: what users cut their tensors with, and enter for attention."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cptrain.context_parallel.carrier import accumulator_dtype
from cptrain.context_parallel.packing import Packing
from cptrain.context_parallel.refusals import check_whole
from cptrain.distributed.sending import send

if TYPE_CHECKING:
    from cptrain.context_parallel.api import ContextParallel


COMPARED = 3  # batches of a plan that ranks compare: who reads other data does so from the start


class Entered:
    """The batch that a plan is inside of: the one thing about a plan that changes.

    Read by every attention of the plan, in whatever thread a backward pass recomputes it: no context variable.
    batch: None outside of batches. packing: of it, encoded. routes: of its keys, for layers with windows up to this,
    the widest (0: without one) last; in half precision, and in full. shape: rows, tokens of a row. These are fields of
    their own because compiled code reads them: asked of the batch, it would be compiled anew for each.
    recomputed: the packing of the batch inside of which a backward pass has computed attention again.
    num_compared: how many batches the ranks have compared so far: entered without gradients (a validation, of data of
    its own), and with them.
    """

    def __init__(self) -> None:
        self.batch: PackedBatch | None = None
        self.packing: torch.Tensor | None = None
        self.routes: tuple[tuple[int, str, str], ...] = ()
        self.shape = (0, 0)
        self.recomputed: torch.Tensor | None = None
        self.num_compared = [0, 0]

    def enter(self, batch: PackedBatch) -> None:
        self.batch, self.packing, self.routes = batch, batch.encoded, batch._routes()
        self.shape = (batch.packing.num_rows, batch.packing.row_length)

    def leave(self) -> None:
        self.batch, self.packing, self.routes, self.shape = None, None, (), (0, 0)
        self.recomputed = None

    def route(self, window: int, dtype: torch.dtype) -> str:
        """How keys of this dtype travel for a layer with this window; "" outside of batches."""
        route = ""
        for widest, half, full in self.routes:
            route = half if dtype.itemsize == 2 else full
            if 0 < window <= widest:
                break
        return route

    def guard(self, out: torch.Tensor) -> torch.Tensor:
        """What attention found inside of this batch, whose gradient is refused if it was recomputed inside of another.

        Nothing else would notice: checkpointing compares only shapes of what it computes again. Compiled code takes
        the packing along as any other tensor.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return out
        if torch._C._current_graph_task_id() != -1:  # inside of a backward pass
            self.recomputed = self.packing
        return _Guard.apply(out, self)


class _Guard(torch.autograd.Function):
    """The identity; see `Entered.guard`."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, entered: Entered) -> torch.Tensor:
        ctx.entered, ctx.packing = entered, entered.packing
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.entered.recomputed is not None and ctx.entered.recomputed is not ctx.packing:
            raise RuntimeError(
                "the backward pass of one batch recomputes attention inside of another, which sees other documents: "
                "forward and backward of a loss belong inside of the same `with batch:`"
            )
        return gradient, None


@dataclass(frozen=True)
class PackedBatch:
    """One batch of packed documents under a plan: cuts tensors as its chunks were dealt, and is entered for attention.

    While it is entered, attention of its plan is causal inside of each document. Backward passes belong inside, too:
    activation checkpointing computes attention again there, and where that is inside of another batch it is refused.
    Made by `ContextParallel.pack`.
    compares: the first batches of a plan are compared between its ranks.
    """

    plan: ContextParallel
    packing: Packing
    encoded: torch.Tensor
    compares: bool = True

    def shard(self, *tensors: torch.Tensor, dim: int = 1, as_dtensor: bool = False) -> Any:
        """This rank's part of each tensor [B, ..., S, ...], as `ContextParallel.shard`; each row is cut in its way."""
        check_whole(tensors)
        parts = []
        for x in tensors:
            self._check_shape(x.size(0), x.size(dim), x, dim)
            part = _taken(x, self._index, dim)
            parts.append(self.plan._as_dtensor(part, dim) if as_dtensor else part)
        return parts[0] if len(parts) == 1 else tuple(parts)

    def unshard(self, x: torch.Tensor, *, dim: int) -> torch.Tensor:
        """The global tensor in global order, on every rank: the inverse of `shard`. Differentiable."""
        whole = self.plan._gathered(x, dim)
        self._check_shape(whole.size(0), whole.size(dim), whole, dim)
        ring = torch.stack([self.packing.positions_of(rank) for rank in range(self.plan.ring_degree)])
        pieces = self.plan._pieces_of(ring)  # [degree, B, T], ranks in the order of the mesh
        return _taken(whole, torch.argsort(pieces.transpose(0, 1).flatten(1), dim=1), dim)

    def __enter__(self) -> PackedBatch:
        plan = self.plan
        if plan._entered.packing is not None:
            raise RuntimeError("another batch is entered: leave it (after its backward pass) before entering this one")
        if self.compares and plan.degree > 1:
            counts, which = plan._entered.num_compared, int(torch.is_grad_enabled())
            if counts[which] < COMPARED:
                counts[which] += 1
                self._compare()
        plan._entered.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.plan._entered.leave()

    def exchanges(self, window: int, dtype: torch.dtype) -> bool:
        """Whether keys of this dtype go straight to their readers, for layers with this window (0: without one).

        Where all would be gathered, for windows alone: they are then never more.
        """
        packing, plan = self.packing, self.plan
        if plan.ring_degree == 1:
            return False
        if plan.method == "all_gather":
            counted = packing.moved_of(window)
            return counted.window > 0 and counted.keys < packing.ring_keys
        width = accumulator_dtype(dtype).itemsize // dtype.itemsize
        return packing.exchange_is_cheaper(plan.ring_inner_degree, window=window, gradient_width=width)

    def num_moved(self, window: int, dtype: torch.dtype) -> int:
        """Keys that travel forward for a layer with this window, over all ranks of the ring."""
        return self.packing.moved_of(window).keys if self.exchanges(window, dtype) else self.packing.ring_keys

    def _routes(self) -> tuple[tuple[int, str, str], ...]:
        """What `Entered.route` chooses from."""
        routes = []
        for window in sorted((moved.window for moved in self.packing.moved), key=lambda w: w or math.inf):
            half, full = (
                self.plan._exchange_route if self.exchanges(window, dtype) else self.plan._route
                for dtype in (torch.bfloat16, torch.float32)
            )
            routes.append((window, half, full))
        return tuple(routes)

    def _compare(self) -> None:
        """RuntimeError on all ranks of the plan unless they have the same documents, dealt alike."""
        digest = zlib.crc32(self.encoded.numpy().tobytes())
        bounds = torch.tensor([digest, -digest], device=self.plan.mesh.device_type)
        for axis in self.plan._axes:
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.plan.mesh.get_group(axis))
        if int(bounds[0]) != -int(bounds[1]):
            raise RuntimeError(
                "the ranks that share a sequence have packed different documents: give all of them the same "
                "document_ids (the same samples, in the same order)"
            )

    @cached_property
    def _index(self) -> torch.Tensor:
        """Place in its row of every token of this rank: [B, T]."""
        plan = self.plan
        return self.packing.positions_of(plan.ring_rank).unflatten(1, (plan.ulysses_degree, -1))[:, plan.ulysses_rank]

    @cached_property
    def _positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions that this rank's tokens may have: begun anew in each document, or in each row; -1 for padding."""
        anew = self.packing.begun_anew(self._index)
        return anew, self._index.masked_fill(anew < 0, -1)

    def _check_shape(self, rows: int, length: int, x: torch.Tensor, dim: int) -> None:
        if (rows, length) != (self.packing.num_rows, self.packing.row_length):
            raise ValueError(
                f"{tuple(x.shape)}: this batch has {self.packing.num_rows} rows along dim 0 and "
                f"{self.packing.row_length} tokens along dim {dim}"
            )


def _taken(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """x [B, ..., S, ...] with the tokens index [B, T] of each row along `dim`."""
    stream = x.movedim(dim, 1).flatten(0, 1)
    rows = torch.arange(index.size(0))[:, None] * x.size(dim)
    taken = stream.index_select(0, send((index + rows).flatten(), x.device))
    return taken.unflatten(0, tuple(index.shape)).movedim(1, dim)


def rows_joined(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] as one row [1, H, B * T, D]: a view, if it is stored by token."""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def rows_split(x: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of `rows_joined`."""
    return x.transpose(1, 2).squeeze(0).unflatten(0, (batch, -1)).transpose(1, 2)
