"""Ranks that wait for every message as they start it, as without overlap, never wait for each other in a circle."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from cptrain.context_parallel import exchange
from cptrain.context_parallel.exchange import Exchange
from cptrain.context_parallel.mask import Documents
from cptrain.context_parallel.packing import Packing, pack
from cptrain.distributed.transport import Pair


class Ends(NamedTuple):
    """Whom a rank sends to and from whom it receives; None for neither."""

    to: int | None
    source: int | None


class Post(NamedTuple):
    """What a rank starts at once."""

    kind: str
    ends: tuple[Ends, ...]


Half = tuple[str, int, int, int]


class Recorder:
    """Stands for a messenger of one communicator, whose messages all ranks would wait for."""

    def __init__(self, kind: str, posts: list[Post]) -> None:
        self._kind, self._posts = kind, posts

    def post(self, *pairs: Pair) -> None:
        ends = (Ends(pair.to if pair.send else None, pair.source if pair.receive else None) for pair in pairs)
        moving = tuple(each for each in ends if each != (None, None))
        if moving:
            self._posts.append(Post(self._kind, moving))

    def wait(self) -> None:
        pass


def posts_of(packing: Packing, rank: int, which: str, at_once: int) -> list[Post]:
    """The messages of one pass of a rank, in order."""
    posts: list[Post] = []
    size = packing.layout.num_ranks
    with (
        mock.patch.object(exchange, "group_size", return_value=size),
        mock.patch.object(exchange, "group_rank", return_value=rank),
        mock.patch.object(exchange, "Messenger", lambda name, overlap: Recorder(name, posts)),
    ):
        names = {"group": "keys", "grad_group": "gradients"}
        carrier = Exchange(packing.layout, packing.mask(), **names, at_once=at_once, overlap=False)
        k, v = torch.zeros(2, 1, 1, packing.layout.shard_length, 1)
        if which == "forward":
            carrier.forward(k, v, lambda piece: None)
        else:
            carrier.backward(k, v, k.new_empty(0), lambda piece, into=None: [])
    return posts


def are_left(queues: list[list[Post]]) -> bool:
    """Whether some never end, where every rank waits for a message, both ways, before it starts the next."""
    waiting = [halves_of(rank, posts) for rank, posts in enumerate(queues)]
    met: set[Half] = set()
    moved = True
    while moved:
        heads = Counter(half for halves in waiting if halves for half in halves[0])
        before = len(met)
        met |= {half for half, ranks in heads.items() if ranks == 2}
        moved = len(met) > before
        for halves in waiting:
            if halves and halves[0] <= met:
                halves.pop(0)
                moved = True
    return any(waiting)


def halves_of(rank: int, posts: list[Post]) -> list[set[Half]]:
    """What each post waits for: of both directions the kind, from whom, to whom, and the how manieth such it is."""
    counts: Counter[tuple[str, int, int]] = Counter()
    found = []
    for post in posts:
        ways = {way for to, source in post.ends for way in ((post.kind, rank, to), (post.kind, source, rank))}
        found.append({(*way, counts[way]) for way in ways if None not in way})
        counts.update(ways)
    return found


def random_packing(seed: int, ranks: int, chunk_size: int = 8) -> Packing:
    generator, offsets, length = random.Random(seed), [0], 4 * chunk_size * ranks
    while offsets[-1] < length:
        offsets.append(min(length, offsets[-1] + 1 + int(generator.expovariate(1 / generator.choice((3, 10, 30))))))
    return pack(Documents(tuple(offsets)), num_ranks=ranks, num_rows=1, chunk_size=chunk_size)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_message_order_of_an_exchange_lets_no_ranks_wait_for_each_other(ranks, which, at_once):
    for seed in range(15):
        packing = random_packing(seed, ranks)
        queues = [posts_of(packing, rank, which, at_once) for rank in range(ranks)]
        assert any(queues)
        assert not are_left(queues), seed


def test_message_order_that_differs_between_ranks_is_seen():
    first = [Post(kind, (Ends(1, 1),)) for kind in ("keys", "gradients")]
    second = [Post(kind, (Ends(0, 0),)) for kind in ("gradients", "keys")]
    assert are_left([first, second])
    assert not are_left([first, second[::-1]])
