"""The memory that one rank needs for the tensors of a training step, from shapes alone. Torch is never imported here.

[Note: where memory peaks]
What a step holds changes all the time; the largest sum is found at one of three moments, and which one depends on the
run. In the loss all blocks keep their activations, and there are logits. As the backward pass begins, one block is
whole again beside what the others keep, with the gradients of the feed-forward's three widest tensors, or with what
attention sums and sends. As it ends, activations are gone and all gradients are there.
What a block's operations keep for their backward pass is counted tensor by tensor. Not counted is what CUDA, NCCL and
the allocator take for themselves, and what torch.compile saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cptrain.distributed.settings import Degrees
from cptrain.models.logits import tokens_at_a_time
from cptrain.models.shape import ModelShape, num_parameters

WIDE = 4  # bytes of fp32, in which gradients and attention are summed, and of tables and losses


@dataclass(frozen=True, kw_only=True)
class Load:
    """What decides the memory of a rank beside the model and the degrees.

    tokens: of this rank, over all sequences of a micro-batch. weight_bytes, param_bytes: of a parameter where the
    optimizer holds it, and where blocks compute. all_gather: in place of a ring. fused_norms: RMSNorm keeps its input
    alone, as on CUDA. wrapped: FSDP2 gathers parameters; keeps_gathered: after the forward pass, too. whole_gradients:
    micro-batches add up gradients that are not cut yet.
    """

    tokens: int
    checkpointing: Literal["none", "selective", "full"]
    weight_bytes: int
    param_bytes: int
    all_gather: bool
    fused_norms: bool
    wrapped: bool
    keeps_gathered: bool
    whole_gradients: bool


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes at the moment that needs most, by what holds them."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def footprint(shape: ModelShape, degrees: Degrees, load: Load) -> Footprint:
    """The peak of one rank; see [Note: where memory peaks]."""
    width, tp = load.param_bytes, degrees.tp
    parameters, embedding = num_parameters(shape), shape.vocab_size * shape.dim
    each = (parameters - (1 if shape.tied_embeddings else 2) * embedding - shape.dim) // shape.num_layers
    shard = parameters * load.weight_bytes // (degrees.fsdp * tp)
    # FSDP2 holds a block whole and the next on its way, and a block's gradients whole and on their way.
    everything = load.wrapped * load.keeps_gathered * parameters * width // tp
    block, output = (load.wrapped * numel * width // tp for numel in (each, embedding))
    leaving = load.wrapped * each * (width + WIDE) // tp
    # The gradient of the output's weight is summed over chunks; those of earlier micro-batches may be whole.
    summed, earlier = embedding * WIDE // tp, load.whole_gradients * parameters * WIDE // tp
    work = _Block(shape, degrees, load)
    kept = shape.num_layers * work.kept
    always = {"weights and AdamW": 3 * shard, "rotary tables": 2 * load.tokens * shape.head_dim * WIDE}
    moments = {
        "in the loss": {
            "gathered weights": max(everything, output),
            "gradients": earlier + summed + (embedding * width // tp if width < WIDE else 0),
            "kept activations": kept + work.norm,
            "loss": 2 * load.tokens * shape.dim * width + _logits(shape, load, tp),
        },
        "as backward begins": {
            "gathered weights": max(everything, 2 * block + output) + leaving,
            "gradients": max(earlier, summed),
            "kept activations": kept,
            "one block": work.peak - work.kept,
        },
        "as backward ends": {
            "gathered weights": max(everything, block) + leaving,
            "gradients": max(earlier, shard),
            "kept activations": work.kept,
            "one block": work.peak - work.kept,
        },
    }
    return max((Footprint(moment=name, parts=always | parts) for name, parts in moments.items()), key=lambda f: f.total)


class _Block:
    """Bytes of one block. kept: until its backward pass. peak: in it, kept included. norm: what one RMSNorm keeps."""

    def __init__(self, shape: ModelShape, degrees: Degrees, load: Load) -> None:
        width, tp, tokens = load.param_bytes, degrees.tp, load.tokens
        own = tokens // tp  # sequence parallel cuts the residual stream once more
        heads, key_heads = shape.num_heads // tp, shape.num_kv_heads // tp
        if degrees.ulysses > 1:
            key_heads = max(key_heads, degrees.ulysses)  # fewer than ranks are repeated
        query, key = (tokens * count * shape.head_dim for count in (heads, key_heads))
        residual, gathered = own * shape.dim * width, tokens * shape.dim * width
        wide = tokens * shape.ffn_dim // tp * width

        # A norm that is not fused keeps its input in fp32, and what it multiplies by its weight.
        per_element = width if load.fused_norms or width == WIDE else WIDE
        per_element += 0 if load.fused_norms else max(width, WIDE)
        self.norm = own * (shape.dim * per_element + WIDE)
        qk_norms = ((query + key) * per_element + tokens * (heads + key_heads) * WIDE) * shape.qk_norm

        inputs = (query + 2 * key) * width
        result = query * width + tokens * heads * WIDE  # and the logarithms of its sums
        if degrees.ring > 1 and not load.all_gather:
            result += 2 * key * width  # the last keys that came, where backward starts
        exchanged = (inputs + query * width) if degrees.ulysses > 1 else 0  # before attention, and after
        attention = self.norm + gathered + qk_norms + inputs + result + (query * width if degrees.ulysses > 1 else 0)
        everything = attention + self.norm + gathered + 4 * wide
        self.kept = {
            "none": everything,
            "selective": residual + result + exchanged,
            "full": residual,
        }[load.checkpointing]
        self.peak = max(
            everything + residual + 2 * wide,  # of the three gradients, one is made when the product is dropped
            attention + residual + query * width + _attention_backward(query, key, key_heads, degrees, load),
        )


def _attention_backward(query: int, key: int, key_heads: int, degrees: Degrees, load: Load) -> int:
    """Bytes that attention's backward pass needs beside its inputs: gradients, messages, fp32 sums, copies on CPU.

    As `tools/bench_attention.py --memory` shows them, with all queries and keys of a rank as units.
    """
    width = load.param_bytes
    if degrees.ring == 1:
        return query * (4 * width + WIDE) + key * 4 * width
    if load.all_gather:
        of_a_head = 2 * key // key_heads * degrees.ring
        return query * (2 * width + WIDE) + (key + of_a_head) * 2 * (width + WIDE)
    hops = 4 if degrees.ring == 2 else 8
    return query * (3 * width + 2 * WIDE) + key * (hops * width + 4 * WIDE)


def _logits(shape: ModelShape, load: Load, tp: int) -> int:
    """A chunk of logits in fp32, and what they were made from, or go on as."""
    columns = shape.vocab_size // tp
    if not columns:  # not known
        return 0
    rows = min(load.tokens, tokens_at_a_time(columns))
    return rows * columns * (WIDE + (load.param_bytes if load.param_bytes < WIDE else 0))
