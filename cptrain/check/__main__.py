"""`torchrun --nproc-per-node N -m cptrain.check --config NAME [--section.key value]`; without torchrun, one rank.

Runs the configuration of a training at toy width on its own mesh and device, and compares it with one rank. Ends with
0 if everything agrees, 1 if not, 2 for settings that cannot work.
"""

from __future__ import annotations

from functools import partial

from cptrain.train.__main__ import start
from cptrain.train.settings import TrainSettings


def _run(settings: TrainSettings) -> None:
    from cptrain.check.run import run

    raise SystemExit(0 if run(settings, partial(print, flush=True)) else 1)


def main() -> None:
    """Check what the command line says."""
    start("python -m cptrain.check", _run)


if __name__ == "__main__":
    main()
