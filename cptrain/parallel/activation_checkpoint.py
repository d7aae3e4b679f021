"""Activation checkpointing of each block."""

from __future__ import annotations

from typing import Any, Literal

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cptrain.context_parallel import keep_attention
from cptrain.models.llama import Llama


def apply_activation_checkpoint(model: Llama, mode: Literal["none", "selective", "full"]) -> None:
    """Wrap every block so that its backward pass recomputes what `mode` does not keep: "selective" keeps attention."""
    if mode == "none":
        return
    # Nothing in a block draws random numbers, so there is no generator state to carry into the recompute.
    options: dict[str, Any] = {"preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = keep_attention
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, **options)
