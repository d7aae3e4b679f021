"""How the attention that blocks of keys give to one row becomes one softmax.

[Note: one pass]
Merging is bound by memory: it reads the running output (fp32) and a block's (bf16) and writes the former. As separate
operations of torch it moves them 2.5 times as often, which at 8K tokens per rank on an H200 is a sixth of a ring's
forward pass. On CUDA it is therefore one kernel, in Triton, which comes with torch there; without it, torch's own
operations do the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Merge = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Fold one block's attention into the running result, in place.

    Shapes: out, block_out [B, H, T, D]; lse, block_lse [B, H, T]. Accumulators are fp32 (fp64 in, fp64 kept).
    A row that has seen no key carries lse = -inf and out = 0, and stays so until a block shows it one.
    Source: online softmax, arXiv:1805.02867, with the block's weight sigmoid(block_lse - lse), which cannot overflow.
    """
    (_one_pass() if out.is_cuda else merge_in_torch)(out, lse, block_out, block_lse)


def merge_in_torch(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`merge` in operations of torch."""
    # -inf - -inf is NaN where neither side has seen a key: the weight is then 0 and the row stays as it is.
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(nan=0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, block_lse, out=lse)


@lru_cache(maxsize=1)
def _one_pass() -> Merge:
    """`merge` in one kernel, tried once; in torch where Triton is not there or cannot compile."""
    try:
        from cptrain.context_parallel.merging_triton import merge_in_one_pass

        row = torch.zeros(1, 1, 1, 16, device="cuda")
        merge_in_one_pass(row, row[..., 0].clone(), row.bfloat16(), row[..., 0].clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning(f"results of blocks are merged in torch, some per cent slower, since Triton fails: {error!r}")
        return merge_in_torch
    return merge_in_one_pass
