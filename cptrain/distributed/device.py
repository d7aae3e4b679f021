"""Which device this process computes on."""

from __future__ import annotations

import os
import re

import torch

from cptrain.config.launcher import local_rank_name, whole_number


def local_device() -> torch.device:
    """The accelerator of this local rank if there is CUDA, else the CPU; CUDA's current device is set to it.

    RuntimeError where a host has more ranks than GPUs: on all of them, if the launcher says how many there are.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = whole_number("LOCAL_RANK", local_rank_name() or "0")
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


def _ranks_on_host() -> int:
    """Ranks that the launcher started here, 1 where it does not say it."""
    if ranks := os.environ.get("LOCAL_WORLD_SIZE"):
        return whole_number("LOCAL_WORLD_SIZE", ranks)
    # Slurm counts by node, as in "8(x3),4"
    counted = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    by_node = [int(ranks) for ranks, nodes in counted for _ in range(int(nodes or 1))] or [1]
    return by_node[min(int(os.environ.get("SLURM_NODEID") or 0), len(by_node) - 1)]
