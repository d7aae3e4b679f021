"""What a query may see, as a description: never a dense [S, S] tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mask:
    """causal: a query sees the keys at its own position and before it. Otherwise it sees every key.

    window: of these keys only the last `window`, its own among them (Mistral's sliding window); 0 is no limit.
    Raises ValueError for a negative window, and for a window without causal.
    """

    causal: bool
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window = {self.window}: must be at least 1, or 0 for no limit")
        if self.window and not self.causal:
            raise ValueError(f"window = {self.window}: a sliding window is causal; set is_causal=True")

    def visible(self, query: int, key: int) -> bool:
        """Whether the query at this global position sees the key at that one: what schedules must meet."""
        if not self.causal:
            return True
        return key <= query and (not self.window or key > query - self.window)


CAUSAL = Mask(causal=True)
FULL = Mask(causal=False)
