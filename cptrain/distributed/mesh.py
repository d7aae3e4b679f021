"""The device meshes of a run.

[Note: two meshes over the same ranks]
The batch mesh (dp_replicate, dp_shard, ring, ulysses, tp) says which tokens a rank reads. The parameter mesh
(dp_replicate, fsdp, tp) says which parameters it owns: FSDP2 shards over dp_shard x ring x ulysses as one axis, because
ranks that share a sequence hold the same parameters as ranks that do not. Both count ranks in the same row-major order,
so `fsdp` is exactly the flattened three axes. They are two meshes rather than one with a flattened view because the
context-parallel degrees may then change without touching the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cptrain.distributed.settings import Degrees, Order


@dataclass(frozen=True)
class Meshes:
    """The axes of one run and this rank's place on them; see [Note: two meshes over the same ranks]."""

    degrees: Degrees
    device: torch.device
    batch: DeviceMesh
    parameters: DeviceMesh

    def regrouped(self, batch: DeviceMesh, degrees: Degrees) -> Meshes:
        """The same parameters under another division of dp_shard x ring x ulysses."""
        assert degrees.fsdp == self.degrees.fsdp and degrees.tp == self.degrees.tp
        return replace(self, batch=batch, degrees=degrees)

    @property
    def tp(self) -> DeviceMesh:
        """The tensor-parallel axis, over which each weight matrix is cut."""
        return self.parameters["tp"]

    @property
    def fsdp(self) -> DeviceMesh:
        """Where FSDP2 shards parameters: one axis, or (dp_replicate, fsdp) for HSDP."""
        if self.degrees.dp_replicate > 1:
            return self.parameters["dp_replicate", "fsdp"]
        return self.parameters["fsdp"]

    @property
    def data_rank(self) -> int:
        """Which sequences this rank reads, in [0, degrees.data): equal for all context and tensor peers."""
        return self.batch.get_local_rank("dp_replicate") * self.degrees.dp_shard + self.batch.get_local_rank("dp_shard")

    def sum_over_batch(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed in place over all ranks that hold different tokens (tensor peers hold the same)."""
        for axis in ("fsdp", "dp_replicate"):
            if self.parameters.size(("dp_replicate", "fsdp").index(axis)) > 1:
                dist.all_reduce(values, group=self.parameters.get_group(axis))
        return values


def build_meshes(degrees: Degrees, device: torch.device, *, order: Order = "head_first") -> Meshes:
    """The meshes for these degrees. Collective: every rank of the default process group calls it.

    order: "head_first" makes the ranks of one ulysses group neighbours, "context_first" those of one ring.
    Raises ValueError when the degrees do not multiply to the world size.
    """
    world = dist.get_world_size()
    if degrees.world != world:
        raise ValueError(f"the mesh {degrees} needs {degrees.world} ranks, but the world size is {world}")
    context = ("ring", "ulysses") if order == "head_first" else ("ulysses", "ring")
    axes = ("dp_replicate", "dp_shard", *context, "tp")
    batch = init_device_mesh(device.type, tuple(getattr(degrees, axis) for axis in axes), mesh_dim_names=axes)
    parameters = init_device_mesh(
        device.type,
        (degrees.dp_replicate, degrees.fsdp, degrees.tp),
        mesh_dim_names=("dp_replicate", "fsdp", "tp"),
    )
    return Meshes(degrees=degrees, device=device, batch=batch, parameters=parameters)
