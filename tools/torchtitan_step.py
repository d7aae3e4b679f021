"""The step of `bench_step` by torchtitan 0.2.2: its own trainer, model, plans and clipping, on CPU.

    pip install --no-deps torchtitan==0.2.2 datasets tokenizers tyro einops pillow  # and what these ask for
    python tools/bench_step.py --cases one,cp2,tp2,torchtitan_one,torchtitan_cp2,torchtitan_tp2

As released it does not start without an accelerator, and torch's ring has no handler for the CPU's attention kernel.
What is changed for that is in `on_cpu`, `cpu_kernel_in_torch_ring` and `force_sums`. On the clock of it are the ring,
which is torch's own template, and the sums of gradients, which are FSDP2's without a factor of 1. Everything else is as
it comes: its loop does not ask the allocator to keep freed memory, for example; with
MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2147483647 in the environment it is on a par with ours there too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import Tensor, nn

NEEDED = ("torchtitan", "datasets", "tokenizers", "tyro", "einops", "PIL")


def missing() -> list[str]:
    """Which of its packages are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def time_torchtitan(arguments: Namespace, folder: Path, clock: Any, degrees: dict[str, int]) -> None:
    """Run the steps that `arguments` ask for, each on the `clock`; degrees: of its section `parallelism`."""
    import torch
    import torch.distributed as dist

    on_cpu()
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    if degrees.get("context_parallel_degree", 1) > 1:
        cpu_kernel_in_torch_ring()
    shape = TransformerModelArgs(
        dim=arguments.dim,
        n_layers=arguments.layers,
        n_heads=arguments.heads,
        n_kv_heads=arguments.kv_heads or arguments.heads,
        vocab_size=arguments.vocab,
    )

    def batches(**_: object) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(0)  # the ranks of one sequence read the same
        tokens = torch.randint(0, min(256, arguments.vocab), (1, arguments.tokens + 1), generator=generator)
        while True:
            yield {"input": tokens[:, :-1].clone()}, tokens[:, 1:].clone()

    register_train_spec(
        "bench",
        dataclasses.replace(
            get_train_spec(), model_args={"bench": shape}, build_dataloader_fn=batches, build_tokenizer_fn=None
        ),
    )
    config = JobConfig()
    config.job.dump_folder = str(folder)
    config.model.name = config.model.flavor = "bench"
    config.training.local_batch_size = 1
    config.training.seq_len = arguments.tokens
    config.training.steps = arguments.warmup + arguments.steps
    config.training.mixed_precision_param = "float32"
    config.activation_checkpoint.mode = arguments.checkpointing
    config.comm.trace_buf_size = 0  # NCCL's flight recorder
    for key, degree in degrees.items():
        setattr(config.parallelism, key, degree)

    class Timed(Trainer):
        def train_step(self, batches: Iterator[Any]) -> None:
            dist.barrier()
            with clock.step():
                super().train_step(batches)

    trainer = Timed(config)
    force_sums(trainer.model_parts[0])
    trainer.train()


def on_cpu() -> None:
    """Have torchtitan import, and start, on a machine without accelerator and triton."""
    import torch
    import torch.distributed as dist

    # It takes "cuda" where torch finds no accelerator.
    torch._utils._get_available_device_type = lambda: "cpu"
    # These kernels of mixtures of experts need triton.
    kernels = types.ModuleType("torchtitan.models.moe.kernels")
    kernels.generate_permute_indices = None  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels

    import torchtitan.components.metrics as metrics
    import torchtitan.distributed.utils as utils

    # The memory of CPUs cannot be asked for as that of GPUs, and a barrier takes no CPU's number.
    monitor = mock.Mock(**{"get_peak_stats.return_value": metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)})
    monitor.device_name = "cpu"
    metrics.build_device_memory_monitor = lambda: monitor
    utils.set_pg_timeouts = lambda timeout, parallel_dims: dist.barrier()


def cpu_kernel_in_torch_ring() -> None:
    """Give torch's ring the attention kernel of CPUs as it has those of CUDA: sharded along the sequence."""
    import torch
    import torch.distributed.tensor.experimental._context_parallel._attention as ring
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._op_schema import OpSchema, OpStrategy
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy, register_op_strategy

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def forward(group: Any, q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **options: Any):
        options = {"dropout_p": dropout_p, "scale": options.get("scale")}
        return ring._templated_ring_attention(group, 2, kernel, q, k, v, is_causal=is_causal, **options)

    def backward(
        group: Any, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout_p: float, is_causal: bool, **o: Any
    ):
        options = {"dropout_p": dropout_p, "scale": o.get("scale")}
        return ring._templated_ring_attention_backward(
            group, 2, backward_kernel, grad, "grad_out", q, k, v, out, lse, is_causal, **options
        )

    def strategy(num_outputs: int) -> Callable[[OpSchema], OpStrategy]:
        def along_sequence(schema: OpSchema) -> OpStrategy:
            num_inputs = sum(isinstance(argument, OpStrategy) for argument in schema.args_schema)
            mesh = schema.get_mesh_from_args(validate=False)
            placements = [[Shard(2)] * (num_outputs + num_inputs)]
            return expand_to_full_mesh_op_strategy(mesh, schema, placements, input_index=num_outputs)

        return along_sequence

    def handler(call: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            dispatcher = DTensor._op_dispatcher
            info = dispatcher.unwrap_to_op_info(op, args, kwargs)
            dispatcher.sharding_propagator.propagate(info)
            results = call(info.compute_mesh.get_group(), *info.local_args, **info.local_kwargs)
            return dispatcher.wrap(results, info.output_sharding.output_spec)

        return dispatch

    for op, num_outputs, call in ((kernel, 2, forward), (backward_kernel, 3, backward)):
        register_op_strategy(op)(strategy(num_outputs))
        ring.custom_ops[op] = handler(call)


def force_sums(model: nn.Module) -> None:
    """gloo has no sum of multiples, as which FSDP2 sends its gradients divided by 1."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
