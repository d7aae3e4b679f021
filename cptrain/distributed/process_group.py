"""Starting and ending the default process group, with or without a launcher."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from cptrain.config.launcher import announced_ranks, local_rank_name, rank_name
from cptrain.distributed.settings import CommConfig
from cptrain.distributed.shared_gloo import shared_gloo
from cptrain.distributed.transport import be_patient

Result = TypeVar("Result")


def rank_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun announces them, or srun without it; (0, 1) where neither started this process.

    RuntimeError where a launcher leaves out what ranks find each other by.
    """
    name, text = announced_ranks()
    world_size = _number(name, text or "1")
    if world_size == 1:
        return 0, 1
    rank = rank_name()
    found = {"RANK": rank, **{key: os.environ.get(key) for key in ("MASTER_ADDR", "MASTER_PORT")}}
    if missing := [key for key, value in found.items() if not value]:
        raise RuntimeError(
            f"{name} = {world_size}, but {', '.join(missing)} not set: ranks do not find each other; start them with "
            f"torchrun, as launch/slurm.sbatch does, or unset {name} for one rank"
        )
    return _number("RANK", rank), world_size


@contextmanager
def process_group(comm: CommConfig, device: torch.device) -> Iterator[None]:
    """The default process group while the block runs: gloo on CPU, nccl (and gloo for CPU tensors) on CUDA.

    Ranks are those of `rank_from_environment`, found at MASTER_ADDR and MASTER_PORT; a world of one needs no port.
    Of several ranks on CUDA, one that leaves the block by an error ends there: see `ended_at_once`.
    """
    rank, world_size = rank_from_environment()
    nccl = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if nccl else shared_gloo()
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    with ExitStack() as ends:
        if world_size == 1:
            folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="cptrain-"))
            store = dist.FileStore(str(Path(folder) / "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        ends.callback(dist.destroy_process_group)
        if nccl and world_size > 1:
            ends.enter_context(ended_at_once())
        yield


@contextmanager
def ended_at_once() -> Iterator[None]:
    """An error that leaves the block is told, and ends the process there and then, with 1, or as SystemExit says.

    Where it is not one of all ranks, NCCL waits when it is torn down, at the latest as the interpreter ends, for
    messages of peers that wait for this rank: the error would not be told, and a launcher not learn that a rank failed.
    """
    try:
        yield
    except BaseException as error:
        code = 1
        try:
            if not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, error.__traceback__)
            elif error.code is None or isinstance(error.code, int):
                code = error.code or 0
            else:
                print(error.code, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # whatever becomes of the words
            os._exit(code)


def local_device() -> torch.device:
    """The accelerator of this local rank if there is CUDA, else the CPU; CUDA's current device is set to it.

    RuntimeError, on all ranks of the host, where there are more of them than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = _number("LOCAL_RANK", local_rank_name() or "0")
    ranks, gpus = max(local_rank + 1, _ranks_on_host()), torch.cuda.device_count()
    if ranks > gpus and _sees_its_own_gpus():
        local_rank = 0
    elif ranks > gpus:
        raise RuntimeError(
            f"{ranks} ranks on this host, but {gpus} GPU{'' if gpus == 1 else 's'} found: each rank needs one; start "
            f"{gpus} here, or all on CPU with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _sees_its_own_gpus() -> bool:
    """Whether srun, asked for GPUs by task, shows each rank its own alone."""
    asked = os.environ.get("SLURM_GPUS_PER_TASK") or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    return bool(asked) and "LOCAL_RANK" not in os.environ


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RuntimeError(f"{name} = {text}: must be a whole number, as launchers set it") from None


def _ranks_on_host() -> int:
    """Ranks that the launcher started here, 1 where it does not say it."""
    if ranks := os.environ.get("LOCAL_WORLD_SIZE"):
        return _number("LOCAL_WORLD_SIZE", ranks)
    # Slurm counts by node, as in "8(x3),4"
    counted = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    by_node = [int(ranks) for ranks, nodes in counted for _ in range(int(nodes or 1))] or [1]
    return by_node[min(int(os.environ.get("SLURM_NODEID") or 0), len(by_node) - 1)]


def set_timeouts(seconds: int) -> None:
    """From now on, a collective or a message of any group of this process may take `seconds`."""
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=seconds), group)
    be_patient(timedelta(seconds=seconds))


def first_rank_result(work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, on all ranks; its ValueError, RuntimeError or OSError is raised on all alike."""
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [work(), None]
        except (ValueError, RuntimeError, OSError) as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0)
    result, refusal = outcome
    if isinstance(refusal, Exception):
        try:
            raise refusal
        finally:
            del outcome, refusal  # or the error would hold this frame, which holds the error, and all frames above
    return result  # type: ignore[return-value]
