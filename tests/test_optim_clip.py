from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from cptrain.optim.clip import clip_grad_norm

# Sizes that 2, 3 and 4 do not divide, one of them smaller than the mesh so that shards are empty.
SHAPES = ((5, 6), (3,), (7, 2), (2, 9), (4, 4))


def full_gradients(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def true_norm(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def with_gradient(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    return parameter


def place(gradient: torch.Tensor, mesh: DeviceMesh | None, *placements: object) -> nn.Parameter:
    return with_gradient(gradient if mesh is None else distribute_tensor(gradient, mesh, placements))


def whole(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def plain(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    return [place(g, None) for g in gradients]


def fsdp(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [place(g, mesh, Shard(0)) for g in gradients]


def hsdp(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
    return [place(g, mesh, Replicate(), Shard(0)) for g in gradients]


def fsdp_tp(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    placements = [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Shard(0), Shard(0)), (Replicate(), Shard(1))]
    return [
        *(place(g, mesh, *where) for g, where in zip(gradients, placements, strict=False)),
        place(gradients[-1], mesh["fsdp"], Shard(0)),  # a parameter that the tp plan does not name
    ]


def mixed(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    """Three axes; each gradient on another subset of them, one on none."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
    return [
        place(gradients[0], mesh, Replicate(), Shard(0), Shard(1)),
        place(gradients[1], mesh["dp_replicate", "fsdp"], Replicate(), Shard(0)),
        place(gradients[2], mesh["fsdp"], Shard(0)),
        place(gradients[3], mesh["tp"], Shard(1)),
        place(gradients[4], None),
    ]


Layout = Callable[[list[torch.Tensor]], list[nn.Parameter]]


def clip_in(
    _rank: int, _world: int, layout: Layout, max_norm: float, dtype: torch.dtype
) -> tuple[float, list[torch.Tensor]]:
    parameters = layout(full_gradients(dtype))
    norm = clip_grad_norm(parameters, max_norm)
    assert norm.dtype == torch.float64
    return float(norm), [whole(p) for p in parameters]


LAYOUTS = [(4, plain), (1, fsdp), (3, fsdp), (4, fsdp), (4, hsdp), (4, fsdp_tp), (8, mixed)]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_clip_norm_is_global_in_every_layout(pool, world, layout):
    gradients = full_gradients()
    norm = true_norm(gradients)
    for found, clipped in pool.run(world, clip_in, layout, 0.25, torch.float64):
        assert found == pytest.approx(norm, rel=1e-13)
        for grad, before in zip(clipped, gradients, strict=True):
            torch.testing.assert_close(grad, before * (0.25 / (norm + 1e-6)), atol=1e-14, rtol=0)


@pytest.mark.parametrize(("world", "layout"), [(4, fsdp), (4, hsdp), (4, fsdp_tp), (8, mixed)])
def test_clip_norm_of_fp32_gradients_does_not_drift_with_the_layout(pool, world, layout):
    norm = true_norm(full_gradients(torch.float32))
    for found, _ in pool.run(world, clip_in, layout, math.inf, torch.float32):
        assert found == pytest.approx(norm, rel=1e-13)


def test_clip_leaves_gradients_below_the_limit_bitwise_alone():
    parameters = plain(full_gradients())
    clip_grad_norm(parameters, 1e6)
    assert all(torch.equal(p.grad, before) for p, before in zip(parameters, full_gradients(), strict=True))


def test_clip_agrees_with_torch_in_one_process():
    ours, theirs = plain(full_gradients()), plain(full_gradients())
    norm = clip_grad_norm(ours, 0.5)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.5), atol=1e-13, rtol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-15, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_keeps_the_dtype_of_the_gradients(dtype):
    parameters = plain(full_gradients(dtype))
    norm = true_norm(full_gradients(dtype))
    assert float(clip_grad_norm(parameters, 0.5)) == pytest.approx(norm, rel=1e-13)
    assert {p.grad.dtype for p in parameters} == {dtype}
    assert true_norm([p.grad for p in parameters]) == pytest.approx(0.5, rel=1e-2)


def test_clip_skips_parameters_without_gradient():
    parameters = [nn.Parameter(torch.ones(3)), with_gradient(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(()))]
    assert float(clip_grad_norm(parameters, 1.0)) == 5.0
    assert float(clip_grad_norm(parameters[::2], 1.0)) == 0.0


def poisoned(_rank: int, _world: int, value: float) -> tuple[float, bool]:
    """One element, held by the last rank alone, is not finite."""
    gradients = full_gradients()
    gradients[2][-1, -1] = value
    parameters = fsdp(gradients)
    norm = clip_grad_norm(parameters, 0.1)
    return float(norm), all(
        torch.equal(whole(p).nan_to_num(), g.nan_to_num()) for p, g in zip(parameters, gradients, strict=True)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_clip_reports_a_non_finite_norm_on_all_ranks_and_scales_nothing(pool, value):
    for norm, untouched in pool.run(4, poisoned, value):
        assert not math.isfinite(norm)
        assert untouched


def one_replica_nan(rank: int, world: int) -> float:
    mesh = init_device_mesh("cpu", (world,))
    local = torch.full((3,), math.nan if rank == world - 1 else 1.0)
    return float(clip_grad_norm([with_gradient(DTensor.from_local(local, mesh, [Replicate()], run_check=False))], 1.0))


def test_clip_sees_a_nan_that_only_one_replica_has(pool):
    assert all(math.isnan(norm) for norm in pool.run(3, one_replica_nan))


def uneven_work(rank: int, _world: int) -> float:
    """Rank 0 alone has a gradient: the others still join the reduction."""
    return float(clip_grad_norm(plain([torch.tensor([6.0, 8.0])]) if rank == 0 else [], 1.0))


def test_clip_ranks_without_gradients_take_part(pool):
    assert pool.run(2, uneven_work) == [pytest.approx(10 / math.sqrt(2))] * 2


def in_half_of_the_world(rank: int, _world: int) -> tuple[float, str]:
    """Two models of two ranks each; the second has twice the gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "fsdp"))
    gradients = [g * (1 + rank // 2) for g in full_gradients()]
    parameters = [place(g, mesh["fsdp"], Shard(0)) for g in gradients]
    other = [place(g, mesh, Replicate(), Shard(0)) for g in full_gradients()]
    try:
        clip_grad_norm(other, 1.0, group=mesh.get_group("fsdp"))
    except ValueError as error:
        return float(clip_grad_norm(parameters, math.inf, group=mesh.get_group("fsdp"))), str(error)
    return 0.0, ""


def test_clip_stays_inside_the_group_it_is_given(pool):
    norm = true_norm(full_gradients())
    results = pool.run(4, in_half_of_the_world)
    assert [found for found, _ in results] == pytest.approx([norm, norm, 2 * norm, 2 * norm], rel=1e-13)
    assert all("pass the group that holds the model" in error for _, error in results)


def partial_gradient(_rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (world,))
    gradient = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"not summed yet") as error:
        clip_grad_norm([with_gradient(gradient)], 1.0)
    return str(error.value)


def test_clip_refuses_gradients_still_to_be_summed(pool):
    assert "mesh axis 0" in pool.run(2, partial_gradient)[0]


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_clip_refuses_a_limit_that_is_not_positive(max_norm):
    with pytest.raises(ValueError, match="must be positive; use inf"):
        clip_grad_norm([], max_norm)
