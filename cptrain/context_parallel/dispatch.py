"""How `F.scaled_dot_product_attention` inside chosen modules reaches context parallelism.

[Note: dispatch is scoped to a module's forward]
A mode entered inside each attention module's own forward is active in the recompute of activation checkpointing and
under torch.compile, ends with the module, and catches the function however it was imported. A mode around the training
step would be gone when the backward pass recomputes, and patching the function also changes modules nobody chose.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pickle import PicklingError
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from cptrain.context_parallel.backends import saved_tensors_hooks

Attention = Callable[..., torch.Tensor]
# Parts of the names of other functions and operators that attend, as far as a mode sees them.
OTHERS = (
    "cudnn_attention",
    "efficient_attention",
    "flash_attention",
    "flash_attn",
    "flex_attention",
    "multi_head_attention",
    "scaled_dot_product",
    "varlen_attn",
)
SWITCH = "_context_parallel_switch"  # where a module keeps it
WRAPPED = "_checkpoint_wrapped_module"  # what torch calls it
WHOLE = "checkpoint the whole module or the block around it, not a part of its forward"


class AttentionMode(TorchFunctionMode):
    """While active, sends `F.scaled_dot_product_attention` to `attention`.

    reached: it was called. other: the name of another attention that was, or "".
    """

    def __init__(self, attention: Attention, window_size: int | None) -> None:
        super().__init__()
        self.attention = attention
        self.window_size = window_size
        self.reached = False
        self.other = ""
        self.with_grad = torch.is_grad_enabled()
        self.hooks = None if torch.compiler.is_compiling() else saved_tensors_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.reached = True
            self._refuse_part()
            return _replace(self.attention, self.window_size, *args, **(kwargs or {}))
        name = str(getattr(func, "__name__", ""))  # by str a constant under torch.compile
        if any(part in name for part in OTHERS):
            # Refused after the forward: flex_attention compiles itself, and would bury what is raised here.
            self.other = name
        return func(*args, **(kwargs or {}))

    def _refuse_part(self) -> None:
        """NotImplementedError in a part of the forward that backward computes again, when this mode is gone."""
        if self.with_grad and not torch.is_grad_enabled():  # as reentrant checkpointing computes a part
            raise NotImplementedError(
                f"attention without gradients inside of a forward that has them: {WHOLE}; or take it out of no_grad()"
            )
        if self.with_grad and not torch.compiler.is_compiling():
            hooks = saved_tensors_hooks()
            if hooks and hooks != self.hooks and getattr(hooks[0], "__module__", "") == checkpoint.__module__:
                raise NotImplementedError(f"attention in a checkpointed part of a module's forward: {WHOLE}")


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
    if key.size(1) not in (1, query.size(1)) and not enable_gqa:  # a single kv head is broadcast
        raise ValueError(f"{query.size(1)} query heads and {key.size(1)} kv heads need enable_gqa=True")
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
    """Names of the modules of `model` whose name matches a pattern and whose attention is now `attention`.

    The pattern "" is the model itself. A module that is context parallel already takes the new plan from its next
    forward on. Raises ValueError when a pattern matches nothing, or only what cannot attend, and when a match contains
    another (its calls would be taken twice); NotImplementedError for torch's own MultiheadAttention; and, at a forward,
    for another attention in it and for checkpointing of a part of it, and RuntimeError where it never calls the
    function.
    """
    matched = match(model, modules)
    for name, module in matched.items():
        install(name, module, attention, window_size)
    return list(matched)


def match(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules that `apply` is about to change, each by its first name that matches; its errors come from here."""
    patterns = [modules] if isinstance(modules, str) else list(modules)
    # A module that is registered under several names is found by any of them.
    everything = model.named_modules(remove_duplicate=False)
    named = [(name.replace(f".{WRAPPED}", ""), _unwrapped(module)) for name, module in everything]
    found = {pattern: {name for name, _ in named if _matches(name, pattern)} for pattern in patterns}
    missed = [pattern for pattern, names in found.items() if not names]
    if missed or not patterns:
        near = _near(missed, dict.fromkeys(name for name, _ in named if name))
        hint = f"; modules with such a name, or att in it: {', '.join(near)}" if near else ""
        missing = ", ".join(map(repr, missed)) or repr(modules)
        raise ValueError(f"modules = {missing} matches no module of {type(model).__name__}{hint}")
    chosen = set().union(*found.values())
    by_identity: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named:
        if name in chosen:
            by_identity.setdefault(id(module), (name, module))
    for name, module in by_identity.values():
        parts = list(module.modules())
        if any(isinstance(part, nn.MultiheadAttention) for part in parts):
            raise NotImplementedError(
                f"{_called(name)} is or contains nn.MultiheadAttention, whose attention cannot be replaced: call "
                "F.scaled_dot_product_attention in a module of your own"
            )
        if all(type(part).__module__.startswith("torch.nn.modules.") for part in parts):
            raise ValueError(
                f"modules = {modules!r} matches {_called(name)}, a {type(module).__name__} of torch, which never calls "
                'F.scaled_dot_product_attention: name the modules whose own forward does; "" is the model itself'
            )
        inside = [by_identity[id(part)][0] for part in parts[1:] if id(part) in by_identity]
        if inside:
            raise ValueError(
                f"modules = {modules!r} matches {_called(name)} and {inside[0]} inside it; name only one of them"
            )
    return dict(by_identity.values())


def _unwrapped(module: nn.Module) -> nn.Module:
    """What torch's `checkpoint_wrapper` holds, if this is one: backward calls the forward of that alone again."""
    while isinstance(inner := getattr(module, WRAPPED, None), nn.Module):
        module = inner
    return module


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern means the module of this name; the model itself, "", is only meant by its name."""
    return fnmatchcase(name, pattern) if name else not pattern


def _near(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Up to eight of the names: those whose last part looks like one of the patterns', then those with att in it."""
    last = {name: name.rsplit(".", 1)[-1] for name in names}
    wanted = [pattern.rsplit(".", 1)[-1] for pattern in patterns]
    close = {part for name in wanted for part in get_close_matches(name, set(last.values()), cutoff=0.7)}
    fitting = [name for name, part in last.items() if part in close or "att" in part]
    return sorted(fitting, key=lambda name: last[name] not in close)[:8]


def _called(name: str) -> str:
    """The name of a module in a sentence."""
    return name or "the model itself"


def install(name: str, module: nn.Module, attention: Attention, window_size: int | None) -> None:
    """Make the attention of one module `attention`, whatever it was before."""
    if switch_of(module) is None:
        _wrap(name, module)
    module.__dict__[SWITCH] = Switch(attention, window_size)


@dataclass(frozen=True)
class Switch:
    """Which attention a module uses: what `apply` puts into it, and replaces when the plan changes."""

    attention: Attention
    window_size: int | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        """The same: it never changes, and `apply` to one of the modules replaces it there alone."""
        return self

    def __reduce__(self) -> NoReturn:
        # Otherwise a pickle would leave the new forward out in silence.
        raise PicklingError(
            "a module that was made context parallel cannot be pickled: once loaded it would attend to its own shard "
            "only; save its state_dict(), or pickle it before apply"
        )


def switch_of(module: nn.Module) -> Switch | None:
    """The switch of a module; None where it was not made context parallel."""
    return getattr(module, SWITCH, None)


def _wrap(name: str, module: nn.Module) -> None:
    def with_attention(self: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        switch = self._context_parallel_switch
        # A mode of this call's own: torch.compile then sees no state that outlives the call.
        mode = AttentionMode(switch.attention, switch.window_size)
        with mode:
            result = forward(*args, **kwargs)
        if mode.other:
            raise NotImplementedError(
                f"{_called(name)} calls {mode.other}, which is not replaced and would attend to its own shard only: "
                "call F.scaled_dot_product_attention instead"
            )
        if not mode.reached:
            raise RuntimeError(
                f"{_called(name)} was made context parallel, but its forward never called "
                "F.scaled_dot_product_attention: each rank would attend to its own shard only"
            )
        return result

    wrap_forward(module, with_attention)


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Replace the module's forward by `around(module, forward, *args, **kwargs)`; a deep copy hands over itself."""
    original = module.forward
    # Bound anew at each call, and not held: a deep copy computes with parameters of its own, and keeps no others alive.
    is_own = isinstance(original, MethodType) and original.__self__ is module
    inner: Any = original.__func__ if isinstance(original, MethodType) and is_own else original

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, functools.partial(inner, self) if is_own else inner, *args, **kwargs)

    if not is_own:  # nothing of it is `self`, which a method is seen without
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = inspect.signature(original)
        forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[own, *signature.parameters.values()]
        )
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
