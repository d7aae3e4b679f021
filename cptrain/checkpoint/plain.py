"""The plain values of a run as JSON that people can read and that gives back every float bit for bit."""

from __future__ import annotations

import json
import math
from typing import Any

_FLOAT = "float"


def encode(state: dict[str, Any]) -> str:
    """JSON of int, float, str, bool, None, lists and dicts of these; ValueError names what is anything else."""
    return json.dumps(_plain(state, "train_state"), indent=1, allow_nan=False) + "\n"


def decode(text: str) -> dict[str, Any]:
    """What `encode` was given, of equal types and bits."""
    return json.loads(text, object_hook=_revive)


def _plain(value: Any, path: str) -> Any:
    # Exact types: a numpy.float64 is a float, and a namedtuple a list, that would come back as something else.
    if type(value) is float:
        # repr gives back every finite float; JSON has no words for the others.
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if value is None or type(value) in (int, str, bool):
        return value
    if type(value) is list:
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if type(value) is dict and not any(type(key) is not str for key in value) and value.keys() != {_FLOAT}:
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    raise ValueError(
        f"{path} is a {type(value).__name__} ({value!r:.80}): only int, float, str, bool, None, lists and dicts with "
        "str keys are saved; convert it, or pass it as a tensor"
    )


def _revive(found: dict[str, Any]) -> Any:
    return float(found[_FLOAT]) if found.keys() == {_FLOAT} else found
