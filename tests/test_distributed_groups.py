"""Meshes, process groups and messages: who is beside whom, and what each rank receives."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cptrain.distributed.device import local_device
from cptrain.distributed.mesh import build_meshes
from cptrain.distributed.process_group import (
    first_rank_result,
    process_group,
    rank_from_environment,
    set_timeouts,
)
from cptrain.distributed.settings import CommConfig, Degrees
from cptrain.distributed.transport import (
    Gathering,
    Message,
    Messenger,
    Pair,
    all_to_all,
    end,
    group_rank,
    group_size,
    recorded_messages,
)

CPU = torch.device("cpu")
# every axis is above 1 in one of them, and neighbours differ between the orders
DIVISIONS = [
    (Degrees(dp_replicate=2, ring=2, tp=2), "head_first"),
    (Degrees(dp_replicate=2, dp_shard=2, ulysses=2), "head_first"),
    (Degrees(ring=2, ulysses=2, tp=2), "head_first"),
    (Degrees(dp_shard=2, ring=2, ulysses=2), "context_first"),
]


def check_meshes(rank: int, world: int) -> None:
    for degrees, order in DIVISIONS:
        meshes = build_meshes(degrees, CPU, order=order)
        names = meshes.batch.mesh_dim_names
        assert names == (
            ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")
            if order == "head_first"
            else ("dp_replicate", "dp_shard", "ulysses", "ring", "tp")
        )
        assert [meshes.batch.size(names.index(axis)) for axis in names] == [getattr(degrees, axis) for axis in names]

        # ranks of the whole world by their five coordinates
        places = {int(meshes.batch.mesh[p]): p for p in itertools.product(*map(range, meshes.batch.mesh.shape))}
        here = places[rank]
        peers = [r for r, p in sorted(places.items()) if (p[0], p[4]) == (here[0], here[4])]
        assert dist.get_process_group_ranks(meshes.parameters.get_group("fsdp")) == peers
        assert meshes.tp.mesh.tolist() == [r for r, p in sorted(places.items()) if p[:4] == here[:4]]
        assert meshes.fsdp.mesh_dim_names == (("dp_replicate", "fsdp") if degrees.dp_replicate > 1 else ("fsdp",))
        assert meshes.fsdp.size() == degrees.dp_replicate * degrees.fsdp
        assert meshes.data_rank == here[0] * degrees.dp_shard + here[1]

        # Tensor peers hold the same tokens: a power of two for each place on the other axes, counted once.
        token = sum(coordinate * 2**axis for axis, coordinate in enumerate(here[:4]))
        tokens = {p[:4]: sum(coordinate * 2**axis for axis, coordinate in enumerate(p[:4])) for p in places.values()}
        assert meshes.sum_over_batch(torch.tensor([token, 1])).tolist() == [sum(tokens.values()), len(tokens)]


def test_distributed_meshes_shard_parameters_over_data_and_context_and_count_tensor_peers_once(pool):
    pool.run(8, check_meshes)


def mesh_of_another_world(rank: int, world: int) -> str:
    with pytest.raises(ValueError, match=r"needs 4 ranks") as caught:
        build_meshes(Degrees(ring=4), CPU)
    return str(caught.value)


def test_distributed_mesh_refuses_degrees_of_another_world_on_all_ranks(pool):
    assert all("but the world size is 2" in text for text in pool.run(2, mesh_of_another_world))


def results_of_the_first_rank(rank: int, world: int) -> tuple[str, list[str]]:
    ran_here = []

    def work() -> str:
        ran_here.append(rank)
        return "prepared"

    def fail(error: Exception) -> None:
        raise error

    result = first_rank_result(work)
    assert ran_here == ([0] if rank == 0 else [])
    texts = []
    for error in (ValueError("no text"), RuntimeError("no device"), FileNotFoundError(2, "No such file", "corpus")):
        try:
            first_rank_result(lambda error=error: fail(error))
        except type(error) as caught:
            texts.append(str(caught))
    return result, texts


def test_distributed_result_or_error_of_the_first_rank_reaches_all(pool):
    texts = ["no text", "no device", "[Errno 2] No such file: 'corpus'"]
    assert pool.run(3, results_of_the_first_rank) == [("prepared", texts)] * 3


def hops(rank: int, world: int) -> dict[str, list[int]]:
    """What arrives from each side, with either way of waiting, over all ranks and over every second one."""
    groups = {"all": dist.new_group(list(range(world))), "odd": dist.new_group([1, 3]), "even": dist.new_group([0, 2])}
    name = "even" if rank % 2 == 0 else "odd"
    found = {}
    for label, group in (("all", groups["all"]), ("half", groups[name])):
        place, size = group_rank(group.group_name), group_size(group.group_name)
        received = []
        for step, overlap in itertools.product((1, -1), (True, False)):
            messenger, receive = Messenger(group.group_name, overlap=overlap), torch.full((3,), -1)
            to, source = (place + step) % size, (place - step) % size
            messenger.post(Pair(to, (torch.full((3,), rank),), source, (receive,)))
            second, third = torch.full((2,), -1), torch.full((5,), -1)
            messenger.post(
                Pair(to, (torch.full((2,), rank + 10), torch.full((5,), rank + 20)), source, (second, third)),
                Pair(to, (), source, ()),
            )
            if overlap:
                messenger.wait()
            received.append(int(receive[0]))
            # several pairs may be under way, each of several tensors
            assert second.tolist() == [received[-1] + 10] * 2
            assert third.tolist() == [received[-1] + 20] * 5
            messenger.wait()  # nothing is in flight: does nothing
        found[label] = received
    one_way, receive = Messenger(groups["all"].group_name), torch.full((1,), -1)
    one_way.post(Pair(1, (torch.tensor([rank]),) if rank == 0 else (), 0, (receive,) if rank == 1 else ()))
    one_way.wait()
    found["one way"] = receive.tolist()
    return found


def test_distributed_messages_go_one_rank_on_or_back_in_groups_that_are_not_the_world(pool):
    for rank, found in enumerate(pool.run(4, hops)):
        before, after = (rank - 1) % 4, (rank + 1) % 4
        other = (rank + 2) % 4
        assert found["all"] == [before, before, after, after]
        assert found["half"] == [other] * 4
        assert found["one way"] == [0 if rank == 1 else -1]


def passed_on(rank: int, world: int) -> list[int]:
    """What arrives over three hops that are all under way at once, each sending on what the one before receives."""
    messenger = Messenger(dist.new_group(list(range(world))).group_name)
    held = [torch.full((4,), rank), *(torch.full((4,), -1) for _ in range(3))]
    for send, receive in itertools.pairwise(held):
        messenger.post(Pair((rank + 1) % world, (send,), (rank - 1) % world, (receive,)))
    messenger.wait()
    return [int(x[0]) for x in held[1:]]


def test_distributed_messages_may_send_on_what_is_still_under_way(pool):
    for rank, found in enumerate(pool.run(4, passed_on)):
        assert found == [(rank - hop) % 4 for hop in (1, 2, 3)]


def collect(rank: int, world: int) -> tuple[dict, list, list, list[Message]]:
    name = dist.new_group(list(range(world))).group_name
    with recorded_messages() as messages:
        others = [(rank + step) % world for step in range(1, world)]
        received = {source: torch.empty(2) for source in others}
        end(all_to_all(name, [Pair(to, (torch.full((2,), 10.0 * rank + to),), to, (received[to],)) for to in others]))
        gathering = Gathering(name)
        gathered, works = gathering.post(torch.full((2,), rank))
        end(works)
        waited, nothing = Gathering(name, overlap=False).post(torch.full((2,), rank))
        assert nothing == []
        assert torch.equal(waited, gathered)
        summed = gathering.reduce_scatter(torch.arange(world * 2.0).view(world, 2) * (rank + 1))
    return {source: x.tolist() for source, x in received.items()}, gathered.tolist(), summed.tolist(), messages


def test_distributed_collectives_bring_every_rank_its_part_and_record_the_bytes_that_left(pool):
    for rank, (exchanged, gathered, summed, messages) in enumerate(pool.run(3, collect)):
        assert exchanged == {source: [10 * source + rank] * 2 for source in range(3) if source != rank}
        assert gathered == [[0, 0], [1, 1], [2, 2]]
        assert summed == [6 * (2 * rank), 6 * (2 * rank + 1)]
        kinds = ["all_to_all", "all_gather", "all_gather", "reduce_scatter"]
        assert messages == [Message(kind, num_bytes) for kind, num_bytes in zip(kinds, (16, 32, 32, 16), strict=True)]


def test_distributed_group_without_a_name_is_this_rank_alone():
    assert (group_size(""), group_rank("")) == (1, 0)


def timeouts(rank: int, world: int) -> list[timedelta]:
    other = dist.new_group([0, 1])
    set_timeouts(41)
    return [group._get_backend(CPU).options._timeout for group in (dist.group.WORLD, other)]


def test_distributed_timeouts_are_set_for_every_group(pool):
    assert pool.run(2, timeouts) == [[timedelta(seconds=41)] * 2] * 2


# How a rank of two on GPUs leaves its process group, its exit code, and the end of what it writes to stderr.
ENDS = {
    "e = RuntimeError('no room'); e.add_note('take less'); raise e": (1, "RuntimeError: no room\ntake less\n"),
    "raise KeyboardInterrupt": (1, "KeyboardInterrupt\n"),
    "raise SystemExit(2)": (2, ""),
    "sys.exit('a text')": (1, "a text\n"),
    "sys.exit('')": (1, "\n"),
    "sys.exit()": (0, ""),
    # Where nothing can be told any more it ends, too.
    "sys.stdout.flush(); sys.stdout = open('/dev/full', 'w'); print(); raise OSError('e')": (1, "OSError: e\n"),
    "pass": (0, ""),
}
# Each in a child of one process, since torch takes seconds to import. But for the last, the group cannot be torn down,
# as NCCL's cannot while peers wait for this one.
STUCK = """
import json, os, sys, time
import torch
from cptrain.distributed import process_group
from cptrain.distributed.settings import CommConfig

process_group.dist.init_process_group = lambda *_, **options: None
found = {}
for ends in json.loads(sys.argv[1]):
    process_group.dist.destroy_process_group = lambda: print("torn down") if ends == "pass" else time.sleep(1000)
    child = os.fork()
    if not child:
        for file in (1, 2):
            os.dup2(os.open(f"{sys.argv[2]}/{file}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), file)
        with process_group.process_group(CommConfig(), torch.device("cuda")):
            print("works")
            exec(ends)
        print("went on", flush=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[ends] = code, *(open(f"{sys.argv[2]}/{file}").read() for file in (1, 2))
print(json.dumps(found))
"""


def test_distributed_error_of_one_rank_on_gpus_ends_it_at_once(tmp_path: Path) -> None:
    environ = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    program = [sys.executable, "-c", STUCK, json.dumps(list(ENDS)), str(tmp_path)]
    done = subprocess.run(program, env=environ, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert list(found) == list(ENDS)
    for ends, (code, out, error) in found.items():
        expected, told = ENDS[ends]
        assert (code, out) == (expected, "works\ntorn down\nwent on\n" if ends == "pass" else "works\n"), ends
        assert error.endswith(told) and bool(error) == bool(told), ends


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS += ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
LAUNCHERS += ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK")
FOUND_AT = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", **FOUND_AT}
SALLOC = {"SLURM_NTASKS": "4"}
SRUN = {**SALLOC, "SLURM_PROCID": "3"}


def set_launcher(monkeypatch, variables):
    """An environment with these variables of launchers and no others."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        (TORCHRUN, (1, 2)),
        (SALLOC, (0, 1)),
        (SALLOC | FOUND_AT, (0, 1)),
        (SRUN | FOUND_AT, (3, 4)),
        (SRUN | TORCHRUN, (1, 2)),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
    ],
    ids=["none", "torchrun", "salloc", "salloc with an address", "srun", "torchrun under srun", "one task"],
)
def test_distributed_rank_and_world_size_are_what_the_launcher_says(monkeypatch, variables, expected):
    set_launcher(monkeypatch, variables)
    assert rank_from_environment() == expected


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK, MASTER_ADDR, MASTER_PORT not set"),
        (SRUN, "SLURM_NTASKS = 4, but MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", **SRUN, "MASTER_ADDR": "node1"}, "WORLD_SIZE = 2, but MASTER_PORT not set"),
    ],
)
def test_distributed_launcher_that_leaves_something_out_is_refused_by_name(monkeypatch, variables, told):
    set_launcher(monkeypatch, variables)
    with pytest.raises(RuntimeError, match=f"^{told}: .*start them with torchrun"):
        process_group(CommConfig(), CPU).__enter__()


def test_distributed_process_group_without_a_launcher_is_a_world_of_one_that_ends_with_the_block(monkeypatch):
    set_launcher(monkeypatch, {})
    with process_group(CommConfig(), CPU):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert not dist.is_initialized()
    with pytest.raises(KeyError), process_group(CommConfig(), CPU):
        raise KeyError
    assert not dist.is_initialized()


def test_distributed_device_of_a_host_without_cuda_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == CPU


@pytest.mark.parametrize(
    ("variables", "gpus", "ranks"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, 1, 2),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, 4, 8),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 3, 4),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 3, None),
        ({"SLURM_LOCALID": "5"}, 4, 6),
        ({"SLURM_LOCALID": "5", "SLURM_GPUS_PER_TASK": "1"}, 1, None),
        ({"SLURM_LOCALID": "5", "SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:1"}, 1, None),
        ({"SLURM_LOCALID": "5", "SLURM_TRES_PER_TASK": "cpu:4"}, 1, 6),
        ({"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "6", "SLURM_GPUS_PER_TASK": "1"}, 1, 6),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, 4, None),
        ({}, 1, None),
    ],
)
def test_distributed_host_with_more_ranks_than_gpus_is_refused_on_all_of_them(monkeypatch, variables, gpus, ranks):
    """ranks: that are told of; None where each has a GPU."""
    set_launcher(monkeypatch, variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    if ranks is None:
        assert local_device() == torch.device("cuda", 0)
    else:
        with pytest.raises(RuntimeError, match=f"^{ranks} ranks on this host, but {gpus} GPU.*CUDA_VISIBLE_DEVICES="):
            local_device()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({**TORCHRUN, "RANK": "abc"}, "RANK = abc: must be a whole number"),
        ({**TORCHRUN, "WORLD_SIZE": "2x"}, "WORLD_SIZE = 2x: must be"),
        ({**TORCHRUN, "LOCAL_RANK": "one"}, "LOCAL_RANK = one: must be"),
        ({**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "?"}, r"LOCAL_WORLD_SIZE = \?: must be"),
    ],
)
def test_distributed_ranks_that_are_no_numbers_are_refused_by_name(monkeypatch, variables, told):
    set_launcher(monkeypatch, variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ask = local_device if "LOCAL_RANK" in variables else rank_from_environment
    with pytest.raises(RuntimeError, match=f"^{told}"):
        ask()
