"""A step over packed documents never makes the host wait for a device: seen on CPU, by taking its tensors for one's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_attention import problem
from test_packed import CHUNK, ids_of, make_plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cptrain.context_parallel import all_gather, attention, carrier, hops, launches, memory_order, packed_batch, parts
from cptrain.context_parallel.packed_batch import COMPARED

OPERATORS = {
    torch.ops.cptrain.attention.default: attention.attention,
    torch.ops.cptrain.attention_backward.default: attention.attention_backward,
}
# What needs values of a tensor on the host.
# Without a tensor given, or with one of no numbers, these may be anywhere.
FRESH = {f"aten::{name}" for name in ("empty", "empty_strided", "new_empty", "new_zeros", "zeros", "ones", "full")}
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


class Device(TorchDispatchMode):
    """Takes tensors for those of a device: what it is told of, what is made of these, and empty ones that they meet.

    They may not be read by the host, nor meet a tensor of the host, which must be sent before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[torch.Tensor] = []  # lest other tensors get their memory
        self._there: set[int] = set()
        self._fresh: set[int] = set()
        self.num_sent = 0

    def take(self, *tensors: torch.Tensor) -> None:
        self._held += tensors
        self._there |= {_memory(x) for x in tensors}

    def has(self, x: torch.Tensor) -> bool:
        return _memory(x) in self._there

    def send(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert not self.has(x), "it is there already"
        self.num_sent += 1
        sent = x.clone()
        self.take(sent)
        return sent

    def refuse(self, x: torch.Tensor, what: str) -> None:
        assert not self.has(x), f"the host waits for the device: {what} of {tuple(x.shape)}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.numel()]
        there = [x for x in given if self.has(x)]
        fresh, here = self._fresh & {_memory(x) for x in given}, []
        self._fresh -= fresh  # until it is known whom it has met
        if func in OPERATORS:
            with self:
                found = OPERATORS[func]._init_fn(*args, **kwargs)
        else:
            name = func._schema.name
            if name in READS:
                for x in there:
                    self.refuse(x, name)
            here = [x for x in given if not self.has(x) and x.dim() and _memory(x) not in fresh]
            if there and name.startswith("aten::"):
                assert not here, f"{name}: a tensor of the host {tuple(here[0].shape)} meets the device's; send it"
            found = func(*args, **kwargs)
        results = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        if there:
            self.take(*results, *(x for x in given if _memory(x) in fresh))
        elif not here and (given or func._schema.name in FRESH):
            self._held += results
            self._fresh |= fresh | {_memory(x) for x in results}
        return found


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextmanager
def as_on_a_device() -> Iterator[Device]:
    """CPU tensors as a device's, with hops computed together and tokens stored first as there."""
    device = Device()
    caches = (launches._index, launches.segments, all_gather._chunk_orders)
    with ExitStack() as stack:
        for module in (launches, packed_batch, all_gather):
            stack.enter_context(mock.patch.object(module, "send", device.send))
        stack.enter_context(mock.patch.object(hops, "COPIES_ARE_DEAR", frozenset()))
        for module in (memory_order, carrier, parts):
            stack.enter_context(mock.patch.object(module, "by_head", return_value=False))
        arange = torch.arange

        def numbers(*ends: Any, **named: Any) -> torch.Tensor:
            made = arange(*ends, **named)
            if "device" in named:
                device.take(made)
            return made

        stack.enter_context(mock.patch.object(torch, "arange", numbers))
        for name in ("tolist", "numpy", "cpu", "item"):
            original = getattr(torch.Tensor, name)

            def read(x: torch.Tensor, *arguments: Any, name: str = name, original: Any = original, **named: Any) -> Any:
                device.refuse(x, name)
                return original(x, *arguments, **named)

            stack.enter_context(mock.patch.object(torch.Tensor, name, read))
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        yield device


@pytest.mark.parametrize("window_size", [None, 5])
@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {}), (4, {"ring": 4}), (4, {"ring": 4, "method": "all_gather"}), (4, {"ring": 2, "ulysses": 2})],
    ids=str,
)
def test_host_does_not_wait_in_a_step_over_packed_documents(monkeypatch, ranks, options, window_size) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    from simulated_group import simulated_ranks

    length = 4 * CHUNK * ranks
    inputs = problem(8, 4, length=length, batch=1)
    with simulated_ranks(ranks // 2, ranks, torch.device("cpu")):
        plan = make_plan(kernel="reference", **options)
        plan._entered.num_compared = [COMPARED] * 2  # which wait, for the first batches of a plan
        for name in ("a", "off chunk edges", "long and short"):
            with as_on_a_device() as device, device:
                device.take(*inputs)
                batch = plan.pack(ids_of((name,), length))
                q, k, v, dout = batch.shard(*inputs, dim=2)
                with batch:
                    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
                    out = plan.attention(q, k, v, is_causal=True, window_size=window_size)
                    torch.autograd.grad(out, (q, k, v), dout)
            assert device.num_sent > 4, "of each of four tensors, the tokens that are taken, and more of the launches"


def test_host_does_not_wait_sees_what_waits() -> None:
    with as_on_a_device() as device, device:
        x = torch.arange(6.0).view(2, 3)
        device.take(x)
        y = torch.zeros(2, 3, device="cpu") + x
        for wait in (
            lambda: y.sum().item(),
            lambda: int(y[0, 0]),
            y.tolist,
            lambda: y.nonzero(),
            lambda: bool(y.any()),
        ):
            with pytest.raises(AssertionError, match="the host waits"):
                wait()
        with pytest.raises(AssertionError, match="send it"):
            y.index_select(0, torch.tensor([1]))
        assert y.index_select(0, launches.send(torch.tensor([1]), y.device)).shape == (1, 3)
