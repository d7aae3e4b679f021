"""Initialisation: the right distribution, and the same bits on every mesh."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from cptrain.models.init import CUT, STD, _splitmix64, initialise
from cptrain.models.llama import Llama
from cptrain.models.settings import ModelConfig, resolve

# Rows that no small degree divides: 38 vocabulary, 20 dim, 36 ffn, 24 query and 12 kv channels.
ODD: dict[str, Any] = {
    "dim": 20,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "ffn_dim": 36,
    "vocab_size": 38,
    "qkv_bias": True,
    "qk_norm": True,
}


def make_model(seed: int = 7, dtype: torch.dtype = torch.float32, **keys: Any) -> Llama:
    model = Llama(resolve(ModelConfig(**ODD | keys), 38)).to(dtype)
    initialise(model, seed)
    return model


def truncated_normal(std: float) -> tuple[float, float]:
    """Standard deviation after truncation, and the largest absolute value."""
    n = NormalDist()
    inside = n.cdf(CUT) - n.cdf(-CUT)
    return std * (1 - 2 * CUT * n.pdf(CUT) / inside) ** 0.5, std * CUT


def test_models_init_hash_is_splitmix64():
    def reference(state: int) -> int:
        word = 2**64 - 1
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & word
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & word
        return state ^ (state >> 31)

    counters = [0, 1, 2, 12345, 2**31, 2**40 + 7]
    for key in (0, -5, 2**62 + 99):
        actual = _splitmix64(torch.tensor(counters), key).tolist()
        expected = [reference((c * 0x9E3779B97F4A7C15 + key) % 2**64) for c in counters]
        assert [value % 2**64 for value in actual] == expected
    # First output of the published generator for seed 0: the state is one increment on.
    assert _splitmix64(torch.tensor([1]), 0).item() % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("name", ["tok_embeddings", "output", "layers.0.attention.wq", "layers.1.feed_forward.w1"])
def test_models_init_weights_are_truncated_normal(name):
    model = make_model(dim=512, ffn_dim=512, vocab_size=512, head_dim=128)
    values = model.get_submodule(name).weight.detach().double().flatten()
    std, largest = truncated_normal(STD)
    assert abs(values.mean()) < 5 * std / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(std, rel=0.01)
    assert 0.97 * largest < values.abs().max() <= largest
    # Kolmogorov-Smirnov distance to the truncated normal; 1.63 / sqrt(n) is the 1 % point.
    n = NormalDist(0, STD)
    low = n.cdf(-largest)
    ordered = values.sort().values[:: values.numel() // 4096]
    expected = torch.tensor([(n.cdf(v) - low) / (1 - 2 * low) for v in ordered.tolist()])
    actual = torch.arange(len(ordered)) * (values.numel() // 4096) / values.numel()
    assert (expected - actual).abs().max() < 1.63 / values.numel() ** 0.5 + 1 / values.numel()


@pytest.mark.parametrize("num_layers", [1, 8])
@pytest.mark.parametrize("name", ["attention.wo", "feed_forward.w2"])
def test_models_init_residual_projections_shrink_with_depth(name, num_layers):
    model = make_model(dim=256, ffn_dim=256, head_dim=64, num_layers=num_layers)
    weight = model.layers[0].get_submodule(name).weight
    assert weight.std().item() == pytest.approx(truncated_normal(STD / (2 * num_layers) ** 0.5)[0], rel=0.02)


def test_models_init_norms_are_one_and_biases_zero():
    state = make_model().state_dict()
    assert all((tensor == 1).all() for name, tensor in state.items() if "norm" in name)
    assert all((tensor == 0).all() for name, tensor in state.items() if name.endswith("bias"))
    assert sum(name.endswith("bias") for name in state) == 6


def test_models_init_overwrites_every_element():
    model = Llama(resolve(ModelConfig(**ODD), 38))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_models_init_streams_are_independent():
    weights = torch.stack(
        [p.detach().flatten()[:320] for n, p in make_model().named_parameters() if p.ndim == 2 and p.numel() >= 320]
        + [make_model(seed=8).tok_embeddings.weight.detach().flatten()[:320]]
    )
    shifted = torch.cat((weights, weights.roll(1, dims=1), weights.roll(20, dims=1)))
    correlation = torch.corrcoef(shifted) - torch.eye(len(shifted))
    assert correlation.abs().max() < 5 / 320**0.5


def test_models_init_depends_on_the_seed_alone():
    first, again, other = make_model(7), make_model(7), make_model(8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.output.weight, other.output.weight)


def test_models_init_rounds_fp32_values_to_the_parameters_dtype():
    exact, half, double = (make_model(dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))
    assert torch.equal(half.output.weight, exact.output.weight.bfloat16())
    assert torch.equal(double.output.weight, exact.output.weight.double())


def test_models_init_ignores_wrappers_in_names():
    plain = make_model()
    wrapped = Llama(plain.shape)
    wrapped.layers[0] = checkpoint_wrapper(wrapped.layers[0])
    wrapped.layers[1] = torch.compile(checkpoint_wrapper(wrapped.layers[1]), backend="eager")
    names = [name for name, _ in wrapped.named_parameters()]
    assert any("_checkpoint_wrapped_module" in name for name in names)
    assert any("_orig_mod" in name for name in names)
    initialise(wrapped, 7)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


def test_models_init_refuses_the_meta_device():
    with torch.device("meta"):
        model = Llama(resolve(ModelConfig(**ODD), 38))
    with pytest.raises(RuntimeError, match="to_empty"):
        initialise(model, 0)


def test_models_init_refuses_parted_ties():
    model = make_model(tied_embeddings=True)
    model.output.weight = torch.nn.Parameter(model.output.weight.detach().clone())
    with pytest.raises(RuntimeError, match="tie_weights"):
        initialise(model, 0)


# Meshes -------------------------------------------------------------------------------------------------------------


def shard(model: Llama, replicate: int, fsdp: int, tp: int) -> None:
    """Tensor parallel with sequence parallel, then FSDP2 by block; a degree of 1 leaves its step out."""
    mesh = init_device_mesh("cpu", (replicate, fsdp, tp), mesh_dim_names=("replicate", "fsdp", "tp"))
    if tp > 1:
        plan: dict[str, Any] = {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        for name, module in model.named_modules():
            if name.endswith(("attention_norm", "ffn_norm")):
                plan[name] = SequenceParallel()
            elif name.endswith(("q_norm", "k_norm")) and isinstance(module, torch.nn.RMSNorm):
                plan[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
            elif name.endswith("attention"):
                plan[name] = PrepareModuleInput(
                    input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
                )
            elif name.endswith("feed_forward"):
                plan[name] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
            elif name.endswith(("wq", "wk", "wv", "w1", "w3")):
                plan[name] = ColwiseParallel()
            elif name.endswith(("wo", "w2")):
                plan[name] = RowwiseParallel(output_layouts=Shard(1))
        parallelize_module(model, mesh["tp"], plan)
        model.tie_weights()
    if fsdp > 1:
        data = mesh["replicate", "fsdp"] if replicate > 1 else mesh["fsdp"]
        for block in model.layers:
            fully_shard(block, mesh=data)
        fully_shard(model, mesh=data)


def make_sharded(degrees: tuple[int, int, int], seed: int, dtype: torch.dtype, **keys: Any) -> Llama:
    with torch.device("meta"):
        model = Llama(resolve(ModelConfig(**ODD | keys), 38)).to(dtype)
    shard(model, *degrees)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_init(rank: int, world: int, degrees: tuple[int, int, int]) -> tuple[list[str], int]:
    """Names whose gathered values differ from the unsharded model's, and the elements this rank holds."""
    model, alone = make_sharded(degrees, 7, torch.float32), make_model()
    wrong = [
        name
        for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True)
        if not torch.equal(full(a.detach()), b)
    ]
    return wrong, sum(full_or_local(p).numel() for p in model.parameters())


def full_or_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    "degrees", [(1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2), (1, 3, 2)], ids=str
)
def test_models_init_gives_every_mesh_the_same_bits(pool, degrees):
    replicate, fsdp, tp = degrees
    results = pool.run(replicate * fsdp * tp, sharded_init, degrees)
    assert [wrong for wrong, _ in results] == [[]] * len(results)
    whole = sum(parameter.numel() for parameter in make_model().parameters())
    held = sum(elements for _, elements in results)
    assert held == whole * replicate if tp == 1 else whole <= held < 1.2 * whole  # replicated norms


def sharded_step(rank: int, world: int, degrees: tuple[int, int, int], keys: dict[str, Any]) -> dict[str, float]:
    """Largest difference of the logits and of each gradient from the unsharded model's."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 38, (2, 8))
    positions = torch.randperm(64)[:8].expand(2, -1)
    model, alone = make_sharded(degrees, 7, torch.float64, **keys), make_model(dtype=torch.float64, **keys)
    logits, expected = model(tokens, positions), alone(tokens, positions)
    errors = {"logits": (logits - expected).abs().max().item()}
    for output in (logits, expected):
        output.pow(2).sum().backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        # Every FSDP rank reads the same batch, so the mean over ranks is the single-process gradient.
        errors[name] = ((full(a.grad) - b.grad).abs().max() / b.grad.abs().max().clamp(min=1e-3)).item()
    return errors


@pytest.mark.parametrize("keys", [{}, {"tied_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("degrees", [(1, 2, 1), (1, 1, 2), (1, 2, 2)], ids=str)
def test_models_llama_sharded_step_equals_one_process(pool, degrees, keys):
    for errors in pool.run(degrees[1] * degrees[2], sharded_step, degrees, keys):
        assert {name: error for name, error in errors.items() if not error < 1e-9} == {}
        assert ("output.weight" in errors) == (not keys)
