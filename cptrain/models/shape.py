"""The concrete shape of a model: `ModelShape`, and how many parameters it has. Torch is never imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["none", "linear", "llama3", "yarn"]
AttentionMask = Literal["causal", "full"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts beyond the length the model was first trained on.

    kind: "none"; "linear" (all frequencies / factor, arXiv:2306.15595); "llama3" (only long wavelengths, Llama 3.1);
    "yarn" (by number of rotations within the original length, arXiv:2309.00071). Fields that a kind does not read keep
    their defaults, so that equal models have equal shapes.
    """

    kind: RopeKind = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything a Llama-family decoder is built from; no field is left to be guessed.

    dim is the width of the residual stream, num_heads * head_dim the width of the attention (they differ in Qwen 3),
    ffn_dim the inner width of SwiGLU, vocab_size the rows of the embedding. window_size: keys that a query sees, itself
    among them (0: all earlier ones), except in every full_attention_every-th layer (0: in none).
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    attention_mask: AttentionMask
    window_size: int = 0
    full_attention_every: int = 0

    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer in tokens, 0 for a layer without one."""
        every = self.full_attention_every
        return tuple(0 if every and (layer + 1) % every == 0 else self.window_size for layer in range(self.num_layers))


def num_parameters(shape: ModelShape) -> int:
    """Trainable parameters of the model; tied embeddings count once."""
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.dim * (2 * query + 2 * key_value)
    if shape.qkv_bias:
        attention += query + 2 * key_value
    if shape.qk_norm:
        attention += 2 * shape.head_dim
    block = attention + 3 * shape.dim * shape.ffn_dim + 2 * shape.dim
    embeddings = (1 if shape.tied_embeddings else 2) * shape.vocab_size * shape.dim
    return embeddings + shape.num_layers * block + shape.dim
