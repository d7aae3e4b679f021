"""The ranks that share a checkpoint, and how they fail together."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Peers:
    """Collectives over one process group; without a group there is one rank and nothing is sent.

    [Note: failing together]
    A rank that raises before a collective leaves the others waiting in it. So whatever may fail on some rank runs
    inside `together`, which ends with one exchange of outcomes: all ranks leave it, or all raise the same message.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"group = None: {dist.get_world_size()} ranks need a process group to agree on a checkpoint; "
                'pass torch.distributed.new_group(backend="gloo")'
            )
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        if group is not None and self.world != dist.get_world_size():
            raise ValueError(
                f"group has {self.world} of {dist.get_world_size()} ranks: a checkpoint holds the state of all ranks; "
                "pass a group of all of them"
            )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def together(self, what: str) -> _Together:
        """A context in which some rank may fail; if one does, every rank raises. See [Note: failing together]."""
        return _Together(self, what)

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in rank order."""
        if self.group is None:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value; what the others pass is ignored."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]


class _Together:
    """Raises RuntimeError on every rank if any rank raised; ValueError if that is what all failing ranks raised."""

    def __init__(self, peers: Peers, what: str) -> None:
        self._peers = peers
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        mine = None if error is None else (isinstance(error, ValueError), _describe(error))
        outcomes = self._peers.gather(mine)
        failures = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
        if not failures:
            return
        if error is not None and not isinstance(error, Exception):
            raise error  # an interrupt stays one on the rank that got it
        message = f"{self._what}: {_summarise(failures, self._peers.world)}"
        raise (ValueError if all(value for value, _ in failures.values()) else RuntimeError)(message) from error


def _describe(error: BaseException) -> str:
    """The message alone where the error is ours to word, with its type in front otherwise."""
    return str(error) if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: {error}"


def _summarise(failures: dict[int, tuple[bool, str]], world: int) -> str:
    """One line per distinct message, with the ranks that it came from."""
    ranks: dict[str, list[int]] = {}
    for rank, (_, text) in failures.items():
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1 and len(failures) == world:
        return next(iter(ranks))
    return "\n".join(f"on rank {', '.join(map(str, who))}: {text}" for text, who in ranks.items())
