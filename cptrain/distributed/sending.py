"""Copies from the host to a device that the host does not wait for.

[Note: copies belong to a stream]
Which rows go where the host knows, and the device reads it as an index. A copy from ordinary memory makes the host wait
until the device has done all it was given before; from pinned memory the copy is one more thing in the stream. It is
done when the stream gets there, and the memory that it fills is that stream's: in another stream it may be read too
early, or after it was given to somebody else. So what is kept from one use to the next is kept for each stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

Key = ParamSpec("Key")
Sent = TypeVar("Sent")


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device, for use in the stream that is now current there; see [Note: copies belong to a stream]."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def current_stream(device: torch.device) -> int:
    """Which of the device's streams is current; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def kept_per_stream(maxsize: int) -> Callable[[Callable[Key, Sent]], Callable[Key, Sent]]:
    """A cache of what a function sends to the device that is its last argument: for each of its streams another one."""

    def decorate(make: Callable[Key, Sent]) -> Callable[Key, Sent]:
        @lru_cache(maxsize)
        def kept(stream: int, *key: Key.args, **named: Key.kwargs) -> Sent:
            return make(*key, **named)

        @wraps(make)
        def get(*key: Key.args, **named: Key.kwargs) -> Sent:
            return kept(current_stream(key[-1]), *key, **named)  # type: ignore[arg-type]

        get.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
        return get

    return decorate
