"""Everything that is done to a model before it trains, in the one order in which the parts compose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.fsdp import FSDPModule

from cptrain.context_parallel import ContextParallel
from cptrain.distributed.mesh import Meshes
from cptrain.distributed.settings import ParallelismConfig
from cptrain.models.init import initialise
from cptrain.models.llama import Llama
from cptrain.models.shape import ModelShape
from cptrain.parallel.activation_checkpoint import apply_activation_checkpoint
from cptrain.parallel.fsdp import apply_fsdp
from cptrain.parallel.settings import ActivationCheckpointConfig, CompileConfig
from cptrain.parallel.tensor import apply_tensor_parallel

MOST_GRAPHS = 64  # of a block


@dataclass(frozen=True)
class Precision:
    """dtype: of the parameters that the optimizer holds. param: in which blocks compute. reduce: of gradient sums."""

    dtype: torch.dtype
    param: torch.dtype
    reduce: torch.dtype


@dataclass(frozen=True)
class ParallelModel:
    """A model ready to train, the plan that shards its batches, and which of its modules run context parallel."""

    model: Llama
    context: ContextParallel
    context_modules: list[str]

    def set_reduction(self, reduces: bool) -> None:
        """Whether the next backward pass reduces gradients over ranks, or keeps them whole and in reduce_dtype here."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(reduces)


def parallelise(
    shape: ModelShape,
    meshes: Meshes,
    *,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    precision: Precision,
    seed: int,
    layout: Literal["zigzag", "contiguous", "balanced"] = "zigzag",
) -> ParallelModel:
    """Build the model on the meta device, apply TP, CP, checkpointing, compile and FSDP2, then fill in the weights.

    The order matters: TP replaces parameters by DTensors that FSDP2 cuts further; context parallel must be inside the
    region that checkpointing recomputes and that compile traces; FSDP2's hooks must be outside of both.
    """
    with torch.device("meta"):
        model = Llama(shape).to(precision.dtype)
    apply_tensor_parallel(model, meshes.tp)
    context = ContextParallel(
        meshes.batch,
        method="all_gather" if parallelism.context_parallel_method == "all_gather" else "auto",
        layout=layout,
        chunk_size=parallelism.chunk_size,
        ring_inner_degree=parallelism.ring_inner_degree,
        overlap=parallelism.context_parallel_overlap,
        kernel=parallelism.attention_kernel,
    )
    context_modules = apply_context_parallel(model, context)
    apply_activation_checkpoint(model, activation_checkpoint.mode)
    if compile.enable:
        compile_blocks(model, backend=compile.backend)
    # Also on one rank of the fsdp axis: FSDP2 sums what sequence parallel leaves partial, and casts to param_dtype.
    if meshes.degrees.world > 1 or precision.param != precision.dtype:
        apply_fsdp(
            model,
            meshes.fsdp,
            param_dtype=precision.param,
            reduce_dtype=precision.reduce,
            reshard_after_forward=parallelism.fsdp_reshard_after_forward,
        )
    model.to_empty(device=meshes.device)
    initialise(model, seed)
    return ParallelModel(model=model, context=context, context_modules=context_modules)


def apply_context_parallel(model: Llama, plan: ContextParallel) -> list[str]:
    """Names of the attention modules that `plan` now serves, on any number of ranks.

    On one rank nothing is sent, but windows and documents, the choice of a kernel and the memory order it is fastest in
    are the plan's. Called again with another plan it switches the model over, blocks already wrapped for checkpointing
    included.
    """
    by_window: dict[int, list[str]] = {}
    for layer, window in enumerate(model.shape.windows()):
        by_window.setdefault(window, []).append(f"layers.{layer}.*attention")
    names: list[str] = []
    for window, patterns in by_window.items():
        names += plan.apply(model, modules=patterns, window_size=window or None)
    return names


def compile_blocks(model: Llama, *, backend: str) -> None:
    """Compile each block by itself: one graph serves all of them, and none spans an FSDP2 boundary.

    ValueError for a backend that torch does not have.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join([*torch.compiler.list_backends(), "aot_eager", "eager"])
        raise ValueError(f'compile.backend = "{backend}": must be one that torch has: {known}')
    # Entering the attention mode inside a checkpointed region counts as a side effect that is not repeated in the
    # backward pass. It need not be: what the mode changed is already in the graph.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # One code object has a graph for each kind of mask, with gradients and without, for keys of packed documents that
    # go round the ring and that go straight, and for a packing's size: more than the 8 after which compiling gives up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
