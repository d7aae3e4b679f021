"""The Llama-family decoder: grouped-query attention, RMSNorm, SwiGLU, rotary positions given from outside.

The model knows nothing of ranks: it calls plain `F.scaled_dot_product_attention` and takes all sizes but head_dim from
the tensors it is handed, so that tensor parallel (fewer local heads) and context parallel (fewer local tokens) are
added by hooks on its modules alone.

Shapes: B batch, T local tokens, E dim, H query heads, K kv heads, D head_dim, V vocabulary; H and K are the local ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from cptrain.models.rope import Rope, rotary_tables, rotate
from cptrain.models.shape import ModelShape

Head = Callable[[Tensor, nn.Linear], Any]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, optional QKV biases and optional per-head RMSNorm."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.is_causal = shape.attention_mask == "causal"
        query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.wq = nn.Linear(shape.dim, query, bias=shape.qkv_bias)
        self.wk = nn.Linear(shape.dim, key_value, bias=shape.qkv_bias)
        self.wv = nn.Linear(shape.dim, key_value, bias=shape.qkv_bias)
        self.wo = nn.Linear(query, shape.dim, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """x [B, T, E] and its tokens' rotary tables [B, T, D] -> [B, T, E]."""
        # B and T come from this x, which a hook may have gathered; the projections' width gives the local heads.
        B, T, _ = x.shape
        q = rotate(self.q_norm(self.wq(x).view(B, T, -1, self.head_dim)), rope).transpose(1, 2)  # [B, H, T, D]
        k = rotate(self.k_norm(self.wk(x).view(B, T, -1, self.head_dim)), rope).transpose(1, 2)  # [B, K, T, D]
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        # Looked up in F at each call and given unexpanded kv heads: what context parallel needs to see.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.w2 = nn.Linear(shape.ffn_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.feed_forward = FeedForward(shape)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """[B, T, E] -> [B, T, E]; under sequence parallel x holds fewer tokens than the tables."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """A decoder of the given shape. Build it under `torch.device("meta")`, then `to_empty`, then `init.initialise`.

    It has no buffers. With `shape.tied_embeddings`, `output.weight` is `tok_embeddings.weight`: see `tie_weights`.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.tie_weights()

    def forward(self, tokens: Tensor, positions: Tensor, *, head: Head | None = None) -> Any:
        """Logits [B, T, V] of tokens [B, T] at positions [B, T], or whatever `head(hidden, self.output)` returns.

        hidden [B, T, E] is the normed final state. A `head` that applies the output projection to a few tokens at a
        time never holds all logits; it runs inside this forward, where FSDP has gathered the projection's weight.
        """
        if positions.shape != tokens.shape:
            raise ValueError(
                f"positions {tuple(positions.shape)} must be one per token {tuple(tokens.shape)}; "
                "send them through the same sharding as the tokens"
            )
        x = self.tok_embeddings(tokens)
        rope = rotary_tables(positions, self.shape, x.dtype)
        for layer in self.layers:
            x = layer(x, rope)
        hidden = self.norm(x)
        return self.output(hidden) if head is None else head(hidden, self.output)

    def tie_weights(self) -> None:
        """Make `output.weight` the embedding's parameter again, if the shape ties them.

        Whatever replaces parameters one module at a time parts the two: call this after `parallelize_module` has
        sharded both over the vocabulary. `to_empty` and casts are covered by `_apply`.
        """
        if self.shape.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.tie_weights()
        return self
