"""Tensor parallel with Megatron sequence parallel, as a plan by module name.

Weights are cut by columns where a module fans out and by rows where it comes back; between them the activations are
[B, T, E] on every rank, outside of them [B, T/tp, E]. So norms, residuals and embeddings cost 1/tp, and each half block
is one all-gather and one reduce-scatter in place of an all-reduce.
Source: arXiv:1909.08053, arXiv:2205.05198.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from cptrain.models.llama import Llama

TOKENS = Shard(1)  # of activations [B, T, E]


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Cut the parameters of `model` over the one-axis `mesh` and hook in the collectives; does nothing on one rank."""
    if mesh.size() == 1:
        return
    gather = PrepareModuleInput(input_layouts=(TOKENS,), desired_input_layouts=(Replicate(),))
    gather_first = PrepareModuleInput(input_layouts=(TOKENS, None), desired_input_layouts=(Replicate(), None))
    block: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": gather_first,
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=TOKENS),
        "ffn_norm": SequenceParallel(),
        "feed_forward": gather,
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=TOKENS),
        "feed_forward.w3": ColwiseParallel(),
    }
    if model.shape.qk_norm:
        # Each rank norms its own heads with the same weights: cut along the heads, and the gradients are summed.
        block["attention.q_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        block["attention.k_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    for layer in model.layers:
        parallelize_module(layer, mesh, block)
    ends: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=TOKENS),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=TOKENS, output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    # The reduce-scatter of the embeddings is still under way when it is returned (AsyncCollectiveTensor). A compiled
    # first block would give no gradient for such an input, and the embeddings would silently not be trained.
    model.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.clone())
    model.tie_weights()
