"""What a query may see, as a description: never a dense [S, S] tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mask:
    """causal: a query sees the keys at its own position and before it. Otherwise it sees every key."""

    causal: bool

    def visible(self, query: int, key: int) -> bool:
        """Whether the query at this global position sees the key at that one: what schedules must meet."""
        return key <= query or not self.causal


CAUSAL = Mask(causal=True)
FULL = Mask(causal=False)
