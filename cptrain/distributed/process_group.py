"""Starting and ending the default process group, with or without a launcher."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from cptrain.distributed.settings import CommConfig

Result = TypeVar("Result")


def world_size_from_environment() -> int:
    """Ranks that a launcher (torchrun, or srun without it) announces; 1 without any."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


@contextmanager
def process_group(comm: CommConfig, device: torch.device) -> Iterator[None]:
    """The default process group while the block runs: gloo on CPU, nccl (and gloo for CPU tensors) on CUDA.

    Ranks come from torchrun's RANK / WORLD_SIZE / MASTER_ADDR, or from SLURM_PROCID where srun starts the ranks; with
    neither, this process is a world of one and needs no port.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    with tempfile.TemporaryDirectory(prefix="cptrain-") as folder:
        if world_size_from_environment() == 1:
            store = dist.FileStore(str(Path(folder) / "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
            dist.init_process_group(backend, rank=rank, world_size=world_size_from_environment(), timeout=timeout)
        try:
            yield
        finally:
            dist.destroy_process_group()


def local_device() -> torch.device:
    """The accelerator of this local rank if there is CUDA, else the CPU; CUDA's current device is set to it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def set_timeouts(seconds: int) -> None:
    """From now on, a collective of any group of this process may take `seconds`."""
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=seconds), group)


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
