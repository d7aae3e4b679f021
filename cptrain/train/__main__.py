"""`torchrun --nproc-per-node N -m cptrain.train --config NAME [--section.key value]`; without torchrun, one rank."""

from __future__ import annotations

import sys
from collections.abc import Callable

import cptrain
from cptrain.config.command import parse_command_line, say, show
from cptrain.config.error import ConfigError, fail
from cptrain.train.report import describe
from cptrain.train.settings import TrainSettings


def start(prog: str, run: Callable[[TrainSettings], None]) -> None:
    """Check the settings before anything is started, then do what the command line asks: `run` them, or only print."""
    try:
        command = parse_command_line(sys.argv[1:], TrainSettings, prog=prog, version=cptrain.__version__)
    except ConfigError as error:
        fail(error)
    if command.action == "dry-run" and command.settings is not None:
        say(_dry_run(command.settings, command.world_size), sys.stdout)
    elif command.action == "run" and command.settings is not None:
        run(command.settings)
    else:
        show(command, sys.stdout)


def _dry_run(settings: TrainSettings, world_size: int) -> str:
    """What would run, stage by stage."""
    shape = settings.shape(settings.known_vocabulary)
    stages = [settings.at_stage(index) for index in range(max(1, len(settings.training.stages)))]
    texts = [describe(stage, stage.degrees(world_size, shape), shape) for stage in stages]
    if len(texts) > 1:
        texts = [f"stage {number}\n{text}" for number, text in enumerate(texts, 1)]
    return "\n\n".join(texts) + "\n"


def _run(settings: TrainSettings) -> None:
    # Torch is imported only now: help and every error of the settings take a fraction of a second.
    from cptrain.train.run import run

    run(settings)


def main() -> None:
    """Train as the command line says."""
    start("python -m cptrain.train", _run)


if __name__ == "__main__":
    main()
