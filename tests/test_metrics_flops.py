from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cptrain.metrics.flops import attention_pairs, training_flops, visible_pairs
from cptrain.metrics.peak import peak_flops
from cptrain.models.llama import Llama
from cptrain.models.shape import ModelShape, RopeScaling

# Every size differs and the attention is wider than the model, so that no size can stand in for another.
SHAPE = ModelShape(
    dim=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_dim=20,
    vocab_size=31,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=RopeScaling(),
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
    attention_mask="full",
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 4}, {"num_kv_heads": 1, "qkv_bias": True}, {"tied_embeddings": True, "head_dim": 2}],
    ids=["gqa", "mha", "mqa", "tied"],
)
def test_metrics_flops_are_those_of_the_model(changes):
    shape = dataclasses.replace(SHAPE, **changes)
    batch, length = 2, 9
    model = Llama(shape)
    tokens = torch.randint(shape.vocab_size, (batch, length))
    positions = torch.arange(length).expand(batch, length)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # flash counts its recomputation
        model(tokens, positions).sum().backward()
    pairs = visible_pairs([length] * batch, "full")
    assert training_flops(shape, tokens=batch * length, pairs=pairs * shape.num_layers) == counter.get_total_flops()


@pytest.mark.parametrize("lengths", [[7], [3, 1, 5], [1], []])
def test_metrics_pairs_are_those_the_mask_shows(lengths):
    seen = [torch.ones(length, length).tril() for length in lengths]
    assert visible_pairs(lengths, "causal") == sum(int(mask.sum()) for mask in seen)
    assert visible_pairs(lengths, "full") == sum(mask.numel() for mask in seen)


@pytest.mark.parametrize("window", [1, 2, 5, 7, 100])
def test_metrics_pairs_are_those_that_a_window_leaves(window):
    lengths = [7, 1, 5]
    seen = [torch.ones(length, length).tril().triu(1 - window) for length in lengths]
    assert visible_pairs(lengths, "causal", window) == sum(int(mask.sum()) for mask in seen)


def test_metrics_pairs_of_layers_are_each_those_of_its_window():
    shape = dataclasses.replace(SHAPE, attention_mask="causal", window_size=2, full_attention_every=3)
    assert attention_pairs(shape, [4, 1]) == 2 * (1 + 2 + 2 + 2 + 1) + (10 + 1)


def test_metrics_flops_of_llama_8b_at_128k_are_mostly_attention():
    """6 FLOPs per token and matrix weight, 6 H D (S + 1) per token and layer of causal attention."""
    shape = dataclasses.replace(
        SHAPE,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        vocab_size=128256,
        attention_mask="causal",
    )
    length = 131072
    matrix_weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # of the published count: all but embedding and norms
    flops = training_flops(shape, tokens=length, pairs=attention_pairs(shape, [length]))
    assert flops / length == pytest.approx(6 * matrix_weights + 32 * 6 * 4096 * (length + 1), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA L4", "bfloat16", 121),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)
def test_metrics_peak_is_the_dense_figure_of_the_device(name, dtype, tflops):
    assert peak_flops(name, dtype) == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA H20", "bfloat16"),
        ("NVIDIA A10G", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
    ],
)
def test_metrics_peak_is_not_guessed(name, dtype):
    assert peak_flops(name, dtype) is None
