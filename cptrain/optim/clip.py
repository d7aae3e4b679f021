"""The global norm of the gradients over every mesh axis, and clipping by it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[torch.nn.Parameter], max_norm: float, *, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The 2-norm of all gradients taken as one vector, fp64, 0-dim, equal on all ranks; gradients are clipped in place.

    If the norm exceeds `max_norm`, every gradient is multiplied by max_norm / (norm + 1e-6), as torch's own clipping
    does; `max_norm = inf` only measures. A norm that is inf or nan is returned as it is and the gradients are left
    alone (scaling them would turn every weight to nan): the caller decides. The host never waits for the device.

    `group` (None: the default group, or this process alone when there is none) holds all ranks on which the model
    lives, and all of them must call. Gradients are plain tensors, which count as equal on all ranks of `group`, and
    DTensors on any meshes inside `group`; a mesh that covers a part of `group` is repeated over the rest of it.

    [Note: counting each element once] An element of a gradient is held by c ranks of the group: one for each coordinate
    of the Replicate axes of its mesh, times group size / mesh size for the axes that its mesh does not have. Each
    holder adds 1/c of the element's square, so one sum over the group is exact whatever mix of meshes there is, a nan
    on any one rank reaches all of them, and no axis has to be known by name. Squares are summed in fp64: fp32 norms of
    the same gradient differ by 5e-5 from one sharding to another, since rounding follows the order of summation.

    Raises ValueError for max_norm <= 0, a gradient still to be reduced (Partial), or a mesh reaching outside `group`.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm = {max_norm}: must be positive; use inf to measure without clipping")
    parameters = list(parameters)
    ranks = set(dist.get_process_group_ranks(group)) if dist.is_initialized() else {0}
    copies_outside: dict[DeviceMesh, int] = {}
    local_grads: list[torch.Tensor] = []
    by_holders: dict[int, list[torch.Tensor]] = defaultdict(list)
    for grad in (p.grad for p in parameters if p.grad is not None):
        holders = len(ranks)
        local = grad
        if isinstance(grad, DTensor):
            mesh = grad.device_mesh
            if mesh not in copies_outside:
                copies_outside[mesh] = _copies_outside(mesh, ranks)
            holders = copies_outside[mesh] * _copies_inside(grad)
            local = grad.to_local()
        if local.numel():  # an uneven shard may be empty
            by_holders[holders].append(local)
            local_grads.append(local)

    device = local_grads[0].device if local_grads else parameters[0].device if parameters else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for holders, grads in by_holders.items():
        norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
        total += torch.stack(norms).square().sum() / holders
    if len(ranks) > 1:
        dist.all_reduce(total, group=group)
    norm = total.sqrt()
    if not math.isinf(max_norm):
        _scale(local_grads, norm, max_norm)
    return norm


def _copies_inside(grad: DTensor) -> int:
    """How many ranks of its mesh hold each element of `grad`."""
    copies = 1
    for axis, placement in enumerate(grad.placements):
        if placement.is_partial():
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} is {placement} on mesh axis {axis} of {grad.device_mesh}: "
                "its values are not summed yet; redistribute it to the placements of its parameter first"
            )
        if placement.is_replicate():
            copies *= grad.device_mesh.size(axis)
    return copies


def _copies_outside(mesh: DeviceMesh, ranks: set[int]) -> int:
    """How many meshes like `mesh` fit into the group: the copies that the axes it does not have make."""
    if not ranks.issuperset(mesh.mesh.flatten().tolist()) or len(ranks) % mesh.size():
        raise ValueError(
            f"{mesh} does not divide the group of ranks {sorted(ranks)}; pass the group that holds the model"
        )
    return len(ranks) // mesh.size()


def _scale(grads: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Multiply `grads` in place so that their norm is at most `max_norm`; by exactly 1 where `norm` is not finite."""
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(grad)
    for dtype, same in by_dtype.items():
        torch._foreach_mul_(same, factor.to(torch.promote_types(dtype, torch.float32)))
