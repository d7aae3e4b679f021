"""`torchrun --nproc-per-node N -m cptrain.check --config NAME [--section.key value]`; without torchrun, one rank.

Runs the configuration of a training at toy width on its own mesh and device, and compares it with one rank. Ends with
0 if everything agrees, 1 if not, 2 for settings that cannot work.
"""

from __future__ import annotations

import sys
from functools import partial

import cptrain
from cptrain.config.command import parse_command_line, show
from cptrain.config.error import ConfigError, fail, is_first_on_host
from cptrain.train.report import describe
from cptrain.train.settings import BYTE_VOCABULARY, TrainSettings


def main() -> None:
    """Check the settings before anything is started, then do what the command line asks."""
    try:
        command = parse_command_line(
            sys.argv[1:], TrainSettings, prog="python -m cptrain.check", version=cptrain.__version__
        )
    except ConfigError as error:
        fail(error)
    settings = command.settings
    if command.action == "dry-run" and settings is not None:
        shape = settings.shape(BYTE_VOCABULARY if settings.tokenizer.name == "byte" else 1)
        if is_first_on_host():
            print(describe(settings, settings.degrees(command.world_size, shape), shape))
    elif command.action == "run" and settings is not None:
        from cptrain.check.run import run

        raise SystemExit(0 if run(settings, partial(print, flush=True)) else 1)
    else:
        show(command, sys.stdout)


if __name__ == "__main__":
    main()
