"""Orders without memory: a keyed bijection of range(n), and a keyed hash of document numbers.

The arithmetic is spelled out here rather than taken from a library's generator, whose stream may change with its
version: the order of the data has to stay what it was when a checkpoint was written.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6

Bits = TypeVar("Bits", int, np.ndarray)


def mix(bits: Bits) -> Bits:
    """A bijection of 64-bit words in which every input bit moves about half of the output bits.

    bits: an int below 2**64, or a uint64 array. Source: the finalizer of splitmix64.
    """
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


def shuffled_position(position: int, size: int, *, seed: int, epoch: int) -> int:
    """Where `position` of range(size) goes in the permutation that (seed, epoch) names; O(1) memory and time.

    A Feistel network permutes the smallest domain of an even number of bits that holds `size`; a value outside of
    range(size) is fed back until it falls inside (cycle walking), less than four times on average.
    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
    """
    if not 0 <= position < size:
        raise ValueError(f"position = {position}: must be in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    key = mix(mix(seed & _MASK) ^ ((epoch * _GOLDEN) & _MASK))
    while True:
        left, right = position >> half, position & low
        for turn in range(1, _ROUNDS + 1):
            left, right = right, left ^ (mix(right ^ ((key + turn * _GOLDEN) & _MASK)) & low)
        position = left << half | right
        if position < size:
            return position


def shuffled_order(size: int, *, seed: int) -> np.ndarray:
    """All of range(size), ordered by a hash of (seed, number), int64 [size]."""
    numbers = np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.argsort(mix(numbers ^ np.uint64(mix(seed & _MASK))), kind="stable")
