"""What a launcher tells the processes it starts, by environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping


def is_first_on_host(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for its host: local rank 0 under torchrun or srun, and any process without either."""
    return (local_rank_name(environ) or "0") == "0"


def local_rank_name(environ: Mapping[str, str] = os.environ) -> str:
    """The rank on its host as the launcher gives it, "" without one."""
    return environ.get("LOCAL_RANK") or environ.get("SLURM_LOCALID", "")


def rank_name(environ: Mapping[str, str] = os.environ) -> str:
    """The rank as the launcher gives it, "" without one."""
    return environ.get("RANK") or environ.get("SLURM_PROCID", "")


def announced_ranks(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The variable that holds how many ranks torchrun, or srun without it, started, and its text; "" without either."""
    name = "WORLD_SIZE"
    if not environ.get(name) and environ.get("SLURM_PROCID"):  # else a shell of salloc, which is no rank
        name = "SLURM_NTASKS"
    return name, environ.get(name, "")


def whole_number(name: str, text: str) -> int:
    """The number that the variable of this name holds. RuntimeError for a text that is none."""
    try:
        return int(text)
    except ValueError:
        raise RuntimeError(f"{name} = {text}: must be a whole number, as launchers set it") from None
