"""How `F.scaled_dot_product_attention` inside chosen modules reaches context parallelism.

[Note: dispatch is scoped to a module's forward]
A mode entered inside each attention module's own forward is active in the recompute of activation checkpointing and
under torch.compile, ends with the module, and catches the function however it was imported. A mode around the training
step would be gone when the backward pass recomputes, and patching the function also changes modules nobody chose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pickle import PicklingError
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

Attention = Callable[..., torch.Tensor]


class AttentionMode(TorchFunctionMode):
    """While active, sends `F.scaled_dot_product_attention` to `attention`, and remembers that it was called."""

    def __init__(self, attention: Attention, window_size: int | None) -> None:
        super().__init__()
        self.attention = attention
        self.window_size = window_size
        self.reached = False
        self.with_grad = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.reached = True
            if self.with_grad and not torch.is_grad_enabled():
                # Reentrant checkpointing computes a part so, and again in backward, where this mode is gone.
                raise NotImplementedError(
                    "attention without gradients inside of a forward that has them: checkpoint the whole module or the "
                    "block around it, not a part of its forward; or take it out of no_grad()"
                )
            return _replace(self.attention, self.window_size, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _replace(
    attention: Attention,
    window_size: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`attention` with the arguments of F.scaled_dot_product_attention; refuses what it could not do exactly."""
    if attn_mask is not None:
        raise NotImplementedError(
            f"attn_mask {tuple(attn_mask.shape)}: a dense mask of a sharded sequence is not supported under context "
            "parallelism; use is_causal=True or no mask"
        )
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"dropout_p = {dropout_p}: attention dropout is not supported under context parallelism; set it to 0.0"
        )
    if query.size(1) != key.size(1) and not enable_gqa:
        raise ValueError(
            f"{query.size(1)} query heads and {key.size(1)} kv heads need enable_gqa=True, as on one device"
        )
    if window_size is not None and not is_causal:
        raise ValueError(f"window_size = {window_size}: these modules call attention without is_causal=True")
    query, key, value = (_autocast(x) for x in (query, key, value))
    return attention(query, key, value, is_causal=is_causal, window_size=window_size, scale=scale)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """The tensor as torch.autocast hands it to the function that is replaced: rotated queries are often still fp32."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def apply(
    model: nn.Module, *, modules: str | Sequence[str], attention: Attention, window_size: int | None = None
) -> list[str]:
    """Names of the modules of `model` whose name matches the pattern and whose attention is now `attention`.

    A module that is context parallel already takes the new plan from its next forward on. Raises ValueError when
    nothing matches or a match contains another (its calls would be taken twice); NotImplementedError for torch's own
    MultiheadAttention, and for checkpointing of a part of a forward; and, at its first forward,
    RuntimeError for a matched module that never calls the function.
    """
    matched = match(model, modules)
    for name, module in matched.items():
        install(name, module, attention, window_size)
    return list(matched)


def match(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules that `apply` is about to change, by name; its errors come from here."""
    patterns = [modules] if isinstance(modules, str) else list(modules)
    matched = {
        name: module
        for name, module in model.named_modules()
        if name and any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not matched:
        kinds = sorted({name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1].find("att") >= 0})
        hint = f"; modules with att in their name: {', '.join(kinds[:8])}" if kinds else ""
        raise ValueError(f"modules = {modules!r} matches no module of {type(model).__name__}{hint}")
    for name, module in matched.items():
        if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
            raise NotImplementedError(
                f"{name} is or contains nn.MultiheadAttention, whose attention cannot be replaced: call "
                "F.scaled_dot_product_attention in a module of your own"
            )
        inside = [other for other in matched if other.startswith(name + ".")]
        if inside:
            raise ValueError(f"modules = {modules!r} matches {name} and {inside[0]} inside it; name only one of them")
    return matched


def install(name: str, module: nn.Module, attention: Attention, window_size: int | None) -> None:
    """Make the attention of one module `attention`, whatever it was before."""
    switch = getattr(module.forward, "context_parallel_switch", None)
    if switch is None:
        _wrap(name, module, Switch(attention, window_size))
    else:
        switch.attention, switch.window_size = attention, window_size


class Switch:
    """Which attention a module uses: what `apply` sets, and sets again when the plan changes."""

    def __init__(self, attention: Attention, window_size: int | None) -> None:
        self.attention = attention
        self.window_size = window_size

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        return self

    def __reduce__(self) -> NoReturn:
        raise PicklingError(
            "a module that was made context parallel cannot be pickled: once loaded it would attend to its own shard "
            "only; save its state_dict(), or pickle it before apply"
        )


def _wrap(name: str, module: nn.Module, switch: Switch) -> None:
    def with_attention(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A mode of this call's own: torch.compile then sees no state that outlives the call.
        mode = AttentionMode(switch.attention, switch.window_size)
        with mode:
            result = forward(*args, **kwargs)
        if not mode.reached:
            raise RuntimeError(
                f"{name} was made context parallel, but its forward never called F.scaled_dot_product_attention: "
                "each rank would attend to its own shard only"
            )
        return result

    wrap_forward(module, with_attention, context_parallel_switch=switch)
    # A pickle would leave the new forward out in silence, so the module holds something that refuses.
    module.__dict__["_context_parallel_switch"] = switch


def wrap_forward(module: nn.Module, around: Callable[..., Any], **marks: Any) -> None:
    """Replace the module's forward by `around(forward, *args, **kwargs)`; `marks` are put on it as attributes."""
    original = module.forward
    # Bound anew at each call, so that a deep copy of the model computes with the parameters of the copy.
    unbound = original.__func__ if isinstance(original, MethodType) and original.__self__ is module else None

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(unbound, self) if unbound else original, *args, **kwargs)

    forward.__dict__.update(marks)
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
