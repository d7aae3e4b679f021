"""Where each key of a TOML text is written, which tomli does not tell."""

from __future__ import annotations

from typing import Any

import tomli

from cptrain.config.keypath import KeyPath, flatten

# A statement that spans lines is an array, an inline table or a long string: one of these stands on its last line.
_CLOSING = ("]", "}", '"""', "'''")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every key of a valid TOML text, by its path as `flatten` names it; of section headers too.

    The grammar stays tomli's: a statement reaches from its first line to the first line at which it parses on its own.
    No proper prefix of lines does, because only an open bracket or string lets a statement cross a line.
    """
    found: dict[KeyPath, int] = {}
    table: KeyPath = ()
    tables_in: dict[KeyPath, int] = {}  # how many tables each [[array]] has so far
    lines = text.replace("\r\n", "\n").split("\n")
    start = 0
    for end, line in enumerate(lines, 1):
        if end > start + 1 and not any(mark in line for mark in _CLOSING):
            continue
        statement = "\n".join(lines[start:end])
        parsed = _parsed(statement)
        if parsed is None:
            # Inline tables in an array that is still open: closed by hand, it shows the ones written so far.
            for path, _ in flatten(_parsed(statement + "\n]") or {}):
                found.setdefault((*table, *path), end)
            continue
        if statement.lstrip().startswith("["):
            table = _header(parsed, tables_in)
            found.setdefault(table, end)
        else:
            for path, _ in flatten(parsed):
                in_array = any(isinstance(part, int) for part in path)
                found.setdefault((*table, *path), end if in_array else start + 1)
        start = end
    return found


def _parsed(statement: str) -> dict[str, Any] | None:
    try:
        return tomli.loads(statement)
    except ValueError:
        return None


def _header(parsed: dict[str, Any], tables_in: dict[KeyPath, int]) -> KeyPath:
    """The path that a header opens: a name on the way that is an [[array]] means its latest table."""
    path: KeyPath = ()
    value: Any = parsed
    while value:
        (name, value), *_ = value.items()
        path = (*path, name)
        if isinstance(value, list):
            tables_in[path] = tables_in.get(path, 0) + 1
            value = value[0]
        if path in tables_in:
            path = (*path, tables_in[path] - 1)
    return path
