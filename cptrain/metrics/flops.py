"""The floating-point operations that one training step of a model needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cptrain.models.shape import AttentionMask, ModelShape


def visible_pairs(lengths: Iterable[int], mask: AttentionMask, window: int = 0) -> int:
    """How many (query, key) pairs attention looks at: S (S + 1) / 2 per sequence of length S if causal, else S * S.

    With a sliding window W (0: none), query i of a sequence sees min(i + 1, W) keys.

    `lengths` are those of the spans inside which tokens see each other: whole sequences, or single documents where
    packed documents are kept apart; without padding.
    """
    if mask == "causal":
        pairs = 0
        for length in lengths:
            seen = min(length, window or length)
            pairs += seen * (seen + 1) // 2 + (length - seen) * seen
        return pairs
    return sum(length * length for length in lengths)


def attention_pairs(shape: ModelShape, lengths: Sequence[int]) -> int:
    """`visible_pairs` of sequences of these lengths, summed over the layers, each with its own window."""
    layers = Counter(shape.windows())
    return sum(count * visible_pairs(lengths, shape.attention_mask, window) for window, count in layers.items())


def training_flops(shape: ModelShape, *, tokens: int, pairs: int) -> int:
    """The FLOPs of forward and backward for `tokens` tokens whose attention looks at `pairs` (`attention_pairs`).

    Both are of documents alone: padding, like a masked pair, is computed and not needed.
    Per layer, with E = dim, H heads and G kv heads of size D, and F = ffn_dim, the forward pass takes

    * weights: 2 * tokens * (E H D + 2 E G D + H D E + 3 E F), for q, k and v, o, and the three SwiGLU matrices;
    * attention: 4 * H * D per pair, 2 for the scores q k^T and 2 for the weighted sum of v;

    and the output layer 2 * tokens * E * vocab_size once. The backward pass takes twice the forward pass: one product
    for the gradient of each operand. These are the operations that the model needs (MFU), not those that were run
    (HFU): activations computed again under checkpointing do not count, nor do masked pairs that a kernel looked at.
    Norms, RoPE, softmax and the loss are not matrix products and are left out, as everywhere.
    """
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = shape.dim * (2 * heads + 2 * kv_heads + 3 * shape.ffn_dim)
    weights = 2 * tokens * (shape.num_layers * layer + shape.dim * shape.vocab_size)
    attention = 4 * heads * pairs
    return 3 * (weights + attention)
