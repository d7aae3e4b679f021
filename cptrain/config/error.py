"""The one error for everything wrong with the settings, and how a program ends on it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import NoReturn, TextIO

from cptrain.config.launcher import is_first_on_host, rank_name
from cptrain.config.values import toml_text

_LONGEST_VALUE = 60  # characters


class ConfigError(ValueError):
    """All problems of the settings at once. problems: one line of text each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        return "\n  ".join([f"{count} problem{'s' if count > 1 else ''} in the settings:", *self.problems])


def render(key: str, rule: str, fix: str = "", *, value: object = None, where: str = "") -> str:
    """`key = value (where): rule; fix`, without the parts that are not given."""
    text = "" if value is None else toml_text(value)
    if len(text) > _LONGEST_VALUE:
        text = text[: _LONGEST_VALUE - 3] + "..."
    return key + (f" = {text}" if text else "") + (f" ({where})" if where else "") + f": {rule}" + (fix and f"; {fix}")


def fail(
    error: Exception,
    *,
    on_all: bool = True,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    head_start_s: float = 3.0,
) -> NoReturn:
    """Ends the process with exit code 2 and the message on stderr, without a traceback, from one rank per host.

    The other ranks wait `head_start_s` first: torchrun kills all ranks as soon as one has ended, and the one that
    speaks may be the slowest to get here. Its end then ends theirs at once.
    on_all: every rank has this error. If it may be one's own, whoever is not ended by then speaks, too (where no
    torchrun ends the others, all that share it do).
    """
    speaks, rank = is_first_on_host(environ), rank_name(environ)
    if not speaks:
        time.sleep(head_start_s)
    if speaks or not on_all:
        name = "" if on_all or rank in ("", "0") else f"[rank {rank}] "
        print(f"{name}{error}", file=stream or sys.stderr, flush=True)
    raise SystemExit(2)
