"""FSDP2's collectives of CPU tensors by messages, which gloo's own take 2 to 3 times as long as."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cptrain.distributed.transport import all_gather, reduce_scatter


class _OnHost:
    """What FSDP2 asks of any of its communications."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for what is sent or received."""
        return torch.empty(size, dtype=dtype, device=device)


class AllGather(_OnHost):
    """For FSDP2's `set_custom_all_gather`."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Write to the output [N n] the inputs [n] of all N ranks; done on return."""
        all_gather(output_tensor.view(group.size(), -1), input_tensor, group)


class ReduceScatter(_OnHost):
    """For FSDP2's `set_custom_reduce_scatter`."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Write to the output [n] this rank's part of the inputs [N n], summed over all N ranks; done on return."""
        if op != dist.ReduceOp.SUM:
            raise NotImplementedError(f"{op}: gradients are summed here, not averaged")
        reduce_scatter(output_tensor, input_tensor.view(group.size(), -1), group)
