"""What divides what: by how many ranks heads and sequences can be cut. Arithmetic alone, without settings."""

from __future__ import annotations

import math

MOST_CHUNKS = 128  # that the balanced layout deals to a rank, of one sequence: more take seconds


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def valid_ulysses_degrees(num_heads: int, num_kv_heads: int, tp: int = 1) -> list[int]:
    """Ulysses degrees at which every rank gets whole groups of heads, in rising order.

    Heads are first divided over `tp`. A degree u needs heads % u == 0 and, so that a query head and its kv head meet on
    one rank, one of (kv heads, u) must divide the other; kv heads are replicated where u is larger.
    """
    heads, kv_heads = num_heads // tp, max(1, num_kv_heads // tp)
    return [u for u in divisors(heads) if kv_heads % u == 0 or u % kv_heads == 0] if heads else []
