"""Rotary position embedding from explicit positions: `rotary_tables` once per forward, `rotate` in every block.

[Note: no rotary buffers]
Nothing is cached in the module. A non-persistent buffer is not in any checkpoint and holds garbage after a build on the
meta device followed by `to_empty`; a table of positions 0..S would have to be sliced by whoever knows which rank holds
which tokens. Frequencies are head_dim / 2 numbers computed on the device (no copy from the host, no synchronisation),
and the tables cost one row per local token, shared by all blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cptrain.models.shape import ModelShape

Rope = tuple[Tensor, Tensor]


def inverse_frequencies(shape: ModelShape, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of channels, after scaling. [head_dim / 2], fp64.

    The length of the sequence is no argument: a model scaled for long contexts is the same model at every length.
    Sources: arXiv:2104.09864; linear arXiv:2306.15595; YaRN arXiv:2309.00071; llama3 as in Meta's Llama 3.1 release.
    All agree with the `rope_scaling` of Hugging Face configurations.
    """
    scaling, dim = shape.rope_scaling, shape.head_dim
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    plain = shape.rope_theta ** (-pairs / dim)
    stretched = plain / scaling.factor
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return stretched
    original = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        rotations = plain * (original / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
    elif scaling.kind == "yarn":
        # Pair index at which a frequency makes `rotations` turns within the original length; the ramp is linear in it.
        def pair_of(rotations: float) -> float:
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(shape.rope_theta))

        first = max(math.floor(pair_of(scaling.beta_fast)), 0)
        last = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
        keep = 1 - ((pairs / 2 - first) / max(last - first, 0.001)).clamp(0, 1)
    else:
        raise ValueError(f'rope_scaling.kind = "{scaling.kind}": must be none, linear, llama3 or yarn')
    return keep * plain + (1 - keep) * stretched


def rotary_tables(positions: Tensor, shape: ModelShape, dtype: torch.dtype) -> Rope:
    """Cosines and signed sines for `rotate`, each [B, T, head_dim]: fp64 for a model in fp64, else fp32.

    positions [B, T] are integers in any order, one per local token. The first half of the sines is negated, because
    `rotate` turns (a, b) into (a cos - b sin, b cos + a sin). YaRN's attention factor scales both tables.
    Angles are fp64 until the cosine is taken: with fp32 angles (theta 500,000, head_dim 128) cosines are off by up to
    0.05 at position 1,000,000 and 0.006 at 131,072, differently from token to token.
    """
    angles = positions.to(torch.float64).unsqueeze(-1) * inverse_frequencies(shape, positions.device)
    cos, sin = angles.cos(), angles.sin()
    if shape.rope_scaling.kind == "yarn":
        cos, sin = cos * shape.rope_scaling.attention_factor, sin * shape.rope_scaling.attention_factor
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, T, heads, head_dim] with channel pairs (i, i + head_dim / 2) turned by their token's angles, in x's dtype.

    Pairing halves ("rotate half") is the layout of Hugging Face checkpoints, which then load without a permutation. The
    arithmetic is done in the dtype of the tables and rounded once.
    """
    cos, sin = rope
    if cos.dtype.itemsize < 4:
        raise ValueError(
            f"rotary tables arrived as {cos.dtype}, which rounds angles by up to 0.004 rad; "
            "leave the inputs of blocks uncast (FSDP2: MixedPrecisionPolicy(cast_forward_inputs=False))"
        )
    # One roll and one fused multiply-add: 1.3 to 3 times faster on CPU than negating, concatenating and adding halves.
    turned = torch.addcmul(x * cos.unsqueeze(2), x.roll(x.shape[-1] // 2, dims=-1), sin.unsqueeze(2))
    return turned.to(x.dtype)
