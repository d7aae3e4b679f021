"""Attention over sequence shards as one custom operator: whatever carries the keys, the computation is this.

[Note: attention is one operator]
Forward and backward are `torch.library` operators, so that selective activation checkpointing can keep the result (the
recompute then sends nothing) and torch.compile sees one opaque call. A policy that keeps only the inner kernel's output
would still repeat every message. An operator's outputs must alias neither its inputs nor each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from cptrain.context_parallel.all_gather import AllGather
from cptrain.context_parallel.carrier import Alone, Carrier, accumulator_dtype
from cptrain.context_parallel.compute import Backward, Forward
from cptrain.context_parallel.exchange import Exchange
from cptrain.context_parallel.groups import Groups
from cptrain.context_parallel.hops import hops_at_once, num_needed_keys, ring_pace
from cptrain.context_parallel.kernels import Kernel, choose_kernel
from cptrain.context_parallel.layout import Layout, make_layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.memory_order import arranged, new_heads
from cptrain.context_parallel.packing import decode
from cptrain.context_parallel.ring import Ring


@dataclass(frozen=True)
class Route:
    """How keys are carried: everything about an attention call but its tensors, as one string for the operator.

    method: "ring", "all_gather", or "exchange" for documents of which only needed keys travel. num_ranks: that share
    the sequence. layout: its name, where no packing says it. kernel: its name, or "auto".
    """

    method: str
    num_ranks: int
    layout: str
    overlap: bool
    kernel: str
    groups: Groups

    def encode(self) -> str:
        """The route as a string; `decode` gives it back."""
        return ";".join(
            (self.method, str(self.num_ranks), self.layout, str(int(self.overlap)), self.kernel, *self.groups)
        )

    @staticmethod
    @lru_cache(maxsize=64)
    def decode(text: str) -> Route:
        """The route that `encode` gave this string for."""
        method, num_ranks, layout, overlap, kernel, *groups = text.split(";")
        return Route(method, int(num_ranks), layout, overlap == "1", kernel, Groups(*groups))

    def layout_and_mask(
        self, tokens: int, packing: torch.Tensor | None, *, causal: bool, window: int
    ) -> tuple[Layout, Mask]:
        """How a sequence of which each rank holds so many tokens is cut, and what its queries see."""
        if packing is None:
            return _layout(self.layout, self.num_ranks, self.num_ranks * tokens), Mask(causal, window)
        packed = decode(packing)
        return packed.layout, packed.mask(window)

    def carrier(self, layout: Layout, mask: Mask, device_type: str, heads_per_key: int) -> Carrier:
        """What carries the keys of a sequence that is cut in this way under this mask.

        heads_per_key: query heads that share a key head.
        """
        if self.num_ranks == 1:
            return Alone(layout, mask)
        groups = self.groups
        if self.method == "exchange" or (mask.documents is None and sends_needed_only(layout, mask)):
            fast = groups.is_fast and groups.inner == groups.ring
            return Exchange(
                layout,
                mask,
                group=groups.ring,
                grad_group=groups.ring_grad,
                at_once=hops_at_once(layout, device_type, heads_per_key=heads_per_key, fast=fast),
                overlap=self.overlap,
            )
        if self.method == "all_gather":
            return AllGather(layout, mask, group=groups.ring, overlap=self.overlap)
        return Ring(
            layout,
            mask,
            inner=groups.inner,
            outer=groups.outer,
            inner_grad=groups.inner_grad,
            outer_grad=groups.outer_grad,
            pace=ring_pace(layout, device_type, heads_per_key=heads_per_key, fast=groups.is_fast),
            overlap=self.overlap,
        )

    def kept_numel(self, k: torch.Tensor, v: torch.Tensor, *, packed: bool, window: int) -> int:
        """How many elements forward keeps for backward. Known without the packing, which a traced graph cannot read."""
        if self.method != "ring" or self.num_ranks == 1:
            return 0
        # A window decides by the length, which a graph of any length then has to know.
        if (
            window
            and not packed
            and sends_needed_only(*self.layout_and_mask(int(k.size(2)), None, causal=True, window=window))
        ):
            return 0
        return k.numel() + v.numel()


_layout = lru_cache(maxsize=64)(make_layout)


def sends_needed_only(layout: Layout, mask: Mask) -> bool:
    """Whether keys go straight to their readers: with a window, where that is fewer bytes than all of them to all."""
    if not mask.window or mask.window >= layout.length:
        return False
    return num_needed_keys(layout, mask) < layout.num_ranks * (layout.num_ranks - 1) * layout.shard_length


@torch.library.custom_op("cptrain::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: torch.Tensor | None,
    route: str,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact attention of this rank's queries over the whole sequence.

    Shapes: q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, Dv] local shards. Returns out [B, H, T, Dv] in the dtype of q,
    lse [B, H, T] in fp32 (fp64), and the flat keys and values, if any, from which the carrier's backward starts.
    q, k and v best come `arranged`.
    packing: the documents of the batch (see [Note: a packing is data]), whose rows then follow one another in T: B = 1.
    """
    plan = Route.decode(route)
    cut = plan.layout_and_mask(k.size(2), packing, causal=causal, window=window)
    carrier = plan.carrier(*cut, k.device.type, q.size(1) // k.size(1))
    kernel = _kernel(plan, k, v, packed=packing is not None)
    forward = Forward(kernel, q, num_kv_heads=k.size(1), value_dim=v.size(-1), causal=causal, scale=scale)
    with _as_given(k.device):
        kept = carrier.forward(k, v, forward)
        out, lse = forward.result()
    return _returned(out, q.dtype), lse, kept


def _as_given(device: torch.device) -> torch.autocast:
    """Tensors keep their dtypes: under autocast, scores and sums of a kernel of plain torch would lose theirs."""
    return torch.autocast(device.type, enabled=False)


def _kernel(plan: Route, k: torch.Tensor, v: torch.Tensor, *, packed: bool) -> Kernel:
    return choose_kernel(
        k.device.type, k.dtype, key_dim=k.size(-1), value_dim=v.size(-1), packed=packed, name=plan.kernel
    )


def _returned(x: torch.Tensor, dtype: torch.dtype, *, shared: bool = False) -> torch.Tensor:
    """x [B, H, T, D] stored as [B, T, H, D], which is what the operator's fake promises; one copy, if it is not.

    shared: its memory is also that of another result, which an operator may not return.
    """
    if x.dtype == dtype and x.transpose(1, 2).is_contiguous() and not shared:
        return x
    return new_heads(x, dtype).copy_(x)


@attention.register_fake
def _(q, k, v, packing, route, causal, window, scale):  # type: ignore[no-untyped-def]
    out = new_heads(q, q.dtype, v.size(-1))
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    return out, lse, k.new_empty(Route.decode(route).kept_numel(k, v, packed=packing is not None, window=window))


@torch.library.custom_op("cptrain::attention_backward", mutates_args=())
def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    packing: torch.Tensor | None,
    route: str,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `attention`, shaped and typed as q, k, v."""
    plan = Route.decode(route)
    cut = plan.layout_and_mask(k.size(2), packing, causal=causal, window=window)
    carrier = plan.carrier(*cut, k.device.type, q.size(1) // k.size(1))
    kernel = _kernel(plan, k, v, packed=packing is not None)
    backward = Backward(kernel, (arranged(dout), q, out, lse), num_kv_heads=k.size(1), causal=causal, scale=scale)
    with _as_given(k.device):
        dk, dv = carrier.backward(k, v, kept, backward)
    shared = dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()  # views of one message
    dk, dv = (_returned(x, k.dtype, shared=shared) for x in (dk, dv))
    return _returned(backward.dq(), q.dtype), dk, dv


@attention_backward.register_fake
def _(dout, q, k, v, out, lse, kept, packing, route, causal, window, scale):  # type: ignore[no-untyped-def]
    return new_heads(q, q.dtype), new_heads(k, k.dtype), new_heads(v, v.dtype)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, packing, *ctx.settings = inputs
    out, lse, kept = output
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, kept, packing)


def _backward(ctx, dout, dlse, dkept):  # type: ignore[no-untyped-def]
    return (*attention_backward(dout, *ctx.saved_tensors, *ctx.settings), None, *(None for _ in ctx.settings))


attention.register_autograd(_backward, setup_context=_setup_context)


def _backward_of_backward(ctx, *gradients):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "second derivatives of attention (a backward pass with create_graph=True, differentiated) are not supported "
        "under context parallelism"
    )


attention_backward.register_autograd(_backward_of_backward)
