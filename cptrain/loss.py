"""The loss: cross entropy of the output projection, summed over valid tokens or of each, never holding all logits.

[Note: logits in chunks]
Logits are the largest tensor of a long-context step (16K tokens of a 128K vocabulary are 8 GiB in fp32). They are made
for a chunk of tokens at a time, turned into the loss and its gradients in place, and dropped. Gradients are computed in
the forward pass: the loss is a sum, so the backward pass only multiplies them by one number, and nothing is recomputed.
Under tensor parallel each rank holds a slice of the vocabulary; two small reductions per chunk make the softmax whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from cptrain.models.logits import tokens_at_a_time

IGNORED = -100


def cross_entropy_sum(hidden: Tensor, output: nn.Linear, labels: Tensor) -> Tensor:
    """Sum over labels != -100 of the cross entropy of `output(hidden)`, in fp32 (fp64 for fp64), as a scalar.

    Shapes: hidden [B, T, E], labels [B, T] already shifted. Under tensor parallel hidden is a DTensor cut along T and
    output.weight one cut along the vocabulary; the sum is then the same on every rank of the axis.
    Raises NotImplementedError for an output with a bias, ValueError for a weight or hidden that is cut another way.
    """
    hidden, weight, first, group = _local(hidden, output)
    # Asked here, since inside of the function gradients are never enabled.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropySum.apply(hidden.flatten(0, 1), weight, labels.flatten(), first, group, needs_grad)


def cross_entropy_each(hidden: Tensor, output: nn.Linear, labels: Tensor) -> Tensor:
    """The terms of `cross_entropy_sum` [B, T], 0 where the label is -100; without gradients."""
    return _each(hidden, output, labels, lambda chunk: chunk.losses)


def correct_each(hidden: Tensor, output: nn.Linear, labels: Tensor) -> Tensor:
    """Whether the label is what greedy decoding takes, bool [B, T]: the first token of the largest logit."""
    return _each(hidden, output, labels, _Chunk.likeliest) == labels


@torch.no_grad()
def _each(hidden: Tensor, output: nn.Linear, labels: Tensor, of_chunk: Callable[[_Chunk], Tensor]) -> Tensor:
    """What the function says of the tokens of a chunk [n], of all tokens [B, T]."""
    hidden, weight, first, group = _local(hidden, output)
    rows, targets = hidden.flatten(0, 1), labels.flatten()
    found = [of_chunk(_Chunk(rows[part], weight, targets[part], first, group)) for part in _parts(rows, weight)]
    return torch.cat(found).view(labels.shape)


def _local(hidden: Tensor, output: nn.Linear) -> tuple[Tensor, Tensor, int, dist.ProcessGroup | None]:
    """hidden of all tokens, the rows of the weight that are here, the index of their first, and who has the others."""
    if output.bias is not None:
        raise NotImplementedError("output.bias is not added to the logits here; build the output with bias=False")
    weight, group, first = output.weight, None, 0
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        if weight.placements != (Shard(0),):
            raise ValueError(f"output.weight is {weight.placements}; it must be Shard(0) on one axis of the mesh")
        if not isinstance(hidden, DTensor):
            raise ValueError("output.weight is a DTensor and hidden is not; place hidden on the same mesh")
        group = mesh.get_group()
        first = mesh.get_local_rank() * -(-weight.size(0) // mesh.size())
        # Each rank's slice of the vocabulary gives a part of the gradient of all tokens.
        hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        weight = weight.to_local()
    return hidden, weight, first, group


def _parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The tokens [N, E] in chunks."""
    step = tokens_at_a_time(weight.size(0))
    return (slice(start, start + step) for start in range(0, hidden.size(0), step))


class _Chunk:
    """Some tokens: losses [n], and what the gradient of their logits follows from. Holds their logits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None
    ) -> None:
        self._valid = labels != IGNORED
        self._exps = F.linear(hidden, weight).to(_wide(hidden))
        largest = self._exps.amax(-1)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        self._here = self._valid & (labels >= first) & (labels < first + weight.size(0))
        self._column = torch.where(self._here, labels - first, 0).unsqueeze(-1)
        self._exps -= largest.unsqueeze(-1)
        targets = self._exps.gather(-1, self._column).squeeze(-1) * self._here
        sums = torch.stack((targets, self._exps.exp_().sum(-1)))
        if group is not None:
            dist.all_reduce(sums, group=group)
        target, self._denominator = sums
        self.losses = torch.where(self._valid, self._denominator.log() - target, 0)
        self._first, self._group = first, group

    def likeliest(self) -> Tensor:
        """The token of the largest logit [n], the first of equal ones."""
        is_here = self._exps.amax(-1) == 1
        here = torch.where(is_here, self._exps.argmax(-1) + self._first, torch.iinfo(torch.int64).max)
        if self._group is not None:
            dist.all_reduce(here, op=dist.ReduceOp.MIN, group=self._group)
        return here

    def dlogits(self) -> Tensor:
        """softmax - one hot, and nothing for ignored tokens; in the memory of the logits."""
        self._exps *= (self._valid / self._denominator).unsqueeze(-1)
        return self._exps.scatter_add_(-1, self._column, -self._here.to(self._exps.dtype).unsqueeze(-1))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _CrossEntropySum(torch.autograd.Function):
    """[N, E], [V, E], [N] -> (); `first` is the vocabulary index of the first row of the weight here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        group: dist.ProcessGroup | None,
        needs_grad: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        dhidden = torch.empty_like(hidden) if needs_grad else None
        # Summed over chunks in fp32 whatever the weight's dtype; rounded once, at the end.
        dweight = torch.zeros_like(weight, dtype=_wide(hidden)) if needs_grad else None
        for part in _parts(hidden, weight):
            h = hidden[part]
            chunk = _Chunk(h, weight, labels[part], first, group)
            total += chunk.losses.sum()
            if dhidden is not None and dweight is not None:
                dlogits = chunk.dlogits().to(h.dtype)
                torch.mm(dlogits, weight, out=dhidden[part])
                if dweight.dtype == h.dtype:
                    dweight.addmm_(dlogits.mT, h)
                else:
                    dweight += dlogits.mT @ h
                del dlogits
            del chunk  # before the next one's logits are made
        if needs_grad:
            ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        # Rounded as it is written: the product in fp32 would be another whole gradient.
        rounded = torch.mul(dweight, dtotal, out=torch.empty_like(dweight, dtype=ctx.dtype))
        return dhidden * dtotal.to(dhidden.dtype), rounded, None, None, None, None
