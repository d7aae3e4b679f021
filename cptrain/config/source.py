"""Where settings are written: TOML files and flags."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli

from cptrain.config.error import render
from cptrain.config.keypath import KeyPath, flatten
from cptrain.config.lines import key_lines


@dataclasses.dataclass(frozen=True)
class Source:
    """A TOML file by the name that messages give it, or a flag, which has no text."""

    name: str
    text: str = ""

    @cached_property
    def lines(self) -> dict[KeyPath, int]:
        """The line of each key. Only a message needs it, so a config without problems is not scanned."""
        return key_lines(self.text)

    def where(self, path: KeyPath) -> str:
        """`file:line`, or `flag --name`."""
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        return self.name if line is None else f"{self.name}:{line}"


@dataclasses.dataclass(frozen=True)
class Given:
    """A leaf that somebody wrote."""

    value: Any
    source: Source


class Unreadable(Exception):
    """A file that is not there or not TOML; the message is a whole rendered problem."""


def read(path: Path, name: str) -> dict[KeyPath, Given]:
    """The leaves of a TOML file; `name` is what messages call it."""
    try:
        # A byte order mark, which some editors leave, is not TOML.
        text = path.read_text(encoding="utf-8-sig")
        source = Source(name, text)
        return {leaf: Given(value, source) for leaf, value in flatten(tomli.loads(text))}
    except OSError as error:
        raise Unreadable(render(name, f"cannot be read: {error.strerror}")) from None
    except UnicodeDecodeError as error:
        raise Unreadable(render(name, f"is not UTF-8 text: byte {error.start} ({error.reason})")) from None
    except (ValueError, RecursionError) as error:
        found = re.fullmatch(r"(?s)(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error))
        message, line, column = found.groups() if found else (str(error), "", "")
        if found and not line:
            rows = text.rstrip().split("\n")
            line, column = str(len(rows)), str(len(rows[-1]) + 1)
        at = f"{name}:{line}:{column}" if line else name
        if message[1:2].islower():  # a word of a sentence, not a name like TOML
            message = message[:1].lower() + message[1:]
        raise Unreadable(render(at, f"not valid TOML: {message}")) from None


def merge(earlier: Mapping[KeyPath, Given], later: Mapping[KeyPath, Given]) -> dict[KeyPath, Given]:
    """Both layers, key by key; of a key in both, the later one. An array of tables is replaced as a whole."""
    replaced = {path[:n] for path in later for n, part in enumerate(path) if isinstance(part, int)}
    replaced |= {path for path, given in later.items() if given.value != {}}
    kept = {p: given for p, given in earlier.items() if not any(p[:n] in replaced for n in range(1, len(p) + 1))}
    return {**kept, **later}
