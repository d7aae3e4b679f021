"""How many tokens have their logits made at a time. Torch is never imported here."""

from __future__ import annotations

CHUNK_ELEMENTS = 2**22  # logits at a time: 16 MiB in fp32 stays in a CPU's cache
CHUNK_TOKENS = 1024  # but no fewer tokens than keep a matrix product busy


def tokens_at_a_time(vocabulary: int) -> int:
    """Tokens of a chunk, of whose logits so many columns are here."""
    return max(CHUNK_TOKENS, CHUNK_ELEMENTS // vocabulary)
