"""The pool itself: a job sees its ranks, and a failing rank is heard at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist


def add_ranks(rank: int, world: int, offset: int) -> int:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return int(total)


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("planted on rank 1")
    dist.barrier()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_pool_gives_each_job_its_own_group(pool, world):
    assert pool.run(world, add_ranks, 10) == [sum(range(world)) + 10 * world] * world


def test_pool_raises_the_failing_rank_while_others_wait(pool):
    with pytest.raises(AssertionError, match="rank 1 of 2: ValueError: planted on rank 1"):
        pool.run(2, fail_on_one)
    assert pool.run(2, add_ranks, 0) == [1, 1]
