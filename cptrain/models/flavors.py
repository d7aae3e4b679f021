"""Published dense shapes of the Llama family by name. Torch is never imported here.

Each entry holds the keys of [model] that the published `config.json` fixes; head_dim is left out where it is
dim / num_heads. `rope_original_max_position_embeddings` is the length before any rotary scaling: what YaRN and
Llama 3.1 scaling start from. Not in the table: the norm_eps of 1e-6 of the instruct variants of Qwen 2 / 2.5 14B to
72B.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _shape(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_dim: int, **more: Any) -> dict[str, Any]:
    return {
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "ffn_dim": ffn_dim,
        **more,
    }


def _known() -> Mapping[str, Mapping[str, Any]]:
    llama2 = {
        "vocab_size": 32_000,
        "norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_original_max_position_embeddings": 4096,
    }
    llama3 = {
        "vocab_size": 128_256,
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_original_max_position_embeddings": 8192,
    }
    llama31 = llama3 | {
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
    }
    llama32 = llama31 | {"rope_factor": 32.0, "tied_embeddings": True}
    mistral = {"norm_eps": 1e-5, "rope_original_max_position_embeddings": 32_768}
    qwen = {"norm_eps": 1e-6, "rope_theta": 1_000_000.0, "rope_original_max_position_embeddings": 32_768}
    qwen2 = qwen | {"vocab_size": 152_064, "qkv_bias": True}
    qwen2_large = qwen2 | {"norm_eps": 1e-5}
    qwen2_tied = qwen2 | {"vocab_size": 151_936, "tied_embeddings": True}
    qwen3 = qwen | {"vocab_size": 151_936, "head_dim": 128, "qk_norm": True}
    qwen3_tied = qwen3 | {"tied_embeddings": True}
    return {
        # For two laptop cores; 4 kv heads allow tensor parallel 2 x Ulysses 2; the vocabulary is the tokenizer's.
        "debug": _shape(256, 6, 8, 4, 768, norm_eps=1e-5, rope_theta=10_000.0),
        "llama2-7b": _shape(4096, 32, 32, 32, 11_008, **llama2),
        "llama2-13b": _shape(5120, 40, 40, 40, 13_824, **llama2),
        "llama2-70b": _shape(8192, 80, 64, 8, 28_672, **llama2),
        "llama3-8b": _shape(4096, 32, 32, 8, 14_336, **llama3),
        "llama3-70b": _shape(8192, 80, 64, 8, 28_672, **llama3),
        "llama3.1-8b": _shape(4096, 32, 32, 8, 14_336, **llama31),
        "llama3.1-70b": _shape(8192, 80, 64, 8, 28_672, **llama31),
        "llama3.1-405b": _shape(16_384, 126, 128, 8, 53_248, **llama31),
        "llama3.2-1b": _shape(2048, 16, 32, 8, 8192, **llama32),
        "llama3.2-3b": _shape(3072, 28, 24, 8, 8192, **llama32),
        "mistral-7b-v0.1": _shape(
            4096, 32, 32, 8, 14_336, vocab_size=32_000, rope_theta=10_000.0, window_size=4096, **mistral
        ),
        "mistral-7b-v0.3": _shape(4096, 32, 32, 8, 14_336, vocab_size=32_768, rope_theta=1_000_000.0, **mistral),
        "qwen2-0.5b": _shape(896, 24, 14, 2, 4864, **qwen2_tied),
        "qwen2-1.5b": _shape(1536, 28, 12, 2, 8960, **qwen2_tied),
        "qwen2-7b": _shape(3584, 28, 28, 4, 18_944, **qwen2),
        "qwen2-72b": _shape(8192, 80, 64, 8, 29_568, **qwen2_large),
        "qwen2.5-0.5b": _shape(896, 24, 14, 2, 4864, **qwen2_tied),
        "qwen2.5-1.5b": _shape(1536, 28, 12, 2, 8960, **qwen2_tied),
        "qwen2.5-3b": _shape(2048, 36, 16, 2, 11_008, **qwen2_tied),
        "qwen2.5-7b": _shape(3584, 28, 28, 4, 18_944, **qwen2),
        "qwen2.5-14b": _shape(5120, 48, 40, 8, 13_824, **qwen2_large),
        "qwen2.5-32b": _shape(5120, 64, 40, 8, 27_648, **qwen2_large),
        "qwen2.5-72b": _shape(8192, 80, 64, 8, 29_568, **qwen2_large),
        "qwen3-0.6b": _shape(1024, 28, 16, 8, 3072, **qwen3_tied),
        "qwen3-1.7b": _shape(2048, 28, 16, 8, 6144, **qwen3_tied),
        "qwen3-4b": _shape(2560, 36, 32, 8, 9728, **qwen3_tied),
        "qwen3-8b": _shape(4096, 36, 32, 8, 12_288, **qwen3),
        "qwen3-14b": _shape(5120, 40, 40, 8, 17_408, **qwen3),
        "qwen3-32b": _shape(5120, 64, 64, 8, 25_600, **qwen3),
    }


FLAVORS: Mapping[str, Mapping[str, Any]] = MappingProxyType(_known())
