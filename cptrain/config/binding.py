"""TOML files and flags into a frozen dataclass, with every problem reported at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from cptrain.config.error import ConfigError, render
from cptrain.config.keypath import KeyPath, key_path, key_text
from cptrain.config.overrides import Flag, cut, overrides_of
from cptrain.config.schema import MISSING, default_of, fields_of, keys
from cptrain.config.setting import Problem
from cptrain.config.source import Given, Unreadable, merge, read
from cptrain.config.suggestions import did_you_mean
from cptrain.config.values import (
    Mismatch,
    convert,
    describe,
    fits,
    from_text,
    is_section,
    members,
    samples,
    table_type,
    toml_text,
)

Root = TypeVar("Root")


def load(
    root_type: type[Root],
    files: Sequence[Path] = (),
    *,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    presets: Path | None = None,
) -> Root:
    """The settings that the files (later wins, key by key) and then the flags give; ConfigError with all problems.

    overrides: a command line of `--section.key value` only. world_size: what the root's `problems(world_size)` gets,
    None where it is not known. presets: the folder whose files messages call by their bare name.
    """
    return bind(root_type, files, cut(overrides), world_size=world_size, presets=presets)


def bind(
    root_type: type[Root],
    files: Sequence[Path],
    flags: Sequence[Flag],
    *,
    world_size: int | None,
    presets: Path | None,
    problems: Sequence[str] = (),
    complete: bool = True,
) -> Root:
    """`load` for a command line that is cut already. `problems` found before come first in the error.

    complete: whether all files are at hand. What a missing one would have set is unknown, and checks of the rest would
    blame the wrong keys, so then only what is given is looked at.
    """
    found = list(problems)
    given: dict[KeyPath, Given] = {}
    for path in files:
        try:
            given = merge(given, read(path, path.name if path.parent == presets else str(path)))
        except Unreadable as error:
            found.append(str(error))
            complete = False
    known = keys(root_type)
    overrides, flag_problems = overrides_of(flags, known)
    given = merge(given, overrides)

    def bound(stand_ins: Mapping[KeyPath, Any]) -> tuple[Any, _Binding]:
        binding = _Binding(given, [*found, *flag_problems], stand_ins)
        root = binding.section(root_type, (), None)
        binding.report_unknown([key.path for key in known])
        if complete:
            binding.check(world_size)
        return root, binding

    root, binding = bound({})
    # What a value of the wrong type was meant to be is not known. Its default stands in, so that the checks go on, and
    # what they say counts only if they say it with other values in its place too: the rest may rest on the stand-in.
    others = [bound({path: value})[1].problems for path, hint in binding.mistyped.items() for value in samples(hint)]
    if lasting := [problem for problem in binding.problems if all(problem in other for other in others)]:
        raise ConfigError(lasting)
    return root


class _Binding:
    """One pass over the given leaves. What does not bind is MISSING, and the rest goes on.

    stand_ins: for values of the wrong type, in place of the default.
    """

    def __init__(self, given: dict[KeyPath, Given], problems: list[str], stand_ins: Mapping[KeyPath, Any]) -> None:
        self.given, self.problems, self.stand_ins = given, problems, stand_ins
        self.mistyped: dict[KeyPath, Any] = {}  # with their types
        self.used: set[KeyPath] = set()
        self.sections: list[tuple[KeyPath, Any]] = []  # those that bound, innermost first, the root last

    def section(self, section_type: type, path: KeyPath, base: Any) -> Any:
        """The section at a path, with `base` (an instance, or None) for what is not given."""
        self.used.add(path)
        values = {
            field.name: self._value(hint, (*path, field.name), default_of(field, base))
            for field, hint in fields_of(section_type)
        }
        if path in self.given and self.given[path].value != {}:
            self._refuse(
                path, "is a section, not a value", f"set its keys, as in `{key_text(path)}.{next(iter(values))}`"
            )
            return MISSING
        if any(value is MISSING for value in values.values()):
            return MISSING
        section = section_type(**values)
        self.sections.append((path, section))
        return section

    def _value(self, hint: Any, path: KeyPath, default: Any) -> Any:
        if is_section(hint):
            return self.section(hint, path, None if default is MISSING else default)
        self.used.add(path)
        table = table_type(hint)
        if table is not None and (count := len({p[len(path)] for p in self._beneath(path)})):
            items = [self.section(table, (*path, index), None) for index in range(count)]
            return MISSING if any(item is MISSING for item in items) else tuple(items)
        if path in self.given:
            try:
                return convert(self.given[path].value, hint)
            except Mismatch:
                self._refuse(path, f"must be {describe(hint)}", _nearest(self.given[path].value, hint))
                self.mistyped[path] = hint
                return self.stand_ins.get(path, default) if samples(hint) and default is not MISSING else MISSING
        if default is MISSING:
            self.problems.append(render(key_text(path), f"has to be set; must be {describe(hint)}"))
        return default

    def _beneath(self, path: KeyPath) -> list[KeyPath]:
        """The given paths inside an array of tables."""
        n = len(path)
        return [given for given in self.given if given[:n] == path and len(given) > n and isinstance(given[n], int)]

    def report_unknown(self, known: Sequence[str]) -> None:
        """Refuses what was given and nothing asked for."""
        for path in self.given:
            if path not in self.used:
                self._refuse(path, "unknown key", did_you_mean(key_text(path), known))

    def _refuse(self, path: KeyPath, rule: str, fix: str) -> None:
        given = self.given[path]
        value = None if given.value == {} else given.value
        self.problems.append(render(key_text(path), rule, fix, value=value, where=given.source.where(path)))

    def check(self, world_size: int | None) -> None:
        """Adds what `problems()` of each bound section says, and `problems(world_size)` of the root."""
        for path, section in self.sections:
            if not hasattr(section, "problems"):
                continue
            found: list[Problem] = []
            try:
                for problem in section.problems() if path else section.problems(world_size):
                    found.append(problem)
            except Exception:
                # A check may stumble over a value that was refused before (a degree of 0): the refusal is what helps.
                if not self.problems and not found:
                    raise
            self.problems.extend(self._rendered(problem, path, section) for problem in found)

    def _rendered(self, problem: Problem, section_path: KeyPath, section: Any) -> str:
        """A problem with its whole path, its value and where that was written."""
        inner, value = key_path(problem.key), section
        for part in inner:
            value = value[part] if isinstance(part, int) else getattr(value, part)
        path = (*section_path, *inner)
        is_tables = isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])
        if dataclasses.is_dataclass(value):  # the section as a whole is at fault
            return render(key_text(path), problem.rule, problem.fix)
        # An item of a list was written where the list was, an array of tables where its first key was.
        holders = [*(path[:n] for n in range(len(path), 0, -1)), *self._beneath(path)]
        where = next((self.given[p].source.where(p) for p in holders if p in self.given), "default")
        return render(key_text(path), problem.rule, problem.fix, value=None if is_tables else value, where=where)


def _nearest(value: Any, hint: Any) -> str:
    """The value that was probably meant, as a question; "" where nothing is near."""
    number = from_text(value, float) if isinstance(value, str) else value  # a flag's 1e3 is text
    meant: Any = int(number) if isinstance(number, float) and number.is_integer() else [value]
    if isinstance(value, str) and not fits(meant, hint):
        choices = [str(choice) for m in members(hint) if get_origin(m) is Literal for choice in get_args(m)]
        meant = from_text(next(iter(get_close_matches(value.lower(), choices, n=1)), value), hint)
        meant = meant if fits(meant, hint) else [value]
    return f"did you mean {toml_text(meant)}?" if fits(meant, hint) else ""
