"""What a needle says: a sentence that holds a key, and the question that asks for it. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

BEFORE, AFTER = "\nThe pass key is", ". Remember it: it will be asked for.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 5
LEAST_TEXT = 16  # tokens around a needle


def key_text(digits: Iterable[int]) -> str:
    """The key as it stands in both places."""
    return " " + "".join(map(str, digits))


def same_digits() -> list[str]:
    """The keys that say one digit over and over: as long as keys get."""
    return [key_text([digit] * DIGITS) for digit in range(10)]


def tokens_needed(count: Callable[[str], int]) -> int:
    """The shortest window that holds a needle and its question; `count` says how many tokens a text has."""
    keys = 2 * max(map(count, same_digits()))
    return 1 + LEAST_TEXT + keys + sum(map(count, (BEFORE, AFTER, QUESTION)))
