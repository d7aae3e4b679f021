"""What of a model, an optimizer and the generators goes into a checkpoint, and that taking it changes nothing."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from test_checkpoint import TOML, make, tmp_path
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cptrain.checkpoint import rng
from cptrain.checkpoint.state import materialise, training_state

__all__ = ["tmp_path"]

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, fused=True),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.5, amsgrad=True),
    "tensor_lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.1), weight_decay=0.5, foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5, momentum=0.9),
    "sgd_plain": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5),
}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Dropout(0.5), torch.nn.Linear(7, 3))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("remade", torch.ones(2), persistent=False)
        with torch.no_grad():
            self.layers[0].bias.copy_(torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, 1.0, -1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.frozen


def build(name: str = "adamw") -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Model()
    biases, weights = [p for p in model.parameters() if p.dim() < 2], [p for p in model.parameters() if p.dim() == 2]
    return model, OPTIMIZERS[name]([{"params": weights}, {"params": biases, "weight_decay": 0.0}])


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[str]:
    losses = []
    for _ in range(steps):
        loss = model(torch.rand(4, 5) + random.random() + numpy.random.rand()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


def seed(value: int = 0) -> None:
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value)


def bits(value: Any) -> Any:
    """As bytes: == takes 0.0 and -0.0 for equal."""
    return value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoint_state_of_a_fresh_optimizer_changes_nothing(name):
    model, optimizer = build(name)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.dim() == 1 and parameter.requires_grad else None
    before = [(bits(p), p.grad) for p in model.parameters()]
    settings = [{key: bits(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    training_state(model, optimizer)
    assert [bits(p) for p in model.parameters()] == [value for value, _ in before]
    assert all(p.grad is grad for p, (_, grad) in zip(model.parameters(), before, strict=True))
    assert settings == [{k: bits(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoint_state_of_a_fresh_optimizer_leaves_training_as_it_was(name):
    """Looking for a checkpoint and finding none gives the run of one that never looked."""
    results = []
    for look in (False, True):
        model, optimizer = build(name)
        if look:
            training_state(model, optimizer)
        seed()
        results.append((train(model, optimizer, 3), [bits(p) for p in model.parameters()]))
    assert results[0] == results[1]


def test_checkpoint_state_fills_only_what_is_missing():
    model, optimizer = build()
    model.layers[0].requires_grad_(False)
    seed()
    train(model, optimizer, 2)
    model.layers[0].requires_grad_(True)
    before = copy.deepcopy(optimizer.state[model.layers[2].weight])
    materialise(optimizer)
    assert before.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(before[key], optimizer.state[model.layers[2].weight][key]) for key in before)
    assert optimizer.state[model.layers[0].weight]["step"].item() == 0


def test_checkpoint_state_has_plain_names_and_no_settings():
    model, optimizer = build()
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    state = training_state(model, optimizer)
    trained = ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    assert set(state["model"]) == {*trained, "frozen", "kept"}
    assert set(state["optimizer"]) == {f"{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoint_state_resumes_bitwise(tmp_path, name):
    model, optimizer = build(name)
    seed()
    train(model, optimizer, 2)
    make(tmp_path).save(2, {**training_state(model, optimizer), rng.SECTION: rng.capture(0)}, {}, TOML)
    straight = train(model, optimizer, 3), [bits(p) for p in model.parameters()]

    seed(99)
    model, optimizer = build(name)
    state = {**training_state(model, optimizer), rng.SECTION: rng.capture(0)}
    for tensor in state["model"].values():
        tensor.fill_(-1)
    make(tmp_path).load(state)
    rng.restore(state[rng.SECTION])
    assert (train(model, optimizer, 3), [bits(p) for p in model.parameters()]) == straight


def test_checkpoint_state_keeps_the_settings_of_the_config(tmp_path):
    model, optimizer = build()
    make(tmp_path).save(1, training_state(model, optimizer), {}, TOML)
    optimizer.param_groups[0]["lr"] = 0.25
    make(tmp_path).load(training_state(model, optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("gauss", [False, True])
def test_checkpoint_generators_come_back(gauss):
    def draw() -> list[Any]:
        values = [torch.rand(3).tolist(), torch.randn(5).tolist(), random.random(), numpy.random.rand()]
        return [*values, random.gauss(0, 1), numpy.random.randn()]

    seed(5)
    if gauss:  # leaves the second value of a pair in Python's and NumPy's state
        draw()
    state = rng.capture(0)
    first = draw()
    assert draw() != first
    rng.restore(state)
    assert draw() == first
