"""Faults to plant in a running process, as context managers: what a check must find."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import torch
from torch.distributed.fsdp import FSDPModule

from cptrain.context_parallel import ContextParallel, recompute, ring
from cptrain.context_parallel.carrier import pack
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.packing import Packing
from cptrain.train import trainer
from cptrain.train.trainer import Trainer

Planted = AbstractContextManager[object]


def dropped_hop() -> Planted:
    """Rank 1 computes nothing against the keys of rank 0."""
    blocks = ring.cached_shard_blocks
    return mock.patch.object(ring, "cached_shard_blocks", lambda *at: () if at[2:] == (1, 0) else blocks(*at))


def scaled_loss() -> Planted:
    """The loss is multiplied by the context degree."""
    loss = trainer.cross_entropy_sum
    return mock.patch.object(trainer, "cross_entropy_sum", lambda *args, **options: 2 * loss(*args, **options))


def averaged_gradients() -> Planted:
    """FSDP2 divides by its ranks."""
    divide = FSDPModule.set_gradient_divide_factor
    return mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, factor: divide(self, 2.0))


def norm_of_a_shard() -> Planted:
    """The gradient norm is that of this rank's shards."""

    def clip(parameters, max_norm):
        shards = [p.grad.to_local() for p in parameters if p.grad is not None]
        return torch.stack([shard.norm() for shard in shards]).norm()

    return mock.patch.object(trainer, "clip_grad_norm", clip)


def local_positions() -> Planted:
    """Every rank counts its own tokens from 0."""
    shard = Trainer.shard

    def wrong(self, batch):
        cut = shard(self, batch)
        return replace(cut, positions=torch.arange(cut.positions.size(1)).expand_as(cut.positions))

    return mock.patch.object(Trainer, "shard", wrong)


def _attention(change: Callable) -> Planted:
    """`change` sees the arguments of every attention."""
    attention = ContextParallel.attention

    def changed(self, q, k, v, **options):
        return attention(self, *change(q, k, v, options), **options)

    return mock.patch.object(ContextParallel, "attention", changed)


def detached_keys() -> Planted:
    """No gradient goes back to keys and values."""
    return _attention(lambda q, k, v, options: (q, k.detach(), v.detach()))


def no_causal_mask() -> Planted:
    """Every query sees every key."""

    def change(q, k, v, options):
        options.update(is_causal=False, window_size=None)
        return q, k, v

    return _attention(change)


def dropped_window() -> Planted:
    """Every query sees all keys before it."""

    def change(q, k, v, options):
        options.update(window_size=None)
        return q, k, v

    return _attention(change)


def wrong_scale() -> Planted:
    """Scores are divided by the width of a head instead of its root."""

    def change(q, k, v, options):
        options.update(scale=1 / q.size(-1))
        return q, k, v

    return _attention(change)


def extra_message() -> Planted:
    """The ring sends its keys once more than it needs to, in forward."""
    forward = ring.Ring.forward

    def noisy(self, k, v, compute):
        message = pack(k, v)
        self._inner.post(message, torch.empty_like(message), step=1)
        self._inner.wait()
        return forward(self, k, v, compute)

    return mock.patch.object(ring.Ring, "forward", noisy)


def repeated_messages() -> Planted:
    """Selective checkpointing does not know attention and recomputes it, messages included."""
    return mock.patch.object(recompute, "KEPT_OPERATORS", ())


def swapped_chunks() -> Planted:
    """Ranks hold other tokens than their attention takes them for."""
    permutation, positions_of = Layout.permutation, Packing.positions_of
    stack = ExitStack()
    stack.enter_context(mock.patch.object(Layout, "permutation", lambda self: permutation(self).flip(0)))
    stack.enter_context(mock.patch.object(Packing, "positions_of", lambda self, rank: positions_of(self, -1 - rank)))
    return stack


def no_document_mask() -> Planted:
    """Tokens see all that comes before them in the batch, whatever document it belongs to."""
    return mock.patch.object(Packing, "mask", lambda self, window=0: Mask(causal=True, window=window))


def shifted_documents() -> Planted:
    """Every document but the first of a row begins a token late: its first token belongs to the one before it."""
    right = Packing.mask

    def shifted(self, window=0):
        mask = right(self, window)
        offsets = list(mask.documents.offsets)
        for index, (start, stop) in enumerate(pairwise(mask.documents.offsets)):
            offsets[index] += start % self.row_length > 0 and start + 1 < stop
        return replace(mask, documents=replace(mask.documents, offsets=tuple(offsets)))

    return mock.patch.object(Packing, "mask", shifted)


def running_positions() -> Planted:
    """Positions do not begin anew in each document, although those of the batch do."""
    shard = Trainer.shard

    def wrong(self, batch):
        places = torch.arange(batch["positions"].size(1)).expand_as(batch["positions"])
        return shard(self, {**batch, "positions": places})

    return mock.patch.object(Trainer, "shard", wrong)


def nothing() -> Planted:
    return nullcontext()
