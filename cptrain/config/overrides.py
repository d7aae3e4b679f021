"""Settings on the command line: `--training.steps 20`, `--compile.no-enable`, `--data.paths a,b`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_origin

from cptrain.config.error import render
from cptrain.config.keypath import KeyPath, flatten
from cptrain.config.schema import Key
from cptrain.config.source import Given, Source, merge
from cptrain.config.suggestions import did_you_mean
from cptrain.config.values import describe, from_text, list_from_texts, members, table_type


@dataclasses.dataclass(frozen=True)
class Flag:
    """One `--name` as it was written, and the texts that follow it. Text before the first flag has the flag ""."""

    written: str
    texts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.written[2:].replace("-", "_")


class _BadFlag(Exception):
    """A flag that sets nothing; the message is a whole rendered problem."""


def cut(argv: Iterable[str]) -> list[Flag]:
    """A command line, flag by flag. Only `--` opens a flag: `-1` is a value."""
    flags: list[Flag] = []
    for argument in argv:
        if argument.startswith("--"):
            written, equals, text = argument.partition("=")
            flags.append(Flag(written, (text,) if equals else ()))
        elif flags:
            flags[-1] = dataclasses.replace(flags[-1], texts=(*flags[-1].texts, argument))
        else:
            flags.append(Flag("", (argument,)))
    return flags


def overrides_of(flags: Iterable[Flag], known: Sequence[Key]) -> tuple[dict[KeyPath, Given], list[str]]:
    """The leaves that flags give (the last one wins), and the problems of flags that give none.

    A value of the wrong type is passed on as it was written: the binding refuses it like one from a file.
    """
    hints = {key.path: key.hint for key in known if "[]" not in key.path}  # an array of tables is set as a whole
    leaves: dict[KeyPath, Given] = {}
    problems: list[str] = []
    for flag in flags:
        try:
            key, value = _read(flag, hints)
        except _BadFlag as error:
            problems.append(str(error))
        else:
            source = Source(f"flag {flag.written}")
            later = {path: Given(leaf, source) for path, leaf in flatten(value, tuple(key.split(".")))}
            leaves = merge(leaves, later)
    return leaves, problems


def _read(flag: Flag, hints: Mapping[str, Any]) -> tuple[str, Any]:
    """(key, value) of one flag."""
    where, count = f"flag {flag.written}", len(flag.texts)
    if not flag.name:
        raise _BadFlag(render(" ".join(flag.texts) or flag.written, "is no flag", "write --section.key value"))
    section, _, name = flag.name.rpartition(".")
    positive = f"{section}.{name.removeprefix('no_')}".removeprefix(".")
    if flag.name not in hints and name.startswith("no_") and bool in members(hints.get(positive)):
        if count:
            meant = {"true": "false", "false": "true"}.get(flag.texts[0].lower(), "false")
            raise _BadFlag(render(flag.written, "takes no value", f"write --{positive}={meant}"))
        return positive, False
    if flag.name not in hints:
        text = " ".join(flag.texts) or None
        raise _BadFlag(render(flag.name, "unknown key", did_you_mean(flag.name, [*hints]), value=text, where=where))
    hint = hints[flag.name]
    if count == 1:
        return flag.name, from_text(flag.texts[0], hint)
    if count and get_origin(hint) is tuple and not table_type(hint):
        return flag.name, list_from_texts(list(flag.texts), hint)
    if count:
        fix = f"remove {' '.join(flag.texts[1:])}, or quote a value that has spaces"
        raise _BadFlag(render(flag.name, f"takes one value, not {count}", fix, where=where))
    if bool in members(hint):
        return flag.name, True
    fix = f"write {flag.written}=value"
    raise _BadFlag(render(flag.name, f"needs a value: {describe(hint)}", fix, where=where))
