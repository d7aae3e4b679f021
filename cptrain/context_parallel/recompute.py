"""What activation checkpointing keeps of attention, so that a backward pass that recomputes sends no message again."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

# For a policy of one's own: what is not kept of these is sent and computed twice. The package has made them by now.
KEPT_OPERATORS = (
    torch.ops.cptrain.attention.default,
    torch.ops.cptrain.sequence_to_heads.default,
    torch.ops.cptrain.heads_to_sequence.default,
)


def keep_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of selective checkpointing that keep attention and its messages, and recompute all else.

    They cost the most to repeat, and a repeated message stalls all ranks.

        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=keep_attention)
    """
    return create_selective_checkpoint_contexts(list(KEPT_OPERATORS))
