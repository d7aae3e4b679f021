"""`torchrun --nproc-per-node N -m cptrain.train --config NAME [--section.key value]`; without torchrun, one rank."""

from __future__ import annotations

import sys

import cptrain
from cptrain.config.command import parse_command_line, show
from cptrain.config.error import ConfigError, fail, is_first_on_host
from cptrain.train.report import describe
from cptrain.train.settings import BYTE_VOCABULARY, TrainSettings


def main() -> None:
    """Check the settings before anything is started, then do what the command line asks."""
    try:
        command = parse_command_line(
            sys.argv[1:], TrainSettings, prog="python -m cptrain.train", version=cptrain.__version__
        )
    except ConfigError as error:
        fail(error)
    settings = command.settings
    if command.action == "dry-run" and settings is not None:
        shape = settings.shape(BYTE_VOCABULARY if settings.tokenizer.name == "byte" else 1)
        stages = [settings.at_stage(index) for index in range(max(1, len(settings.training.stages)))]
        texts = [describe(stage, stage.degrees(command.world_size, shape), shape) for stage in stages]
        if is_first_on_host():
            print("\n\n".join(f"stage {n}\n{text}" for n, text in enumerate(texts, 1)) if len(texts) > 1 else texts[0])
    elif command.action == "run" and settings is not None:
        # Torch is imported only now: help and every error above take a fraction of a second.
        from cptrain.train.run import run

        run(settings)
    else:
        show(command, sys.stdout)


if __name__ == "__main__":
    main()
