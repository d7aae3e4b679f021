"""What a run goes on with, against what its checkpoint was trained with."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from typing import Any

from cptrain.data.settings import DataConfig
from cptrain.models.shape import ModelShape
from cptrain.optim.schedule import learning_rate
from cptrain.train.settings import TrainSettings

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
    """Name what tensors of equal shapes do not tell apart: heads, rope, windows, document masks.

    ours, theirs: `plain_shape`; theirs is empty where there is no checkpoint, or says less if an older one.
    Only a warning: a longer context is trained with another rope_theta.
    """
    if was := _differences({key: value for key, value in ours.items() if key in theirs}, theirs):
        logger.warning(f"resuming a model that was trained with other settings: {was}")


def warn_of_other_schedule(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Say where the learning rate does not go on from that of the last step taken, and by which settings.

    ours, theirs: `plain_schedule` of that step; theirs is empty where there is no checkpoint, or one that does not say
    it. A schedule that differs in later steps only, as one with a longer stable phase does, is as good as the same.
    """
    if not theirs or math.isclose(theirs["rate"], ours["rate"], rel_tol=1e-9):
        return
    logger.warning(
        f"the learning rate does not go on where it was, {theirs['rate']:.3g} at step {theirs['step']} (here "
        f"{ours['rate']:.3g}): {_differences(ours['settings'], theirs['settings'])}; set these as they were to go on "
        "without a jump, and lr_scheduler.total_steps from the start for a run that is to be extended"
    )


def plain_schedule(settings: TrainSettings, step: int) -> dict[str, Any]:
    """The learning rate of a step and the settings that it follows from, as a checkpoint keeps them."""
    scheduler, lr, steps = settings.lr_scheduler, settings.optimizer.lr, settings.training.steps
    keys = {f"lr_scheduler.{key}": value for key, value in asdict(scheduler).items()}
    if scheduler.total_steps == "auto":
        keys["lr_scheduler.total_steps"] = steps
    rate = learning_rate(step, scheduler, lr=lr, total_steps=steps)
    return {"step": step, "rate": rate, "settings": {"optimizer.lr": lr, **keys}}


def plain_shape(shape: ModelShape, data: DataConfig) -> dict[str, Any]:
    """The shape, and what its attention is shown, as a checkpoint keeps it."""
    shown = {"data.document_mask": data.document_mask, "data.reset_positions": data.resolved_reset_positions()}
    return json.loads(json.dumps(asdict(shape))) | shown


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The keys that differ, with both values; "" where theirs is empty."""

    def shown(values: dict[str, Any], key: str) -> str:
        value = values.get(key, "unset")
        return str(value).lower() if isinstance(value, bool) else str(value)

    return ", ".join(
        f"{key} = {shown(theirs, key)} (here {shown(ours, key)})"
        for key in {**theirs, **ours}
        if theirs and theirs.get(key) != ours.get(key)
    )
