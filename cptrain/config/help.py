"""The texts of `--help` and `--help section`."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from cptrain.config.error import ConfigError, render
from cptrain.config.schema import MISSING, Key, fields_of, keys, summary
from cptrain.config.suggestions import suggest
from cptrain.config.values import describe, is_section, toml_text

_WIDTH = 110  # characters
FLAGS = (
    ("--config NAME...", "a shipped preset or a TOML file; several are merged, the later wins key by key"),
    ("--section.key VALUE", "set one key: --training.steps 20, --training.steps=20, --data.paths a,b"),
    ("--section.no-key", "turn a switch off; --section.key, =true and =false work too"),
    ("--list-configs", "the presets, a line each"),
    ("--print-config", "the resolved configuration as TOML, then stop"),
    ("--dry-run", "check everything and say what would run, then stop"),
    ("--world-size N", "check or print for N ranks (default: WORLD_SIZE of the launcher, else 1)"),
    ("--help [SECTION]", "this text, or the keys of a section with types, defaults and choices"),
    ("--version", "the version"),
)


def help_text(root_type: type, prog: str, topic: str = "") -> str:
    """The overview, or the keys whose path is or begins with `topic`; ConfigError where there is none."""
    known = keys(root_type)
    topic = topic.strip("[]").replace("-", "_")
    if not topic:
        return _overview(root_type, prog, known)
    chosen = [key for key in known if key.path == topic or key.path.startswith((f"{topic}.", f"{topic}[]"))]
    if not chosen:
        sections = list(dict.fromkeys(_section_of(key) for key in known))
        near = suggest(topic, [*sections, *(key.path for key in known)])
        fix = f"did you mean --help {near}?" if near else f"sections are {', '.join(sections)}"
        raise ConfigError([render("--help", "no section or key of this name", fix, value=topic)])
    about = {field.name: summary(hint) for field, hint in fields_of(root_type) if is_section(hint)}
    header = f"[{topic}] {about[topic]}".rstrip() + "\n\n" if topic in about else ""
    return header + "\n".join(_entry(key) for key in chosen)


def _overview(root_type: type, prog: str, known: Sequence[Key]) -> str:
    lines = [f"usage: {prog} --config NAME [NAME...] [--section.key VALUE ...] [flags]", ""]
    lines += [f"  {flag:20} {text}" for flag, text in FLAGS]
    lines += ["", f"sections ({prog} --help SECTION says more):"]
    for field, hint in fields_of(root_type):
        inside = [key.path.removeprefix(f"{field.name}.") for key in known if _section_of(key) == field.name]
        names = ", ".join(name for name in inside if "[]" not in name)
        if is_section(hint):
            lines.append(f"  [{field.name}] {summary(hint)}".rstrip())
        lines.append(fill(names, _WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines) + "\n"


def _entry(key: Key) -> str:
    default = "  (has to be set)" if key.default is MISSING else f" = {toml_text(key.default)}"
    text = f"{key.help.rstrip('.')} ({describe(key.hint)})".lstrip()
    indent = " " * 6
    return f"  {key.path}{default}\n{fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)}\n"


def _section_of(key: Key) -> str:
    return key.path.partition(".")[0]
