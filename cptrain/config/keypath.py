"""Paths of settings: ("training", "stages", 0, "steps") is written `training.stages[0].steps`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]


def key_text(path: KeyPath) -> str:
    """A path as people write it. A name that TOML would have to quote is quoted, so that it never looks like a path."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[\w-]+", part) else json.dumps(part)
            text += f".{name}" if text else name
    return text


def key_path(text: str) -> KeyPath:
    """The path of a plain written key."""
    return tuple(int(index) if index else name for index, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", text))


def flatten(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of every leaf of parsed TOML. Lists of tables are walked; an empty table is a leaf of its own."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flatten(item, (*path, name))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, (*path, index))
    elif path:
        yield path, value
