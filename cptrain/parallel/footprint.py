"""The memory that one rank needs for the tensors of a training step, from shapes alone. Torch is never imported here.

[Note: where memory peaks]
What a step holds changes all the time; the largest sum is found at one of five moments, and which one depends on the
run. In the loss all blocks keep their activations, and there are logits; behind it, the gradient of the output's weight
is there twice. As the backward pass begins, one block is whole again beside what the others keep, with the gradients of
the feed-forward's three widest tensors, or with what attention sums and sends. As it ends, activations are gone and all
gradients are there; last, those of the embeddings are still whole, and on their way.
What a block's operations keep for their backward pass is counted tensor by tensor. Not counted is what CUDA, NCCL and
the allocator take for themselves, what torch.compile saves, and that layers with a window need fewer keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cptrain.distributed.settings import Degrees
from cptrain.models.logits import tokens_at_a_time
from cptrain.models.shape import ModelShape, num_parameters

FP32 = 4  # bytes: gradients and attention are summed in it, and tables and losses kept, where blocks are not in fp64


@dataclass(frozen=True, kw_only=True)
class Load:
    """What decides the memory of a rank beside the model and the degrees.

    tokens: of this rank, over all sequences of a micro-batch. weight_bytes, param_bytes: of a parameter where the
    optimizer holds it, and where blocks compute. all_gather: in place of a ring. fused_norms: RMSNorm keeps its input
    alone, as on CUDA. wrapped: FSDP2 gathers parameters. keeps_gathered: it does not free them after forward.
    accumulates: gradients of micro-batches are added up. whole_gradients: before FSDP2 cuts them.
    """

    tokens: int
    checkpointing: Literal["none", "selective", "full"]
    weight_bytes: int
    param_bytes: int
    all_gather: bool
    fused_norms: bool
    wrapped: bool
    keeps_gathered: bool
    accumulates: bool
    whole_gradients: bool

    @property
    def wide(self) -> int:
        """Bytes of what is summed."""
        return max(FP32, self.param_bytes)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes at the moment that needs most, by what holds them. moment: when that is, as in "as backward begins"."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def footprint(shape: ModelShape, degrees: Degrees, load: Load) -> Footprint:
    """The peak of one rank; see [Note: where memory peaks]."""
    width, wide, tp = load.param_bytes, load.wide, degrees.tp
    parameters, embedding = num_parameters(shape), shape.vocab_size * shape.dim // tp
    embeddings = 1 if shape.tied_embeddings else 2
    each = ((parameters - shape.dim) // tp - embeddings * embedding) // shape.num_layers
    shard = parameters * load.weight_bytes // (degrees.fsdp * tp)
    # FSDP2 holds a block whole and the next on its way, and its gradients whole and on their way.
    block, output, leaving = (load.wrapped * x for x in (each * width, embedding * width, each * (width + wide)))
    all_weights = load.keeps_gathered * parameters * width // tp
    earlier = 0  # gradients of the micro-batches before this one
    if load.accumulates:
        earlier = parameters * wide // tp if load.whole_gradients else shard
    # The gradient of the output's weight: summed over chunks, and as it is handed on.
    summed, new = embedding * wide, embedding * width
    work = _Block(shape, degrees, load)
    kept, hidden = shape.num_layers * work.kept, load.tokens * shape.dim * width
    always = {"weights and AdamW": 3 * shard, "rotary tables": 2 * load.tokens * shape.head_dim * wide}
    moments = {
        "in the loss": {
            "gathered weights": max(all_weights, output),
            "gradients": earlier + summed + (new if width < wide else 0),
            "kept activations": kept + work.norm,
            "loss": 2 * hidden + _logits(shape, load, tp),
        },
        "behind the loss": {
            "gathered weights": max(all_weights, output),
            "gradients": earlier + 2 * summed,
            "kept activations": kept + work.norm,
            "loss": 2 * hidden,
        },
        "as backward begins": {
            "gathered weights": max(all_weights, 2 * block + output) + leaving,
            "gradients": max(earlier, new) if load.whole_gradients and width == wide else earlier + new,
            "kept activations": kept,
            "one block": work.peak - work.kept,
        },
        "as backward ends": {
            "gathered weights": max(all_weights, block + output) + leaving,
            # Those of the output are still whole.
            "gradients": max(earlier, shard - load.wrapped * summed // degrees.fsdp) + output,
            "kept activations": work.kept,
            "one block": work.peak - work.kept,
        },
        "as gradients leave": {
            "gathered weights": max(all_weights, embeddings * output),
            # Of a tied weight, those of its two uses are added up.
            "gradients": max(earlier, shard)
            + load.wrapped * (embeddings * new + summed)
            + shape.tied_embeddings * 2 * new,
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
        residual, whole = own * shape.dim * width, tokens * shape.dim * width
        ffn = tokens * shape.ffn_dim // tp * width

        # A norm that is not fused keeps its input in fp32, and what it multiplies by its weight.
        per_element = width if load.fused_norms or width >= FP32 else FP32
        per_element += 0 if load.fused_norms else load.wide
        self.norm = own * (shape.dim * per_element + load.wide)
        qk_norms = ((query + key) * per_element + tokens * (heads + key_heads) * load.wide) * shape.qk_norm

        inputs = (query + 2 * key) * width
        result = query * width + tokens * heads * load.wide  # and the logarithms of its sums
        if degrees.ring > 1 and not load.all_gather:
            result += 2 * key * width  # the last keys that came, where backward starts
        exchanged = (inputs + query * width) if degrees.ulysses > 1 else 0  # before attention, and after
        attention = self.norm + whole + qk_norms + inputs + result + (query * width if degrees.ulysses > 1 else 0)
        everything = attention + self.norm + whole + 4 * ffn
        self.kept = {
            "none": everything,
            "selective": residual + result + exchanged,
            "full": residual,
        }[load.checkpointing]
        self.peak = max(
            everything + residual + 2 * ffn,  # three gradients, of which one takes the place of the product
            attention + residual + query * width + _attention_backward(query, key, key_heads, degrees, load),
        )


def _attention_backward(query: int, key: int, key_heads: int, degrees: Degrees, load: Load) -> int:
    """Bytes that attention's backward pass needs beside its inputs: gradients, messages, fp32 sums, copies on CPU.

    As `tools/bench_attention.py --memory` shows them, with all queries and keys of a rank as units.
    """
    width = load.param_bytes
    if degrees.ring == 1:
        return query * (4 * width + load.wide) + key * 4 * width
    if load.all_gather:
        of_a_head = 2 * key // key_heads * degrees.ring
        return query * (2 * width + load.wide) + (key + of_a_head) * 2 * (width + load.wide)
    return query * (3 * width + 2 * load.wide) + key * (8 * width + 4 * load.wide)


def _logits(shape: ModelShape, load: Load, tp: int) -> int:
    """A chunk of logits in fp32, and what they were made from, or go on as."""
    columns = shape.vocab_size // tp
    if not columns:  # not known
        return 0
    rows = min(load.tokens, tokens_at_a_time(columns))
    return rows * columns * (load.wide + (load.param_bytes if load.param_bytes < load.wide else 0))
