"""What a run goes on with, against what its checkpoint was trained with."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any

from cptrain.models.shape import ModelShape

logger = logging.getLogger(__name__)


def check_same_data(ours: dict[str, Any], theirs: dict[str, Any], *, job: str) -> None:
    """ValueError if a run would go on from a checkpoint that read other data, or the same in another order.

    ours, theirs: `Windows.identity`; theirs is empty where there is no checkpoint.
    """
    if was := _differences(ours, theirs):
        raise ValueError(
            f"cannot resume job.name = {job}: its checkpoint was trained with {was}, which decides the order of the "
            "data; restore these, or choose another job.name for a new run"
        )


def warn_of_other_shape(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Name what tensors of equal shapes do not tell apart: heads, rope, windows.

    ours, theirs: `plain_shape`; theirs is empty where there is no checkpoint, or one that does not say it.
    Only a warning: a longer context is trained with another rope_theta.
    """
    if was := _differences(ours, theirs):
        logger.warning(f"resuming a model that was trained with other settings: {was}")


def plain_shape(shape: ModelShape) -> dict[str, Any]:
    """The shape as a checkpoint keeps it."""
    return json.loads(json.dumps(asdict(shape)))


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The keys that differ, with both values; "" where theirs is empty."""
    return ", ".join(
        f"{key} = {theirs.get(key, 'unset')} (here {ours.get(key, 'unset')})"
        for key in {**theirs, **ours}
        if theirs and theirs.get(key) != ours.get(key)
    )
