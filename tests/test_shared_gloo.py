"""gloo whose groups share their threads, and whose reduce-scatters and all-gathers are messages."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from cptrain.distributed.process_group import process_group, set_timeouts
from cptrain.distributed.settings import CommConfig
from cptrain.distributed.shared_gloo import NAME, shared_gloo
from cptrain.distributed.transport import all_gather
from cptrain.parallel.by_messages import AllGather, ReduceScatter

WORLD = 3


def threads_of_three_groups(rank: int, world: int) -> int:
    """How many threads the process has more of, with three groups besides the default one."""
    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir()))
    groups = [dist.new_group(list(range(world))) for _ in range(3)]
    for group in groups:
        dist.all_reduce(torch.ones(1), group=group)
    assert {dist.get_backend(group) for group in groups} == {dist.get_backend()}
    return len(list(tasks.iterdir())) - before


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_all_groups_share_one_thread_that_sends_and_receives(pool):
    # Two of each group call for its collectives.
    assert pool.run(2, threads_of_three_groups, backend="gloo") == [3 * (2 + 1)] * 2, "gloo's own have one each"
    assert pool.run(2, threads_of_three_groups) == [3 * 2] * 2


def test_a_run_on_cpu_has_this_backend(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with process_group(CommConfig(), torch.device("cpu")):
        assert dist.get_backend() == NAME == shared_gloo()


def interface_named(rank: int, world: int, name: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", name)
        group = dist.new_group(list(range(world)))
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        return ones.item()


def test_groups_use_the_interfaces_that_the_environment_names(pool):
    assert pool.run(2, interface_named, "lo") == [2.0, 2.0]
    assert pool.run(2, interface_named, "lo,lo") == [2.0, 2.0]
    with pytest.raises(AssertionError, match="no-such-interface"):
        pool.run(2, interface_named, "no-such-interface")


def asked_of_functional_collectives(rank: int, world: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], set]:
    """What DTensor would get of this rank's tensors, and gloo's collectives that ran for it."""
    group = dist.group.WORLD
    whole = (torch.arange(world * 4 * 2.0).view(world * 4, 2) + 100 * rank).to(dtype)
    # As in a redistribution along the second axis.
    turned = whole.view(2, world * 4).mT.contiguous()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        results = {
            "gathered": functional.wait_tensor(functional.all_gather_tensor(whole, 0, group)),
            "gathered along 1": functional.wait_tensor(functional.all_gather_tensor(turned, 1, group)),
            "scattered": functional.wait_tensor(functional.reduce_scatter_tensor(whole, "sum", 0, group)),
            "scattered along 1": functional.wait_tensor(functional.reduce_scatter_tensor(turned.mT, "sum", 1, group)),
        }
    largest = functional.wait_tensor(functional.reduce_scatter_tensor(whole, "max", 0, group))
    return {**results, "largest": largest}, {e.name for e in profiled.events() if e.name.startswith("gloo:")}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_collectives_that_dtensor_asks_for_are_messages_with_the_same_results(pool, dtype):
    ours = pool.run(WORLD, asked_of_functional_collectives, dtype)
    theirs = pool.run(WORLD, asked_of_functional_collectives, dtype, backend="gloo")
    for rank in range(WORLD):
        assert ours[rank][1] == {"gloo:send", "gloo:recv"}
        assert not theirs[rank][1] & {"gloo:send", "gloo:recv"}, "groups of torch's own backend keep its collectives"
        for name, expected in theirs[rank][0].items():
            torch.testing.assert_close(ours[rank][0][name], expected, rtol=0, atol=0)


def fsdp_gradient(rank: int, world: int, by_messages: bool) -> tuple[torch.Tensor, set]:
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7).double()  # of seven rows the ranks hold 3, 3 and 1
    fully_shard(model, mesh=mesh)
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    if by_messages:
        model.set_custom_all_gather(AllGather())
        model.set_custom_reduce_scatter(ReduceScatter())
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(x).square().sum().backward()
    return model.weight.grad.full_tensor(), {e.name for e in profiled.events() if e.name.startswith("gloo:")}


def test_fsdp_gathers_and_reduces_by_messages_with_the_same_results(pool):
    for (ours, messages), (theirs, collectives) in zip(
        pool.run(WORLD, fsdp_gradient, True), pool.run(WORLD, fsdp_gradient, False), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert messages == {"gloo:send", "gloo:recv"}
        assert collectives and not collectives & messages


def test_fsdp_gradients_are_never_averaged():
    with pytest.raises(NotImplementedError, match="summed here, not averaged"):
        ReduceScatter()(torch.empty(1), torch.empty(1), None, dist.ReduceOp.AVG)


def gathered_late(rank: int, world: int) -> torch.Tensor:
    group = dist.new_group(timeout=timedelta(seconds=1), backend=dist.get_backend())
    set_timeouts(60)
    if rank == 1:
        time.sleep(3)
    parts = torch.empty(world, 1)
    all_gather(parts, torch.full((1,), float(rank)), group)
    return parts.flatten()


def test_messages_may_take_as_long_as_set_timeouts_says(pool):
    for parts in pool.run(2, gathered_late):
        assert parts.tolist() == [0, 1]
