"""The same ranks divided anew into data, ring and ulysses axes."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def regrouped_mesh(mesh: DeviceMesh, context: tuple[str, str], degrees: tuple[int, int], *, data: str) -> DeviceMesh:
    """A mesh whose ring and ulysses axes, named by `context`, have other degrees; other axes stay what they are.

    The axis `data` takes the ranks that the degrees leave; they keep their order. Collective over all ranks of the
    default group, which must be those of the mesh. Raises ValueError for degrees that do not fit.
    """
    names = mesh.mesh_dim_names or ()
    ours = [axis for axis in names if axis in (data, *context)]
    total = math.prod(mesh.size(names.index(axis)) for axis in ours)
    ring, ulysses = degrees
    if min(degrees) < 1 or total % (ring * ulysses) or (data not in names and total != ring * ulysses):
        raise ValueError(
            f"ring {ring} x ulysses {ulysses} does not fit the {total} ranks of {' x '.join(ours)}: the product "
            f"must {'divide' if data in names else 'be'} {total}"
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the mesh has {mesh.size()} of {dist.get_world_size()} ranks; regroup needs one with all of them"
        )
    sizes = {data: total // (ring * ulysses), **dict(zip(context, degrees, strict=True))}
    wanted = [axis for axis in ours if axis == data]
    wanted += sorted(context, key=lambda axis: names.index(axis) if axis in names else len(names))
    others = [axis for axis in names if axis not in ours]
    ranks = mesh.mesh.permute([names.index(axis) for axis in (*others, *ours)])
    shape = [*(mesh.size(names.index(axis)) for axis in others), *(sizes[axis] for axis in wanted)]
    return DeviceMesh(mesh.device_type, ranks.reshape(shape), mesh_dim_names=(*others, *wanted))
