"""What a rank computes of the pieces that a carrier brings: running results of its queries, sums of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from cptrain.context_parallel.carrier import Gradients, Piece, Sums, accumulator_dtype, new_sum, new_sums
from cptrain.context_parallel.kernels import Kernel, backward_launch, forward_launch, packs
from cptrain.context_parallel.launches import Launch, Ranges, join, plan_launches, put, take
from cptrain.context_parallel.memory_order import new_heads
from cptrain.context_parallel.merging import merge
from cptrain.context_parallel.sums import Reached, Sum
from cptrain.distributed.side_stream import SideStream

# Gradients of so many launches of one piece are kept until the piece is done; of more, whose keys overlap, a sum.
MOST_LAUNCHES = 3


class Forward:
    """Output and log-sum-exp of queries q [B, H, T, D] over all pieces; call it with each.

    causal: without it, a block's queries are all of them, however many keys cross-attention gives them.
    """

    def __init__(
        self, kernel: Kernel, q: torch.Tensor, *, num_kv_heads: int, value_dim: int, causal: bool, scale: float
    ):
        self._kernel, self._q, self._causal, self._scale = kernel, q, causal, scale
        self._group, self._value_dim = q.size(1) // num_kv_heads, value_dim
        self._parts: dict[int, _Rows] = {}  # by the first kv head of a piece
        self._side = SideStream(q.device)

    def __call__(self, piece: Piece) -> None:
        queries = self._q[:, _heads(piece, self._group)]
        rows_of = self._parts.setdefault(piece.first_head, _Rows(queries, self._value_dim))
        for launch in plan_launches(piece.blocks, packs=packs(self._kernel, queries)):
            rows = _rows(launch, queries, self._causal)
            parts = take(queries, rows), take(piece.keys, launch.columns), take(piece.values, launch.columns)
            found = forward_launch(self._kernel, *parts, launch, self._scale)
            if not rows_of.begin(*found):
                self._side.add(partial(rows_of.add, rows, *found), *found)
        self._side.flush()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out [B, H, T, Dv] and lse [B, H, T], in fp32 (fp64), or out in the dtype of q."""
        self._side.join()
        outs, lses = zip(*(rows.result() for rows in self._parts.values()), strict=True)
        return _together(outs, self._q), lses[0] if len(lses) == 1 else torch.cat(lses, 1)


class Backward:
    """dq of queries, and for each piece the gradients of its keys, from the final out and lse; call it with each."""

    def __init__(
        self,
        kernel: Kernel,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        num_kv_heads: int,
        causal: bool,
        scale: float,
    ) -> None:
        self._kernel, self._tensors, self._causal, self._scale = kernel, tensors, causal, scale  # dout, q, out, lse
        self._group = tensors[1].size(1) // num_kv_heads
        self._dqs: dict[int, Sum] = {}

    def __call__(self, piece: Piece, into: Sums | None = None) -> Gradients:
        heads = _heads(piece, self._group)
        dout, q, out, lse = (x[:, heads] for x in self._tensors)
        launches = plan_launches(piece.blocks, packs=packs(self._kernel, q))
        wide = accumulator_dtype(q.dtype)
        gradients: Gradients = []
        sums = into
        if sums is None and (len(launches) > MOST_LAUNCHES or any(len(launch.blocks) > 1 for launch in launches)):
            sums = new_sums(piece.keys, piece.values)
        for launch in launches:
            rows = _rows(launch, q, self._causal)
            keys, values = take(piece.keys, launch.columns), take(piece.values, launch.columns)
            ours = (take(dout, rows), take(q, rows), keys, values, take(out, rows), take(lse, rows))
            dq, dk, dv = backward_launch(self._kernel, *ours, launch, self._scale)
            if piece.first_head not in self._dqs and dq.size(2) == q.size(2):
                self._dqs[piece.first_head] = Sum.of(dq.to(wide))  # in buffers of its own
            else:
                if piece.first_head not in self._dqs:
                    self._dqs[piece.first_head] = new_sum(q)
                # Not on the side: measured on an H100, that gains nothing and holds more memory.
                self._dqs[piece.first_head].add(rows, dq)
            if sums is None:
                gradients.append((slice(*launch.columns[0]), dk, dv))
            else:
                sums[0].add(launch.columns, dk)
                sums[1].add(launch.columns, dv)
        if sums is None or sums is into:
            return gradients
        return [(slice(0, piece.keys.size(2)), sums[0].result(), sums[1].result())]

    def dq(self) -> torch.Tensor:
        """[B, H, T, D] in fp32 (fp64), or in the dtype of q; 0 for queries that see nothing."""
        q = self._tensors[1]
        return _together([dq.result() for dq in self._dqs.values()] or [torch.zeros_like(q)], q)


class _Rows:
    """The running result of all queries of some heads."""

    def __init__(self, q: torch.Tensor, value_dim: int) -> None:
        self._q, self._value_dim = q, value_dim
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None
        self._reached = Reached(q.size(2))

    def begin(self, out: torch.Tensor, lse: torch.Tensor) -> bool:
        """Whether this, being the first and of every row, is the result so far, in buffers of its own.

        Makes the result in any case: not on the side, whose memory it would be.
        """
        if self._out is None and out.size(2) == self._q.size(2):
            self._out, self._lse = out.to(accumulator_dtype(self._q.dtype)), lse.contiguous()
            self._reached.add(((0, out.size(2)),))
            return True
        self._made()
        return False

    def add(self, rows: Ranges, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Fold in what a launch found for these rows, which are apart."""
        whole_out, whole_lse = self._made()
        all_new, new = self._reached.add(rows)
        if not all_new:
            self._clear(new)
            # Views where the rows are one range, and then merged in place.
            so_far = take(whole_out, rows), take(whole_lse, rows)
            merge(*so_far, out, lse)
            if len(join(rows)) == 1:
                return
            out, lse = so_far
        put(whole_out, rows, out)
        put(whole_lse, rows, lse)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp so far; 0 and -inf in rows that have seen no key."""
        self._clear(self._reached.rest())
        return self._made()

    def _clear(self, rows: Ranges) -> None:
        out, lse = self._made()
        for start, stop in rows:
            out[:, :, start:stop] = 0
            lse[:, :, start:stop] = -torch.inf

    def _made(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._out is None or self._lse is None:
            wide = accumulator_dtype(self._q.dtype)
            self._out = new_heads(self._q, wide, self._value_dim)
            self._lse = torch.empty(self._q.shape[:3], dtype=wide, device=self._q.device)
        return self._out, self._lse


def _together(parts: Sequence[torch.Tensor], q: torch.Tensor) -> torch.Tensor:
    """Parts [B, h, T, D] of the heads, in order, as one tensor: itself, or in the dtype of q."""
    if len(parts) == 1:
        return parts[0]
    whole = new_heads(q, q.dtype, parts[0].size(-1))
    for part, heads in zip(parts, whole.split([part.size(1) for part in parts], 1), strict=True):
        heads.copy_(part)
    return whole


def _heads(piece: Piece, group: int) -> slice:
    """The query heads that meet the kv heads of a piece."""
    return slice(piece.first_head * group, (piece.first_head + piece.keys.size(1)) * group)


def _rows(launch: Launch, q: torch.Tensor, causal: bool) -> Ranges:
    return launch.rows if causal else ((0, q.size(2)),)
