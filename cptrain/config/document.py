"""Resolved settings as TOML."""

from __future__ import annotations

from typing import Any

from cptrain.config.schema import fields_of, summary
from cptrain.config.values import is_section, table_type, toml_text


def dump(root: Any) -> str:
    """TOML that loads to settings equal to `root`, each key with its line of help as a comment."""
    return "\n".join(_table(root, "")).strip() + "\n"


def _table(section: Any, path: str) -> list[str]:
    """The lines of a section: its own keys first, because a header ends them."""
    own: list[str] = []
    inner: list[str] = []
    for field, hint in fields_of(type(section)):
        value, key = getattr(section, field.name), f"{path}{field.name}"
        if is_section(hint):
            inner += ["", *_comment(summary(hint)), f"[{key}]", *_table(value, f"{key}.")]
        elif value and table_type(hint):
            for item in value:
                inner += ["", f"[[{key}]]", *_table(item, f"{key}.")]
        else:
            own.append("  ".join([f"{field.name} = {toml_text(value)}", *_comment(field.metadata.get("help", ""))]))
    return own + inner


def _comment(text: str) -> list[str]:
    return [f"# {' '.join(text.split())}"] if text else []
