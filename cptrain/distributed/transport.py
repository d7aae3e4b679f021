"""Messages between the ranks of one group: ring hops and all-to-all. No other file sends point to point.

Groups are passed by name, as torch's functional collectives do, so that a custom operator can carry them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    return _resolve_process_group(group_name)  # type: ignore[arg-type]


def group_size(group_name: str) -> int:
    """How many ranks the group has; "" is the group of this rank alone."""
    return resolve(group_name).size() if group_name else 1


def group_rank(group_name: str) -> int:
    """This rank's place in the group; "" is the group of this rank alone."""
    return resolve(group_name).rank() if group_name else 0


class Rotation:
    """Ring hops over one communicator: `post` a send and a receive, compute, then `wait`.

    step = +1 sends to the next rank and receives from the previous one, -1 the other way. One hop is in flight at a
    time. Both directions go into one batch: a send that waits for a receive posted later would deadlock a ring on NCCL,
    whose operations of one communicator run in order.
    """

    def __init__(self, group_name: str, *, step: int) -> None:
        group = resolve(group_name)
        size, rank = group.size(), group.rank()
        self._group = group
        # P2P peers are global ranks, also when the group is not the world.
        self._destination = dist.get_global_rank(group, (rank + step) % size)
        self._source = dist.get_global_rank(group, (rank - step) % size)
        self._works: list[dist.Work] = []
        self._held: tuple[torch.Tensor, ...] = ()

    def post(self, *, send: torch.Tensor, receive: torch.Tensor) -> None:
        """Start one hop. Neither contiguous tensor may be written before `wait`."""
        assert not self._works, "one hop at a time"
        self._held = (send, receive)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, send, self._destination, group=self._group),
                dist.P2POp(dist.irecv, receive, self._source, group=self._group),
            ]
        )

    def wait(self) -> None:
        """End the hop in flight, if any. On CUDA the current stream waits, not the host."""
        for work in self._works:
            work.wait()
        self._works = []
        self._held = ()


def all_to_all(group_name: str, send: torch.Tensor) -> torch.Tensor:
    """Slice p of the result is what rank p sent here: slice r of its `send`. Shape [P, ...], contiguous."""
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=resolve(group_name))
    return receive


def warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make the first use of a group a collective of all its ranks, as NCCL wants before any point-to-point."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
