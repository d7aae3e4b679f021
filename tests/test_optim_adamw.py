from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from cptrain.optim.adamw import build_optimizer, set_learning_rate
from cptrain.optim.settings import OptimizerConfig

IMPLEMENTATIONS = ("fused", "foreach", "for-loop")


class Toy(nn.Module):
    """A norm, a biased and an unbiased matrix, an embedding, and odd sizes that no degree divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.norm = nn.RMSNorm(12)
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 12, bias=False)
        self.odd = nn.Linear(12, 3)


def toy() -> Toy:
    torch.manual_seed(1)
    model = Toy().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def gradient(name: str, step: int, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def train(model: nn.Module, implementation: str) -> dict[str, torch.Tensor]:
    """Three steps with fixed gradients and moving rates; the weights as plain tensors."""
    optimizer = build_optimizer(model, OptimizerConfig(implementation=implementation, weight_decay=0.3))
    for step in range(1, 4):
        set_learning_rate(optimizer, 0.1 * step)
        for name, parameter in model.named_parameters():
            grad = gradient(name, step, parameter.shape)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        optimizer.step()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in whole.items()}


def reference() -> dict[str, torch.Tensor]:
    """AdamW written out, matrices decaying and vectors not."""
    weights = {name: p.detach().clone() for name, p in toy().named_parameters()}
    for name, weight in weights.items():
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(1, 4):
            lr, grad = 0.1 * step, gradient(name, step, weight.shape)
            if weight.ndim > 1:
                weight *= 1 - lr * 0.3
            mean = 0.9 * mean + 0.1 * grad
            square = 0.95 * square + 0.05 * grad**2
            weight -= lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
    return weights


def train_sharded(_rank: int, _world: int, implementation: str) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = toy()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "norm": SequenceParallel()}
    parallelize_module(model, mesh["tp"], plan)  # embedding and odd stay outside: their mesh is fsdp alone
    fully_shard(model, mesh=mesh["fsdp"])
    meshes = {p.device_mesh.ndim for p in model.parameters()}
    assert meshes == {1, 2}
    return train(model, implementation)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_optim_adamw_is_adamw_with_decay_on_matrices_only(implementation):
    weights = train(toy(), implementation)
    for name, expected in reference().items():
        torch.testing.assert_close(weights[name], expected, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_optim_adamw_over_mixed_meshes_equals_one_process(pool, implementation):
    expected = reference()
    for weights in pool.run(4, train_sharded, implementation):
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], atol=1e-12, rtol=0, msg=name)


def test_optim_groups_are_two_for_any_model_with_norms():
    groups = build_optimizer(toy(), OptimizerConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2}, {1}]


def test_optim_leaves_frozen_parameters_out():
    model = toy()
    model.embedding.requires_grad_(False)
    held = [p for group in build_optimizer(model, OptimizerConfig()).param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters())) - 1
    assert all(p is not model.embedding.weight for p in held)


def test_optim_counts_a_tied_weight_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embedding"].weight
    (group,) = build_optimizer(model, OptimizerConfig()).param_groups
    assert len(group["params"]) == 1


@pytest.mark.parametrize(
    ("implementation", "fused", "foreach"),
    [("auto", True, None), ("fused", True, None), ("foreach", False, True), ("for-loop", False, False)],
)
def test_optim_implementation_reaches_torch(implementation, fused, foreach):
    group = build_optimizer(toy(), OptimizerConfig(implementation=implementation)).param_groups[0]
    assert (group["fused"], group["foreach"]) == (fused, foreach)


def test_optim_refuses_parameters_on_meta():
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(RuntimeError, match=r"embedding\.weight, \.\.\.\) are on the meta device; materialise"):
        build_optimizer(model, OptimizerConfig())


def test_optim_refuses_a_model_with_nothing_to_train():
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(toy().requires_grad_(False), OptimizerConfig())
