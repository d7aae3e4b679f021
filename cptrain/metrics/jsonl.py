"""metrics.jsonl: one JSON object per line, for programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

ROLLED_BACK = "metrics.rolled_back.jsonl"


class JsonLines:
    """A file that grows by whole lines, each handed to the system at once.

    Floats keep all their digits. What JSON has no number for is written as the string "nan", "inf" or "-inf", which
    strict parsers accept and Python's `float` reads.

    [Note: lines of steps that are taken again] A run that resumes from step N takes the steps after N a second time. So
    that no step stands in the file twice, opening it with `resumed_step=N` moves every line of a later step, and a line
    torn by a crash, to metrics.rolled_back.jsonl beside it: nothing that was measured is thrown away. The shortened
    file is written next to the old one and renamed over it, after the moved lines are on disk, so a crash in between
    can at worst leave lines in both files. N = 0 is a training from the start: all lines move.
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        if path.exists():
            _roll_back(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; it must have a "step"."""
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """`value` as strict JSON can hold it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _roll_back(path: Path, resumed_step: int) -> None:
    """Move the lines of steps after `resumed_step` out of `path`; see [Note: lines of steps that are taken again]."""
    shorter = path.with_name(path.name + ".tmp")
    moved = 0
    with (
        path.open("rb") as lines,
        shorter.open("wb") as kept,
        path.with_name(ROLLED_BACK).open("ab") as rolled_back,
    ):
        for line in lines:
            if _stands(line, resumed_step):
                kept.write(line)
            else:
                rolled_back.write(line if line.endswith(b"\n") else line + b"\n")
                moved += 1
        for file in (rolled_back, kept):
            file.flush()
            os.fsync(file.fileno())
    if moved:
        os.replace(shorter, path)
        return
    shorter.unlink()
    if path.with_name(ROLLED_BACK).stat().st_size == 0:
        path.with_name(ROLLED_BACK).unlink()


def _stands(line: bytes, resumed_step: int) -> bool:
    """Whether a line is whole and of a step that the resumed run does not take again."""
    try:
        return line.endswith(b"\n") and resumed_step > 0 and json.loads(line)["step"] <= resumed_step
    except (ValueError, KeyError, TypeError):
        return False
