"""The [checkpoint] section."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from cptrain.config import Problem, setting

LATEST = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: when they are written, where, how many stay, and which one a run goes on from."""

    enable: bool = setting(True, "write checkpoints, and resume from them")
    folder: str = setting(
        "checkpoint", "where the step-N folders go; a relative path starts at the job's output folder"
    )
    interval: int = setting(500, "steps between two checkpoints")
    keep_latest_k: int = setting(10, "checkpoints to keep, older ones are deleted; 0 keeps all")
    load_step: int = setting(LATEST, "step to resume from; -1 is the newest intact checkpoint, if there is any")

    def problems(self) -> Iterator[Problem]:
        """Everything wrong in this section."""
        if not self.folder.strip():
            yield Problem(key="folder", rule="must name a folder", fix='set it to "checkpoint"')
        if self.interval < 1:
            yield Problem(
                key="interval", rule="must be at least 1 step", fix="to write none, set checkpoint.enable = false"
            )
        if self.keep_latest_k < 0:
            yield Problem(key="keep_latest_k", rule="must not be negative", fix="set it to 0 to keep all")
        if self.load_step < LATEST:
            yield Problem(key="load_step", rule="must be a step, or -1 for the newest", fix="set it to -1")
        if self.load_step > LATEST and not self.enable:
            yield Problem(
                key="load_step",
                rule="nothing is loaded with checkpoint.enable = false",
                fix="leave it out, or set checkpoint.enable to true",
            )

    def below(self, job_folder: Path) -> Path:
        """Where the step-N folders go."""
        return job_folder / os.path.expanduser(self.folder)
