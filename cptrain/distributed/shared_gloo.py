"""gloo, with threads that all process groups share and with messages for what it does wastefully.

torch gives every group a gloo device of its own, and each of these has a thread that wakes up a hundred times a second
even if nothing is sent. A run has a dozen groups per rank: with two ranks on two cores, these threads interrupted a
training step of 10 s 4,000 times, for 1 % of it. Here one device serves all groups of the process.

gloo makes a reduce-scatter of an all-reduce, and an all-gather of a ring of copies. Where DTensor asks a group of this
backend for one of the two, each rank sends to the owners what is theirs instead: half the bytes, in a half to a third
of the time (8 MiB over 2 ranks: 5 instead of 12 ms). It is done on return, where gloo would go on beside the caller.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from cptrain.distributed.transport import (
    all_gather,
    all_gather_single,
    reduce_scatter,
    reduce_scatter_single,
    resolve,
)

NAME = "shared_gloo"


@functools.cache
def shared_gloo() -> str:
    """The name of this backend of CPU tensors, for `init_process_group` and `new_group`; torch knows it from now on."""
    dist.Backend.register_backend(NAME, _make_backend, devices=["cpu"])
    # The operators have one kernel for all devices, which stays in place for the others.
    _functional.impl("all_gather_into_tensor", _all_gather, "CPU")
    _functional.impl("reduce_scatter_tensor", _reduce_scatter, "CPU")
    return NAME


def _make_backend(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Backend:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
    options._threads = 2 * len(options._devices)
    options._timeout = timeout
    backend = dist.ProcessGroupGloo(store, rank, size, options)
    backend._set_sequence_number_for_group()
    return backend  # type: ignore[return-value]


@functools.cache
def _devices(interfaces: str) -> list[dist.ProcessGroupGloo.Device]:
    """One for each of the interfaces that GLOO_SOCKET_IFNAME names, separated by commas, as torch makes them."""
    if not interfaces:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]


_functional = torch.library.Library("_c10d_functional", "IMPL")


def _all_gather(own: torch.Tensor, group_size: int, group: dist.ProcessGroup | str) -> torch.Tensor:
    group = _resolved(group)
    parts = own.new_empty(group_size, *own.shape)
    if dist.get_backend(group) == NAME:
        all_gather(parts, own.contiguous(), group)
    else:
        all_gather_single(parts.flatten(0, 1), own.contiguous(), group=group)
    return parts.flatten(0, 1)


def _reduce_scatter(
    whole: torch.Tensor, reduce_op: str, group_size: int, group: dist.ProcessGroup | str
) -> torch.Tensor:
    group = _resolved(group)
    parts = whole.contiguous().unflatten(0, (group_size, -1))
    own = torch.empty_like(parts[0])
    if dist.get_backend(group) == NAME and reduce_op == "sum":
        reduce_scatter(own, parts, group)
    else:
        reduce_scatter_single(own, whole.contiguous(), op=getattr(dist.ReduceOp, reduce_op.upper()), group=group)
    return own


def _resolved(group: dist.ProcessGroup | str) -> dist.ProcessGroup:
    """torch 2.13 passes the group itself, those before it the name."""
    return resolve(group) if isinstance(group, str) else group
