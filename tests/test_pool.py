"""The pool itself: a job sees its ranks, and a failing rank is heard at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cptrain.distributed.process_group import set_timeouts


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


def redistribute(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ring",))
    part = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)])
    assert part.full_tensor().shape == (2 * world, 2)
    set_timeouts(60)  # which must not hold on to the groups


def threads(rank: int, world: int) -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_pool_ends_the_threads_of_a_job(pool):
    before = pool.run(2, threads)
    pool.run(2, redistribute)
    assert pool.run(2, threads) == before
