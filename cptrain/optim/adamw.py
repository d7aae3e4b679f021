"""AdamW with two groups of parameters: those that decay and those that do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cptrain.optim.settings import OptimizerConfig

# Devices with a fused AdamW kernel. On torch 2.13 a fused (or foreach) step over DTensor parameters of different meshes
# (FSDP alone beside FSDP x TP) equals the Python loop, so groups need no split by mesh.
_FUSED_DEVICES = ("cpu", "cuda")
_OPTIMIZERS = {"AdamW": torch.optim.AdamW}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, which must already have their final (sharded) form and device.

    Two groups whatever the parallel layout, so that a saved state fits any other layout: parameters with two or more
    dimensions (matrices and embeddings; a DTensor's dimensions are the global ones) decay, norms and biases do not.
    `lr` of both groups is only the starting value; `set_learning_rate` overwrites it before every step.

    Raises ValueError when nothing is trainable, RuntimeError when parameters are still on the meta device or when
    "fused" is asked of a device without it.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameters; leave requires_grad on for at least one")
    unborn = [name for name, p in parameters if p.is_meta]
    if unborn:
        raise RuntimeError(
            f"{len(unborn)} parameters ({unborn[0]}, ...) are on the meta device; materialise the model first"
        )
    matrices = [p for _, p in parameters if p.ndim >= 2]
    vectors = [p for _, p in parameters if p.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if group
    ]
    return _OPTIMIZERS[config.name](
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        **_kernel(config, {p.device.type for _, p in parameters}),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let every group of `optimizer` take its next step with `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _kernel(config: OptimizerConfig, devices: set[str]) -> dict[str, Any]:
    """The flags with which torch.optim chooses its implementation."""
    fused = devices <= set(_FUSED_DEVICES)
    if config.implementation == "fused" and not fused:
        raise RuntimeError(
            f'optimizer.implementation = "fused": works on {" and ".join(_FUSED_DEVICES)}, the parameters are on '
            f'{", ".join(sorted(devices))}; set it to "auto"'
        )
    if config.implementation == "fused" or (config.implementation == "auto" and fused):
        return {"fused": True}
    return {"foreach": config.implementation != "for-loop", "fused": False}
