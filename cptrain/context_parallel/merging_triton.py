"""The merge of two blocks' attention as one Triton kernel; see [Note: one pass] in `merging`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # of one program


def merge_in_one_pass(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`merging.merge` of CUDA tensors in any strides."""
    batch, heads, length, dim = out.shape
    if length == 0:
        return
    with torch.cuda.device(out.device):  # Triton launches on the current one
        _merge_rows[(triton.cdiv(length, ROWS), heads, batch)](
            out,
            lse,
            block_out,
            block_lse,
            *out.stride(),
            *lse.stride(),
            *block_out.stride(),
            *block_lse.stride(),
            length,
            dim,
            ROWS=ROWS,
            DIM=triton.next_power_of_2(dim),
        )


# Numbers that change with every block of packed documents: compiled anew for their divisors, they would stall steps.
@triton.jit(do_not_specialize=["length", "lse_b", "lse_h", "block_lse_b", "block_lse_h", "block_b"])
def _merge_rows(  # type: ignore[no-untyped-def]
    out,
    lse,
    block_out,
    block_lse,
    out_b,
    out_h,
    out_t,
    out_d,
    lse_b,
    lse_h,
    lse_t,
    block_b,
    block_h,
    block_t,
    block_d,
    block_lse_b,
    block_lse_h,
    block_lse_t,
    length,
    dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, DIM)
    real = rows < length
    lse_at = lse + b * lse_b + h * lse_h + rows * lse_t
    ours = tl.load(lse_at, mask=real, other=0.0)
    theirs = tl.load(block_lse + b * block_lse_b + h * block_lse_h + rows * block_lse_t, mask=real, other=0.0)
    # Where neither side has seen a key both are -inf: the row stays as it is.
    unseen = (ours == float("-inf")) & (theirs == float("-inf"))
    gap = tl.where(unseen, 0.0, theirs - ours)
    weight = tl.where(unseen, 0.0, 1.0 / (1.0 + tl.exp(-gap)))
    larger = tl.maximum(ours, theirs)
    total = tl.where(unseen, float("-inf"), larger + tl.log(1.0 + tl.exp(-tl.abs(gap))))
    inside = real[:, None] & (columns < dim)[None, :]
    out_at = out + b * out_b + h * out_h + rows[:, None] * out_t + columns[None, :] * out_d
    block_at = block_out + b * block_b + h * block_h + rows[:, None] * block_t + columns[None, :] * block_d
    so_far = tl.load(out_at, mask=inside, other=0.0)
    found = tl.load(block_at, mask=inside, other=0.0).to(so_far.dtype)
    tl.store(out_at, so_far + (found - so_far) * weight[:, None], mask=inside)
    tl.store(lse_at, total, mask=real)
