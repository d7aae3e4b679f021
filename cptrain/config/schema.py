"""What a root dataclass of settings holds: its sections and keys."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from cptrain.config.values import describe, is_section, table_type

MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One setting. path: "training.seq_len", or "training.stages[].seq_len" inside an array of tables."""

    path: str
    hint: Any  # the resolved type
    field: dataclasses.Field[Any]
    default: Any  # MISSING where it has to be given

    @property
    def help(self) -> str:
        return self.field.metadata.get("help", "")


def keys(root_type: type) -> tuple[Key, ...]:
    """Every key of a root in order of declaration, arrays of tables both as a whole and key by key."""
    return tuple(_keys(root_type, "", None))


def fields_of(section_type: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """(field, resolved type) of a section."""
    hints = get_type_hints(section_type)
    return [(field, hints[field.name]) for field in dataclasses.fields(section_type) if field.init]


def default_of(field: dataclasses.Field[Any], base: Any) -> Any:
    """What a field is when nothing is given: the value in `base`, a default instance of its section, where there is
    one; MISSING where it has to be given."""
    if base is not None:
        return getattr(base, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def summary(section_type: type) -> str:
    """The first line of a section's docstring, "" where it has none of its own."""
    doc = section_type.__doc__ or ""
    if doc.startswith(f"{section_type.__name__}("):  # written by dataclass
        return ""
    return re.sub(r"^\[\w+\]:? *", "", doc.strip().split("\n")[0])  # the header is printed beside it


def _keys(section_type: type, prefix: str, base: Any) -> Iterator[Key]:
    for field, hint in fields_of(section_type):
        path, default = prefix + field.name, default_of(field, base)
        if is_section(hint):
            yield from _keys(hint, f"{path}.", None if default is MISSING else default)
            continue
        describe(hint)  # refuses a type that no value could have
        yield Key(path=path, hint=hint, field=field, default=default)
        table = table_type(hint)
        if table is not None:
            yield from _keys(table, f"{path}[].", None)
