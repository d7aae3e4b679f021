"""What a component needs to describe its settings: `setting` for a field, `Problem` for what is wrong with one."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and one line of help (with the unit), which `--help` prints."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a setting.

    key: the field's name inside its own dataclass ("seq_len"), or a whole path ("training.seq_len") from the root.
    rule: what is needed, as a statement ("must be positive", "64 kv heads allow 1, 2, 4").
    fix: one way out ("set it to 8192"), or "" where the rule already says it.
    The loader adds the section, the value and where it was written (file:line or flag).
    """

    key: str
    rule: str
    fix: str = ""
