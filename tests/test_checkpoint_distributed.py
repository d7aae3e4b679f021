"""Checkpoints of several ranks: any mesh reads what any other wrote, and a failing rank fails all."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import TOML, tmp_path
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from cptrain.checkpoint import checkpointer, files, folders, rng, storage
from cptrain.checkpoint.checkpointer import Checkpointer
from cptrain.checkpoint.settings import CheckpointConfig
from cptrain.checkpoint.state import training_state

__all__ = ["tmp_path"]

WIDTH, HIDDEN = 5, 6  # uneven over 2, 3 and 4 ranks, but for the hidden one over 2: tensor parallelism wants that


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def build(layout: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, int]]:
    """A model of two blocks on "one", "fsdp", "tp" or "fsdp_tp" (tp 2), its optimizer, and its mesh."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(Block(), Block())
    world = dist.get_world_size()
    tp = {"one": 1, "fsdp": 1, "tp": world, "fsdp_tp": 2}[layout]
    degrees = {"dp_shard": world // tp, "tp": tp}
    mesh: DeviceMesh = init_device_mesh("cpu", tuple(degrees.values()), mesh_dim_names=tuple(degrees))
    if tp > 1:
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if degrees["dp_shard"] > 1:
        for block in [*model, model]:
            fully_shard(block, mesh=mesh["dp_shard"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), degrees


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[str]:
    losses = []
    for step in steps:
        loss = model(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


def whole(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, bytes]:
    """The bits of every tensor, gathered."""
    return {
        f"{part}.{key}": (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy().tobytes()
        for part, tensors in state.items()
        for key, value in tensors.items()
    }


def open_folder(folder: Path, mesh: dict[str, int] | None = None, **settings: Any) -> Checkpointer:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return Checkpointer(CheckpointConfig(**settings), folder, group, mesh=mesh)


def train_and_save(rank: int, world: int, layout: str, folder: Path) -> dict[str, bytes]:
    model, optimizer, degrees = build(layout, seed=1)
    train(model, optimizer, range(3))
    state = training_state(model, optimizer)
    open_folder(folder, degrees).save(3, state, {"step": 3}, TOML)
    return whole(state)


def load_fresh(rank: int, world: int, layout: str, folder: Path) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    model, optimizer, _ = build(layout, seed=2)
    state = training_state(model, optimizer)
    plain = open_folder(folder).load(state)
    return plain, whole(training_state(model, optimizer))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, "fsdp"), (1, "one")),
        ((2, "fsdp"), (4, "fsdp")),
        ((2, "tp"), (2, "fsdp")),
        ((4, "fsdp_tp"), (3, "fsdp")),
        ((1, "one"), (4, "fsdp_tp")),
    ],
)
def test_checkpoint_moves_to_another_mesh_bitwise(pool, tmp_path, saved, loaded):
    written = pool.run(saved[0], train_and_save, saved[1], tmp_path)
    for plain, found in pool.run(loaded[0], load_fresh, loaded[1], tmp_path):
        assert plain == {"step": 3}
        assert found == written[0]


def resume_beside_straight(rank: int, world: int, layout: str, folder: Path) -> list[Any]:
    model, optimizer, degrees = build(layout, seed=1)
    train(model, optimizer, range(3))
    open_folder(folder, degrees).save(3, training_state(model, optimizer), {}, TOML)
    straight = train(model, optimizer, range(3, 6)), whole(training_state(model, optimizer))
    model, optimizer, _ = build(layout, seed=2)
    open_folder(folder).load(training_state(model, optimizer))
    resumed = train(model, optimizer, range(3, 6)), whole(training_state(model, optimizer))
    return [straight, resumed]


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_checkpoint_resumes_bitwise_on_the_same_mesh(pool, tmp_path, layout):
    for straight, resumed in pool.run(2, resume_beside_straight, layout, tmp_path):
        assert straight == resumed


def save_with_mesh(rank: int, world: int, folder: Path) -> None:
    open_folder(folder, {"dp_shard": 2, "tp": 1}).save(1, tensors(1), {}, TOML)


def test_checkpoint_manifest_tells_world_and_mesh(pool, tmp_path):
    pool.run(2, save_with_mesh, tmp_path)
    record = checkpointer.Manifest.from_text((tmp_path / "checkpoint/step-1/manifest.json").read_text())
    assert (record.world, record.mesh) == (2, {"dp_shard": 2, "tp": 1})
    assert {"__0_0.distcp", "__1_0.distcp"} <= record.files.keys()


# --- damage and failures on one rank ----------------------------------------------------------------------------------


def tensors(seed: int) -> dict[str, Any]:
    """Enough for every rank to write something: replicated tensors are dealt out among the ranks."""
    random = torch.Generator().manual_seed(seed)
    return {"model": {str(index): torch.randn(9, generator=random) for index in range(8)}}


def loaded_seed(saver: Checkpointer) -> int | None:
    target = tensors(0)
    state = saver.load(target)
    if state is None:
        return None
    assert all(torch.equal(value, target["model"][key]) for key, value in tensors(state["seed"])["model"].items())
    return state["seed"]


def save_damage_load(rank: int, world: int, name: str, folder: Path) -> int | None:
    saver = open_folder(folder)
    for step in (1, 2):
        saver.save(step, tensors(step), {"seed": step}, TOML)
    if rank == 0:
        path = folder / "checkpoint/step-2" / name
        content = bytearray(path.read_bytes())
        content[-50] ^= 1
        path.write_bytes(content)
    dist.barrier()
    return loaded_seed(open_folder(folder))


@pytest.mark.parametrize("name", ["__0_0.distcp", "__2_0.distcp"])
def test_checkpoint_damage_seen_by_one_rank_moves_all_to_the_older(pool, tmp_path, name):
    assert pool.run(3, save_damage_load, name, tmp_path) == [1, 1, 1]


def failing(where: str) -> Any:
    """A patch that makes one stage of a save fail on the rank that applies it."""
    error = OSError(28, "No space left on device")
    target, name = {
        "flatten": (checkpointer, "flatten"),
        "begin": (folders, "begin"),
        "dcp": (storage.dcp.FileSystemWriter, "write_data"),
        "flush": (files, "flush"),
        "digest": (files, "digest"),
        "commit": (folders, "commit"),
    }[where]
    return mock.patch.object(target, name, side_effect=error)


FAILURES = [
    ("flatten", 1),
    ("begin", 0),
    ("dcp", 0),
    ("dcp", 1),
    ("flush", 0),
    ("flush", 1),
    ("digest", 1),
    ("commit", 0),
]


def fail_one_rank(rank: int, world: int, folder: Path) -> list[tuple[str, int | None, bool]]:
    """For each of FAILURES: the message, what could be loaded after it, and whether the next save worked."""
    group = dist.new_group(backend="gloo")
    results = []
    for where, culprit in FAILURES:
        place = folder / f"{where}-{culprit}"
        saver = Checkpointer(CheckpointConfig(), place, group)
        saver.save(1, tensors(1), {"seed": 1}, TOML)
        with failing(where) if rank == culprit else contextlib.nullcontext():
            message = save_and_catch(saver)
        seed = loaded_seed(Checkpointer(CheckpointConfig(), place, group))
        results.append((message, seed, saver.save(2, tensors(2), {"seed": 2}, TOML)))
    return results


def save_and_catch(saver: Checkpointer) -> str:
    try:
        saver.save(2, tensors(2), {"seed": 2}, TOML)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_checkpoint_failure_of_one_rank_is_raised_by_all(pool, tmp_path):
    first, second = pool.run(2, fail_one_rank, tmp_path, timeout_s=60)
    assert first == second, "all ranks say the same"
    for failure, (message, seed, again) in zip(FAILURES, first, strict=True):
        assert f"rank {failure[1]}: OSError: [Errno 28] No space left on device" in message, failure
        assert (seed, again) == (1, True), f"{failure}: the checkpoint before is whole, and the next save works"


def load_other_tensors_on_one_rank(rank: int, world: int, folder: Path) -> str:
    open_folder(folder).save(1, tensors(1), {"seed": 1}, TOML)
    target = tensors(0)
    before = target["model"]["3"].clone()
    if rank == 1:
        target["model"]["odd"] = torch.zeros(2)
    try:
        open_folder(folder).load(target)
    except ValueError as error:
        assert torch.equal(before, target["model"]["3"])
        return str(error)
    return "nothing was raised"


def test_checkpoint_mismatch_on_one_rank_stops_all_before_anything_is_written(pool, tmp_path):
    messages = pool.run(2, load_other_tensors_on_one_rank, tmp_path)
    assert messages[0] == messages[1]
    assert "on rank 1: it holds other tensors than this run\n  1 not in the checkpoint: model.odd" in messages[0]


def without_group(rank: int, world: int, folder: Path) -> str:
    try:
        Checkpointer(CheckpointConfig(), folder)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_checkpoint_of_several_ranks_needs_a_group(pool, tmp_path):
    assert all("2 ranks need a process group" in message for message in pool.run(2, without_group, tmp_path))


def with_part_of_the_ranks(rank: int, world: int, folder: Path) -> str:
    group = dist.new_group([0, 1], backend="gloo")
    if rank < 2:
        with pytest.raises(ValueError, match="group has 2 of 3 ranks"):
            Checkpointer(CheckpointConfig(), folder, group)
    return "done"


def test_checkpoint_group_must_hold_all_ranks(pool, tmp_path):
    assert pool.run(3, with_part_of_the_ranks, tmp_path) == ["done"] * 3


# --- generators -------------------------------------------------------------------------------------------------------


def save_generators(rank: int, world: int, folder: Path) -> list[float]:
    torch.manual_seed(100 + rank)
    open_folder(folder).save(1, {**tensors(1), rng.SECTION: rng.capture(rank)}, {}, TOML)
    return torch.rand(3).tolist()


def load_generators(rank: int, world: int, folder: Path) -> tuple[list[float], list[str]]:
    torch.manual_seed(200 + rank)
    state = {**tensors(0), rng.SECTION: rng.capture(rank)}
    with logged() as lines:
        open_folder(folder).load(state)
    rng.restore(state[rng.SECTION])
    return torch.rand(3).tolist(), [line for line in lines if "generator" in line]


class logged(logging.Handler):
    """The lines that cptrain logs inside of it."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        logging.getLogger("cptrain").addHandler(self)
        self._level = logging.getLogger("cptrain").level
        logging.getLogger("cptrain").setLevel(logging.INFO)
        return self.lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __exit__(self, *error: object) -> None:
        logging.getLogger("cptrain").removeHandler(self)
        logging.getLogger("cptrain").setLevel(self._level)


def seeded(seed: int) -> list[float]:
    return torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_checkpoint_generators_return_to_their_rank(pool, tmp_path, world):
    assert pool.run(2, save_generators, tmp_path) == [seeded(100), seeded(101)]
    results = pool.run(world, load_generators, tmp_path)
    expected = [seeded(100), seeded(101), seeded(202), seeded(203)][:world]
    assert [drawn for drawn, _ in results] == expected
    lines = [] if world == 2 else [f"{world} ranks now, 2 then: {min(world, 2)} of them take"]
    assert [line.split(" their")[0].removeprefix("checkpoint: ") for line in results[0][1]] == lines
