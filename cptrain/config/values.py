"""Values of settings: checked against their type, read from a flag's text, written as TOML."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import tomli

_NAMES = ((bool, "true or false"), (int, "an integer"), (float, "a number"), (str, "a string"))


class Mismatch(Exception):
    """A value does not have the type of its setting."""


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is none is its own only alternative."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_section(hint: Any) -> TypeGuard[type]:
    """Whether a type is a dataclass, a section of its own."""
    return dataclasses.is_dataclass(hint)


def table_type(hint: Any) -> type | None:
    """The dataclass of an array of tables, `tuple[Stage, ...]`; None for every other type."""
    args = get_args(hint)
    return args[0] if get_origin(hint) is tuple and is_section(args[0]) else None


def describe(hint: Any) -> str:
    """A type in words, to follow "must be". TypeError for a type that a setting cannot have."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(toml_text, args))
    if get_origin(hint) is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: " + ", ".join(map(describe, args))
    if get_origin(hint) is tuple:
        return "an array of tables" if table_type(hint) else f"a list, each item {describe(args[0])}"
    if len(members(hint)) > 1:
        return " or ".join(map(describe, args))
    for kind, name in _NAMES:
        if hint is kind:
            return name
    raise TypeError(f"a setting cannot be of type {hint}: bool, int, float, str, Literal, tuple and their unions can")


def convert(value: Any, hint: Any) -> Any:
    """The value as its type has it (lists as tuples, integers as floats where those are wanted), else Mismatch."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        if any(type(choice) is type(value) and choice == value for choice in args):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list):
            items = [args[0]] * len(value) if args[-1] is Ellipsis else args
            if len(items) == len(value):
                return tuple(map(convert, value, items))
    elif len(members(hint)) > 1:
        for member in args:
            with contextlib.suppress(Mismatch):
                return convert(value, member)
    elif hint is float:
        if type(value) in (int, float):
            with contextlib.suppress(OverflowError):
                return float(value)
    elif type(value) is hint and not (hint is str and _has_surrogates(value)):
        return value
    raise Mismatch


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a setting."""
    try:
        convert(value, hint)
    except Mismatch:
        return False
    return True


def from_text(text: str, hint: Any) -> Any:
    """The value that a flag's text means for a type; the text itself, for `convert` to refuse, where it means none."""
    if len(members(hint)) > 1:
        candidates = [from_text(text, member) for member in members(hint)]
        return next((value for value in candidates if fits(value, hint) and value != text), text)
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if str(choice).lower() == text.lower()), text)
    if get_origin(hint) is tuple:
        return _list_from_text(text, hint)
    if hint is str:
        parsed = _toml(text) if text[:1] in ("'", '"') else None
        return parsed if isinstance(parsed, str) else text
    with contextlib.suppress(ValueError):
        return {"true": True, "false": False}.get(text.lower(), text) if hint is bool else hint(text)
    return text


def _list_from_text(text: str, hint: Any) -> Any:
    """`["a", "b"]` as TOML reads it, else `[a, b]` or `a,b` cut at the commas."""
    bracketed = text.startswith("[") and text.endswith("]")
    parsed = _toml(text) if bracketed else None
    if isinstance(parsed, list) or table_type(hint):
        return parsed if isinstance(parsed, list) else text
    inner = (text[1:-1] if bracketed else text).strip()
    return list_from_texts([part.strip() for part in inner.split(",")] if inner else [], hint)


def list_from_texts(texts: list[str], hint: Any) -> list[Any]:
    """The items of a list given as several texts, `--data.paths a b`."""
    args = get_args(hint)
    items = [args[0]] * len(texts) if args[-1] is Ellipsis else [*args, *[args[-1]] * len(texts)]
    return [from_text(text, item) for text, item in zip(texts, items, strict=False)]


def samples(hint: Any) -> list[Any]:
    """Values of a type, to see what depends on it: every choice, or some where there is no end. [] for tables."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return list(args)
    if get_origin(hint) is tuple:
        each = [samples(item) for item in args if item is not Ellipsis and not is_section(item)]
        return [tuple(items) for items in zip(*each, strict=False)]
    if len(members(hint)) > 1:
        return [value for member in members(hint) for value in samples(member)]
    some: dict[Any, list[Any]] = {bool: [False, True], int: [1, 2, 3], float: [0.5, 2.0], str: ["a", "b"]}
    return some[hint]


def toml_text(value: Any) -> str:
    """A value as TOML writes it. What TOML cannot hold comes back as Python's repr, for messages only."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves bare.
        return json.dumps(value, ensure_ascii=_has_surrogates(value)).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_text(item)}" for name, item in value.items()) + "}"
    return repr(value)


def _toml(text: str) -> Any:
    try:
        parsed = tomli.loads(f"value = {text}")
    except ValueError:
        return None
    return parsed["value"] if len(parsed) == 1 else None


def _has_surrogates(text: str) -> bool:
    """Whether bytes that are not UTF-8 hide in a text from the command line: no file could hold it."""
    return any("\ud800" <= char <= "\udfff" for char in text)
