"""Messages between the ranks of one group: ring hops, all-to-alls, parts to owners. No other file sends point to point.

Groups are passed by name, as torch's functional collectives do, so that a custom operator can carry them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import zip_longest
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group, _world

from cptrain.distributed.standstill import standing_still

Kind = Literal["send", "all_to_all", "all_gather", "reduce_scatter"]

PROBE_BYTES = 128 * 2**20  # of one message that measures a link: a third of a millisecond of the fastest
PROBES = 6


class Message(NamedTuple):
    """One message that this rank took part in, and the bytes of it that left the rank."""

    kind: Kind
    num_bytes: int


_patience: WeakKeyDictionary[dist.ProcessGroup, timedelta] = WeakKeyDictionary()  # must not outlive the group's threads

_record: ContextVar[list[Message] | None] = ContextVar("cptrain_messages", default=None)


@contextmanager
def recorded_messages() -> Iterator[list[Message]]:
    """Fills a list with the messages that this rank sends by this file while the block runs, in order.

    Backward passes inside of the block run in the calling thread: on CUDA they otherwise run in threads that do not see
    the variable.
    """
    messages: list[Message] = []
    token = _record.set(messages)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield messages
    finally:
        _record.reset(token)


def _note(kind: Kind, num_bytes: int) -> None:
    messages = _record.get()
    if messages is not None:
        messages.append(Message(kind, num_bytes))


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    return _resolve_process_group(group_name)  # type: ignore[arg-type]


def group_size(group_name: str) -> int:
    """How many ranks the group has; "" is the group of this rank alone."""
    return resolve(group_name).size() if group_name else 1


def group_rank(group_name: str) -> int:
    """This rank's place in the group; "" is the group of this rank alone."""
    return resolve(group_name).rank() if group_name else 0


class Pair(NamedTuple):
    """What goes to rank `to` of a group, and what comes from rank `source` at the same time: tensors, maybe none."""

    to: int
    send: tuple[torch.Tensor, ...]
    source: int
    receive: tuple[torch.Tensor, ...]


class Messenger:
    """Point-to-point messages over one communicator: `post` pairs of a send and a receive, compute, then `wait`.

    Several may be in flight. Both directions go into one batch: a send that waits for a receive posted later would
    deadlock a ring on NCCL, whose operations of one communicator run in order. With overlap=False `post` itself waits,
    so that the worth of overlapping can be measured.
    """

    def __init__(self, group_name: str, *, overlap: bool = True) -> None:
        self._group = resolve(group_name)
        self._overlap = overlap
        self._works: list[dist.Work] = []
        self._held: list[torch.Tensor] = []

    def post(self, *pairs: Pair) -> None:
        """Start these messages, all at once.

        No contiguous tensor of them may be written before `wait`. What a message in flight receives may be sent on.
        """
        if any(x is held and not _in_order(x) for pair in pairs for x in pair.send for held in self._held):
            self.wait()
        for pair in pairs:
            if pair.send:
                _note("send", sum(x.nbytes for x in pair.send))
            self._held += [*pair.send, *pair.receive]
        with standing_still():
            self._works += _start(self._group, pairs)
        if not self._overlap:
            self.wait()

    def wait(self) -> None:
        """End the messages in flight, if any. On CUDA the current stream waits, not the host."""
        end(self._works)
        self._works = []
        self._held = []


def _start(group: dist.ProcessGroup, pairs: Sequence[Pair]) -> list[dist.Work]:
    operations = []
    for to, send, source, receive in pairs:
        # P2P peers are global ranks, also when the group is not the world.
        for out, there in zip_longest(send, receive):
            if out is not None:
                operations.append(dist.P2POp(dist.isend, out, dist.get_global_rank(group, to), group=group))
            if there is not None:
                operations.append(dist.P2POp(dist.irecv, there, dist.get_global_rank(group, source), group=group))
    if not operations:
        return []
    return dist.batch_isend_irecv(operations)


def end(works: Sequence[dist.Work]) -> None:
    """Wait for messages that were started. On CUDA the current stream does, not the host."""
    if works:
        with standing_still():
            _wait(works)


def be_patient(time: timedelta) -> None:
    """Messages on CPU may from now on take so long, while the default group lasts.

    torch's own way to set a group's timeout reaches gloo's collectives and not its messages. NCCL watches both, and a
    wait that is given a time would block the host.
    """
    world = dist.group.WORLD
    if world is not None and "nccl" not in dist.get_backend():
        _patience[world] = time


def _wait(works: Sequence[dist.Work]) -> None:
    world = dist.group.WORLD
    time = _patience.get(world) if world is not None else None
    for work in works:
        if time is None:
            work.wait()
        else:
            work.wait(time)


def _in_order(send: torch.Tensor) -> bool:
    """Whether a communicator ends one pair of messages before the next begins: NCCL does, on its one stream.

    gloo would send what has not come yet, and so might what torch's debug level DETAIL wraps around NCCL.
    """
    return send.is_cuda and dist.get_debug_level() != dist.DebugLevel.DETAIL


def all_gather_single(*arguments: Any, **options: Any) -> Any:
    """torch's, by its new name where torch has it: it then warns of the old one."""
    return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(*arguments, **options)


def reduce_scatter_single(*arguments: Any, **options: Any) -> Any:
    """torch's, by its new name where torch has it: it then warns of the old one."""
    return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(*arguments, **options)


class Gathering:
    """Collectives that collect one part from every rank while the caller computes: `post`, then `end`."""

    def __init__(self, group_name: str, *, overlap: bool = True) -> None:
        self._group = resolve(group_name)
        self._overlap = overlap

    def post(self, part: torch.Tensor) -> tuple[torch.Tensor, list[dist.Work]]:
        """(parts of all ranks in rank order [N, ...], what to `end` before they are read) of one contiguous part."""
        _note("all_gather", part.nbytes * (self._group.size() - 1))
        parts = part.new_empty(self._group.size(), *part.shape)
        with standing_still():
            works = [all_gather_single(parts.flatten(0, 1), part.contiguous(), group=self._group, async_op=True)]
        if not self._overlap:
            end(works)
            works = []
        return parts, works

    def reduce_scatter(self, parts: torch.Tensor) -> torch.Tensor:
        """This rank's slice of contiguous `parts` [N, ...], summed over all ranks."""
        own = parts.new_empty(parts.shape[1:])
        _note("reduce_scatter", parts.nbytes - own.nbytes)
        with standing_still():
            reduce_scatter(own, parts, self._group)
        return own


def reduce_scatter(own: torch.Tensor, parts: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Write to `own` [...] the sum over ranks of the slice of their contiguous `parts` [N, ...] that is this rank's.

    On CPU by messages: gloo adds everything up on every rank, twice the bytes and 2.5 times the time.
    """
    if parts.device.type != "cpu":
        reduce_scatter_single(own, parts.flatten(0, 1), group=group)
        return
    rank, size = group.rank(), group.size()
    received = parts.new_empty(size - 1, *own.shape)
    steps = [(step, (rank + step) % size, (rank - step) % size) for step in range(1, size)]
    works = _start(group, [Pair(to, (parts[to],), source, (received[step - 1],)) for step, to, source in steps])
    _wait(works)
    torch.sum(received, 0, out=own)
    own += parts[rank]


def all_gather(parts: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Write to contiguous `parts` [N, ...] the contiguous `own` [...] of all ranks; on CPU by messages."""
    if parts.device.type != "cpu":
        all_gather_single(parts.flatten(0, 1), own, group=group)
        return
    rank, size = group.rank(), group.size()
    steps = [((rank + step) % size, (rank - step) % size) for step in range(1, size)]
    works = _start(group, [Pair(to, (own,), source, (parts[source],)) for to, source in steps])
    parts[rank] = own
    _wait(works)


def gather(own: torch.Tensor) -> torch.Tensor:
    """The `own` [...] of all ranks of the default group in rank order [N, ...]."""
    group = dist.group.WORLD
    assert group is not None
    parts = own.new_empty(group.size(), *own.shape)
    all_gather(parts, own.contiguous(), group)
    return parts


def all_to_all(group_name: str, pairs: Sequence[Pair]) -> list[dist.Work]:
    """Start an all-to-all, of a pair for every other rank, and return what to `end`; see `Messenger.post`."""
    _note("all_to_all", sum(x.nbytes for pair in pairs for x in pair.send))
    with standing_still():
        return _start(resolve(group_name), pairs)


def check_same_groups(group: dist.ProcessGroup, device: torch.device) -> None:
    """RuntimeError on all ranks of the group unless they have made equally many process groups so far.

    torch names a group that only its members make after that number; where it differs, they would wait for ever.
    """
    number = len(_world.pg_names)
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    most, fewest = int(bounds[0]), -int(bounds[1])
    if most != fewest:
        raise RuntimeError(
            f"ranks {dist.get_process_group_ranks(group)} belong to between {fewest} and {most} process groups, and "
            "would not agree on the name of the next one; make this plan before groups of some of its ranks"
        )


def link_speed(group_name: str, device: torch.device) -> float:
    """Bytes per second from each rank of a group to the next while all of them send, of the slowest. Collective.

    Measured on CUDA; 0.0 elsewhere, where nothing depends on it.
    """
    if device.type != "cuda":
        return 0.0
    messenger, rank, size = Messenger(group_name), group_rank(group_name), group_size(group_name)
    send, receive = (torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(PROBES)]
    for begin, end in events:
        begin.record()
        messenger.post(Pair((rank + 1) % size, (send,), (rank - 1) % size, (receive,)))
        messenger.wait()
        end.record()
    torch.cuda.synchronize(device)
    # The fastest: the first one makes connections, and a host that is late makes any other slow.
    seconds = min(begin.elapsed_time(end) for begin, end in events) / 1e3
    speed = torch.tensor(PROBE_BYTES / seconds, device=device)
    dist.all_reduce(speed, op=dist.ReduceOp.MIN, group=resolve(group_name))
    return float(speed)


def warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make the first use of a group a collective of all its ranks, as NCCL wants before any point-to-point."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
