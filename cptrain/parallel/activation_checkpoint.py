"""Activation checkpointing of each block."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from cptrain.models.llama import Llama

KEPT_NAMESPACE = "cptrain::"


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention and its messages: they cost the most to repeat, and a repeated message stalls all ranks."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name.startswith(KEPT_NAMESPACE) else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpoint(model: Llama, mode: Literal["none", "selective", "full"]) -> None:
    """Wrap every block so that its backward pass recomputes what `mode` does not keep."""
    if mode == "none":
        return
    # Nothing in a block draws random numbers, so there is no generator state to carry into the recompute.
    options: dict[str, Any] = {"preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, **options)
