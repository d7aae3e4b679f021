"""On CPU kernels get tensors with heads stored one behind the other, whatever carries them: they are faster so."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from test_attention import make_plan, problem

import cptrain.context_parallel.attention as operator
from cptrain.context_parallel import kernels
from cptrain.context_parallel.carrier import new_sum, unpack


def by_token(x: torch.Tensor) -> torch.Tensor:
    """As projections store it: [B, T, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def by_head(x: torch.Tensor) -> bool:
    return x.stride(1) > x.stride(2)


def kernel_inputs(rank: int, world: int, options: dict[str, int]) -> list[bool]:
    """Of dout, q, k, v of every kernel call, whether they are stored by head."""
    seen: list[bool] = []

    def forward(*arguments):
        seen.extend(map(by_head, arguments[:3]))
        return kernels.CPU_FLASH.forward(*arguments)

    def backward(*arguments):
        seen.extend(map(by_head, arguments[:4]))
        return kernels.CPU_FLASH.backward(*arguments)

    plan = make_plan(**options)
    q, k, v, dout = (by_token(x) for x in plan.shard(*problem(8, 4, length=16 * world), dim=2))
    assert not any(map(by_head, (q, k, v, dout)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    watched = replace(kernels.CPU_FLASH, forward=forward, backward=backward)
    with mock.patch.object(operator, "choose_kernel", return_value=watched):
        out = plan.attention(*leaves, is_causal=True)
        assert not by_head(out), "the next reshape of a model is a view"
        torch.autograd.grad(out, leaves, dout)
    return seen


@pytest.mark.parametrize("options", [{"ring": 2}, {"ulysses": 2}], ids=["ring", "ulysses"])
def test_memory_order_is_by_head_for_cpu_kernels(pool, options):
    for seen in pool.run(2, kernel_inputs, options):
        assert len(seen) >= 7 and all(seen)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_order_of_messages_and_sums_is_that_of_the_device(device):
    shape = torch.Size((1, 4, 16, 8))
    message = torch.empty(2 * shape.numel(), device=device)
    tensors = (*unpack(message, shape, shape), new_sum(torch.empty(shape, device=device)).result())
    assert [by_head(x) for x in tensors] == [device == "cpu"] * 3
