"""The command line of a program that is driven by settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Generic, Literal, TextIO, TypeVar

from cptrain.config.binding import bind
from cptrain.config.document import dump
from cptrain.config.error import ConfigError, render
from cptrain.config.help import help_text
from cptrain.config.launcher import announced_ranks, is_first_on_host
from cptrain.config.overrides import Flag, cut
from cptrain.config.preset import find, listing, offer, presets_folder
from cptrain.config.values import from_text

Root = TypeVar("Root")
_OWN = ("config", "list_configs", "print_config", "dry_run", "world_size", "help", "version")
Action = Literal["run", "dry-run", "print-config", "list-configs", "help", "version"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Generic[Root]):
    """What a command line asks for.

    settings: bound and checked; None where the action needs none (list-configs, help, version).
    world_size: the number of ranks they were checked for.
    text: what the action prints; "" for run and dry-run, which are the program's own.
    files: the configuration files in the order they were merged.
    """

    action: Action
    settings: Root | None = None
    world_size: int = 1
    text: str = ""
    files: tuple[Path, ...] = ()


def parse_command_line(
    argv: Sequence[str],
    root_type: type[Root],
    *,
    prog: str,
    version: str = "",
    presets: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Command[Root]:
    """What `argv` (without the program's name) asks for; ConfigError with every problem in it and in its files.

    The world size is --world-size, else the launcher's WORLD_SIZE, or SLURM_NTASKS where srun started this process,
    else 1. A run is refused a --world-size other than the ranks that there are. For --print-config it may stay unknown,
    so that any machine prints any configuration.
    """
    folder = presets or presets_folder()
    flags = cut("--help" if argument == "-h" else argument for argument in argv)
    asked = {flag.name: flag for flag in flags}
    if "help" in asked:
        return Command(action="help", text=help_text(root_type, prog, " ".join(asked["help"].texts)))
    if "list_configs" in asked:
        return Command(action="list-configs", text=listing(folder))
    if "version" in asked:
        return Command(action="version", text=f"{prog} {version}".strip() + "\n")

    action: Action = "print-config" if "print_config" in asked else "dry-run" if "dry_run" in asked else "run"
    misspelt = {flag: near for flag in flags if (near := _nearest_own(flag))}
    problems = [render(flag.written, "unknown flag", f"did you mean {near}?") for flag, near in misspelt.items()]
    switches = [asked[name] for name in ("print_config", "dry_run") if name in asked]
    problems += [render(flag.written, "takes no value") for flag in switches if flag.texts]
    if len(switches) == 2:
        problems.append(render("--print-config", "cannot go with --dry-run", "choose one of them"))
    world_size, world_problems = _world_size(asked.get("world_size"), environ, runs=action == "run")
    if world_size is None and action != "print-config" and not world_problems:
        world_size = 1
    names = [name for flag in flags if flag.name == "config" for name in flag.texts]
    files, file_problems = _files(names, folder)
    settings = bind(
        root_type,
        files,
        [flag for flag in flags if flag.name not in _OWN and flag not in misspelt],
        world_size=world_size,
        presets=folder,
        problems=[*problems, *world_problems, *file_problems],
        complete=not file_problems,
    )
    text = dump(settings) if action == "print-config" else ""
    return Command(action=action, settings=settings, world_size=world_size or 1, text=text, files=tuple(files))


def show(command: Command[Root], stream: TextIO, *, environ: Mapping[str, str] = os.environ) -> None:
    """Writes what the command prints, from one rank per host."""
    say(command.text, stream, environ=environ)


def say(text: str, stream: TextIO, *, environ: Mapping[str, str] = os.environ) -> None:
    """Writes a text, from one rank per host. A reader that has seen enough, as `head` has, is no error."""
    if not is_first_on_host(environ):
        return
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:  # escapes as strings of TOML have them: what --print-config says loads again
        text = "".join(
            c if c.isascii() else f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}" for c in text
        )
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _files(names: Sequence[str], folder: Path) -> tuple[list[Path], list[str]]:
    """The files of all --config arguments, and the problems of those that are not there."""
    if not names:
        return [], [render("--config", "is not given", f"name a preset or a TOML file; {offer(folder)}")]
    files: list[Path] = []
    problems: list[str] = []
    for name in names:
        try:
            files.append(find(name, folder))
        except ConfigError as error:
            problems += error.problems
    return files, problems


def _world_size(flag: Flag | None, environ: Mapping[str, str], *, runs: bool) -> tuple[int | None, list[str]]:
    """The number of ranks, None where nothing tells it or something is wrong with it, and what that is."""
    where, text = announced_ranks(environ)
    if flag is None and not text:
        return None, []
    started = from_text(text or "1", int)
    where, text = (flag.written, " ".join(flag.texts)) if flag else (where, text)
    size = from_text(text, int)
    if not (isinstance(size, int) and size > 0):
        return None, [render(where, "must be an integer of at least 1", value=size)]
    if runs and size != started:
        rule = f"the number of ranks that were started is {started}"
        return None, [render(where, rule, f"start {size} with the launcher, or add --dry-run", value=size)]
    return size, []


def _nearest_own(flag: Flag) -> str:
    """The command's own flag that was nearly written; "" for one that was, and for every other flag."""
    near = [] if flag.name in _OWN or "." in flag.name else get_close_matches(flag.name, _OWN, n=1, cutoff=0.75)
    return f"--{near[0].replace('_', '-')}" if near else ""
