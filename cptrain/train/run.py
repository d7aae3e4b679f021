"""One run from start to end: process group, trainer, resume command."""

from __future__ import annotations

import dis
import io
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import cptrain
from cptrain.config.error import fail
from cptrain.distributed.device import local_device
from cptrain.distributed.host import prepare_host
from cptrain.distributed.process_group import process_group
from cptrain.train.advice import advised
from cptrain.train.memory import ways_out
from cptrain.train.settings import TrainSettings
from cptrain.train.trainer import Trainer

logger = logging.getLogger("cptrain")


def run(settings: TrainSettings) -> None:
    """Train as the settings say. What cptrain itself refuses ends the process with 2, without a traceback."""
    with ExitStack() as ends:
        with worded(), advised(settings.comm, lambda: "nothing else on the device"):
            device = local_device()
            prepare_host(device)
            ends.enter_context(process_group(settings.comm, device))
        _start_logging(dist.get_rank())
        with worded(), advised(settings.comm, lambda: _less_memory(settings, device)):
            trainer = Trainer(settings, device)
        with trainer, worded(), advised(settings.comm, lambda: _less_memory(trainer.stage.settings, device)):
            stopped_by = trainer.train()
        if stopped_by and trainer.step >= settings.training.steps:
            left = "; the validation due after it was cut short, or left out" if settings.validation.enable else ""
            logger.info(f"stopped by {stopped_by} after step {trainer.step}, the last{left}")
        elif stopped_by and settings.checkpoint.enable:
            where = ", on every node and with its --rdzv options," if _num_nodes() > 1 else ""
            logger.info(
                f"stopped by {stopped_by} after step {trainer.step}; the same command{where} goes on from there:"
            )
            logger.info(f"  {resume_command()}")
        elif stopped_by:
            logger.info(
                f"stopped by {stopped_by} after step {trainer.step}; nothing is saved: checkpoint.enable = false"
            )


@contextmanager
def worded() -> Iterator[None]:
    """Ends the process with 2 and the message alone for errors that cptrain raises.

    Others are faults of the code, or of what it stands on, and keep their traceback.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not _raised_here(error):
            raise
        fail(error, on_all=False)


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` of this package is where the error began, and no call from there into compiled code."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    ours = Path(code.co_filename).is_relative_to(Path(cptrain.__file__).parent)
    return ours and dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def _less_memory(settings: TrainSettings, device: torch.device) -> str:
    shape = settings.shape(settings.known_vocabulary)
    return ways_out(settings, settings.degrees(dist.get_world_size(), shape), device.type)


def resume_command() -> str:
    """The command that started this run, as far as a rank can know it."""
    arguments = shlex.join(sys.argv[1:])
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python -m cptrain.train {arguments}"
    nodes = f"--nnodes {_num_nodes()} " if _num_nodes() > 1 else ""
    return f"torchrun {nodes}--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m cptrain.train {arguments}"


def _num_nodes() -> int:
    """Hosts that torchrun started ranks on, 1 without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines for as long as somebody reads them: a run goes on without (`| head`)."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def _start_logging(rank: int) -> None:
    """Rank 0 tells what happens, the others only what is wrong."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to lose a line
    handler = _Lines(sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s  {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
