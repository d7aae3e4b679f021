"""Starting and ending the default process group, with or without a launcher."""

from __future__ import annotations

import os
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

from cptrain.config.launcher import announced_ranks, rank_name, whole_number
from cptrain.distributed.settings import CommConfig
from cptrain.distributed.shared_gloo import shared_gloo
from cptrain.distributed.transport import be_patient

Result = TypeVar("Result")


def rank_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun announces them, or srun without it; (0, 1) where neither started this process.

    RuntimeError where a launcher leaves out what ranks find each other by.
    """
    name, text = announced_ranks()
    world_size = whole_number(name, text or "1")
    if world_size == 1:
        return 0, 1
    rank = rank_name()
    found = {"RANK": rank, **{key: os.environ.get(key) for key in ("MASTER_ADDR", "MASTER_PORT")}}
    if missing := [key for key, value in found.items() if not value]:
        raise RuntimeError(
            f"{name} = {world_size}, but {', '.join(missing)} not set: ranks do not find each other; start them with "
            f"torchrun, as launch/slurm.sbatch does, or unset {name} for one rank"
        )
    return whole_number("RANK", rank), world_size


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
