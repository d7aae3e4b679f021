"""Rotary positions: every scaling against its published formula, exact far out, never a function of the length."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tolerance import assert_matches

from cptrain.models.rope import inverse_frequencies, rotary_tables, rotate
from cptrain.models.settings import ModelConfig, resolve
from cptrain.models.shape import ModelShape, RopeScaling

SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192),
    "llama3-narrow": RopeScaling(
        kind="llama3", factor=32.0, original_max_position_embeddings=2048, low_freq_factor=2.0, high_freq_factor=3.0
    ),
    "yarn": RopeScaling(kind="yarn", factor=16.0, original_max_position_embeddings=4096, attention_factor=1.277),
    "yarn-narrow": RopeScaling(
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=32_768,
        beta_fast=8.0,
        beta_slow=7.9,
        attention_factor=1.1,
    ),
    # The ramp ends beyond the last pair, where the reference code still lets it.
    "yarn-long": RopeScaling(
        kind="yarn", factor=2.0, original_max_position_embeddings=1_000_000, attention_factor=1.05
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_shape(scaling: RopeScaling = SCALINGS["none"], *, head_dim: int = 64, theta: float = 10_000.0) -> ModelShape:
    small = resolve(ModelConfig(dim=64, num_layers=1, num_heads=1), 8)
    return dataclasses.replace(small, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def published_frequency(pair: int, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """One inverse frequency, case by case as the papers write it."""
    plain = 1.0 / theta ** (2 * pair / head_dim)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / plain
        longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
        shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
        if wavelength < shortest:
            return plain
        if wavelength > longest:
            return plain / scaling.factor
        smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        return (1 - smooth) * plain / scaling.factor + smooth * plain
    if scaling.kind == "yarn":
        # The reference code turns rotations into a channel index, rounds outwards and ramps over the channel pairs.
        def correction(rotations: float) -> float:
            length = scaling.original_max_position_embeddings
            return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(correction(scaling.beta_fast)), 0)
        high = min(math.ceil(correction(scaling.beta_slow)), head_dim - 1)
        ramp = min(max((pair - low) / (high - low if high > low else 0.001), 0.0), 1.0)
        return plain / scaling.factor * ramp + plain * (1 - ramp)
    return plain


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_models_rope_frequencies_match_the_published_formula(name, head_dim, theta):
    actual = inverse_frequencies(make_shape(SCALINGS[name], head_dim=head_dim, theta=theta))
    expected = [published_frequency(i, head_dim, theta, SCALINGS[name]) for i in range(head_dim // 2)]
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name not in ("none", "yarn-long")])
def test_models_rope_scaling_stretches_the_slowest_and_only_linear_the_fastest(name):
    scaling = SCALINGS[name]
    plain, scaled = (
        inverse_frequencies(make_shape(head_dim=128)),
        inverse_frequencies(make_shape(scaling, head_dim=128)),
    )
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / scaling.factor, rel=1e-12)
    assert (scaled[0] == plain[0]) == (scaling.kind != "linear")


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("position", [0, 1, 1023, 131_071, 1_000_003, 2**24 + 1])
def test_models_rope_fp32_tables_are_exact_at_far_positions(position, theta):
    shape = make_shape(head_dim=128, theta=theta)
    cos, sin = rotary_tables(torch.tensor([[position]]), shape, torch.float32)
    assert cos.dtype == sin.dtype == torch.float32
    angles = [position * published_frequency(i, 128, theta, shape.rope_scaling) for i in range(64)]
    expected_cos = torch.tensor([math.cos(a) for a in angles] * 2, dtype=torch.float64)
    expected_sin = torch.tensor([-math.sin(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    assert (cos[0, 0].double() - expected_cos).abs().max() < 1e-7
    assert (sin[0, 0].double() - expected_sin).abs().max() < 1e-7


def test_models_rope_tables_follow_positions_in_any_order():
    shape = make_shape(SCALINGS["yarn"])
    positions = torch.stack((torch.randperm(1000)[:48], torch.arange(48)))
    cos, sin = rotary_tables(positions, shape, torch.float64)
    for row, column in ((0, 0), (0, 31), (1, 7), (1, 47)):
        alone = rotary_tables(positions[row : row + 1, column : column + 1], shape, torch.float64)
        assert torch.equal(cos[row, column], alone[0][0, 0])
        assert torch.equal(sin[row, column], alone[1][0, 0])


@pytest.mark.parametrize("length", [1, 64, 4096, 8192])
def test_models_rope_yarn_is_the_same_at_every_length(length):
    shape = make_shape(SCALINGS["yarn"])
    cos, _ = rotary_tables(torch.arange(length).unsqueeze(0), shape, torch.float64)
    last = (length - 1) * inverse_frequencies(shape)
    assert_matches(cos[0, -1, :32], last.cos() * 1.277)
    assert not torch.allclose(inverse_frequencies(shape), inverse_frequencies(make_shape()))


def test_models_rope_yarn_attention_factor_defaults_to_the_papers():
    keys = {"dim": 64, "num_layers": 1, "num_heads": 1, "rope_scaling": "yarn", "rope_factor": 16.0}
    shape = resolve(ModelConfig(**keys, rope_original_max_position_embeddings=4096), 8)
    assert shape.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(16) + 1, rel=1e-15)
    rope = rotary_tables(torch.tensor([[5]]), shape, torch.float64)
    x = torch.randn(1, 1, 2, 64, dtype=torch.float64)
    assert rotate(x, rope).norm().item() == pytest.approx(x.norm().item() * shape.rope_scaling.attention_factor)


def test_models_rope_rotate_turns_halves_as_hugging_face_does():
    shape = make_shape(head_dim=16)
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    positions = torch.randint(0, 1000, (2, 5))
    angles = positions[:, :, None, None] * inverse_frequencies(shape)
    a, b = x[..., :8], x[..., 8:]
    turned = torch.view_as_real(torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles))
    expected = torch.cat((turned[..., 0], turned[..., 1]), dim=-1)
    assert_matches(rotate(x, rotary_tables(positions, shape, x.dtype)), expected)


def test_models_rope_scores_depend_on_distance_alone():
    shape = make_shape(SCALINGS["llama3"])
    q, k = torch.randn(2, 1, 1, 4, 64, dtype=torch.float64).unbind(0)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned = [rotate(x, rotary_tables(torch.tensor([[at]]), shape, x.dtype)) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum(-1)

    assert_matches(score(1_000_017, 1_000_000), score(17, 0), atol=1e-7)
    assert not torch.allclose(score(17, 0), score(18, 0))


def test_models_rope_rotates_bf16_in_fp32_and_rounds_once():
    shape = make_shape()
    x = torch.randn(1, 9, 2, 64, dtype=torch.bfloat16)
    rope = rotary_tables(torch.arange(100_000, 100_009).unsqueeze(0), shape, x.dtype)
    exact = rotate(x.double(), rotary_tables(torch.arange(100_000, 100_009).unsqueeze(0), shape, torch.float64))
    turned = rotate(x, rope)
    assert turned.dtype == torch.bfloat16
    # Half a unit in the last place of bf16, and what the fp32 tables add.
    assert ((turned.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_models_rope_refuses_tables_that_were_cast_down():
    rope = rotary_tables(torch.zeros(1, 1, dtype=torch.int64), make_shape(), torch.bfloat16)
    with pytest.raises(ValueError, match="cast_forward_inputs=False"):
        rotate(torch.zeros(1, 1, 1, 64), (rope[0].bfloat16(), rope[1].bfloat16()))
