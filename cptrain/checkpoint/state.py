"""A model's and an optimizer's tensors under names that do not depend on how they are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict


def training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The live tensors of both, by parameter name: {"model": {NAME: ...}, "optimizer": {"NAME.exp_avg": ...}}.

    These are the tensors that training uses, not copies: writing into them (`Checkpointer.load`) restores the model
    and the optimizer, and nothing remains to be set. Names are those of the plain model, without prefixes of wrappers.
    An optimizer that has not stepped yet gets its state first; see `materialise`. Learning rate, betas and whatever
    else is a setting stays out: it comes from the config.
    """
    materialise(optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    parts = get_optimizer_state_dict(model, optimizer, options=options)
    return {
        "model": dict(get_model_state_dict(model)),  # type: ignore[arg-type]
        "optimizer": {
            key.removeprefix("state."): value  # type: ignore[misc]
            for key, value in parts.items()
            if key.startswith("state.")
        },
    }


@torch.no_grad()
def materialise(optimizer: torch.optim.Optimizer) -> None:
    """Give every trainable parameter the optimizer state that its first step would start from, and change nothing else.

    Optimizers make their state in the first step, so a fresh one has no tensors to load into. This takes that step with
    zero gradients and a learning rate and weight decay of 0, then sets the step counts back to 0: parameters, gradients
    and settings keep their bits, and training from here equals training from a fresh optimizer. (torch's own helper
    leaves the step counts at 1, which changes the bias correction of a run that finds no checkpoint.)
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    bare = [p for p in parameters if not optimizer.state.get(p)]
    if not bare:
        return
    gradients = [(p, p.grad) for p in parameters]
    settings = [dict(group) for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in bare:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        for name in ("lr", "weight_decay"):
            if name in group:
                group[name] = torch.zeros_like(group[name]) if isinstance(group[name], torch.Tensor) else 0.0
    try:
        optimizer.step()
    finally:
        for group, kept in zip(optimizer.param_groups, settings, strict=True):
            group.update(kept)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    for parameter in bare:
        if isinstance(count := optimizer.state.get(parameter, {}).get("step"), torch.Tensor):
            count.zero_()


def flatten(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Nested dicts of tensors as one dict with dotted keys; ValueError names what is not a tensor with memory."""
    flat: dict[str, torch.Tensor] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{path}.{key}" if path else str(key), item)
        elif not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path} is a {type(value).__name__}: only tensors go here; put plain values into train_state"
            )
        elif value.is_meta:
            raise ValueError(f"{path} is on the meta device; give it memory first (model.to_empty)")
        elif path in flat:
            raise ValueError(f"{path} names two tensors; rename one of them")
        else:
            flat[path] = value

    visit("", state)
    return flat
