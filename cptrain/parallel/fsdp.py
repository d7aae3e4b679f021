"""FSDP2 over dp_shard x ring x ulysses, replicated over dp_replicate (HSDP)."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cptrain.models.llama import Llama
from cptrain.parallel.by_messages import AllGather, ReduceScatter


def apply_fsdp(
    model: Llama,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shard each block as one group, the embeddings as one, and the rest (norm, output) with the root.

    Parameters are gathered in `param_dtype`, gradients summed (not averaged) in `reduce_dtype`: the loss is divided by
    the global count of tokens, so nothing is left to average.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        # Rotary tables are inputs of the blocks: casting them would round angles of long positions.
        cast_forward_inputs=False,
    )
    # Tied embeddings are one parameter and stay with the root; `output` is read by the loss inside the root's forward.
    groups = [*model.layers, *([] if model.shape.tied_embeddings else [model.tok_embeddings])]
    for module in groups:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A factor of 1 would still be sent as a pre-multiplied sum, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
            if mesh.device_type == "cpu":
                # Their base classes have no public name.
                module.set_custom_all_gather(AllGather())  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]
