"""Whether one document of a batch can be felt in another: one is changed, and all others must stay the same, bitwise.

What changes outside of it is a leak: a state, because its token saw the document; or a gradient at an embedding,
because the document saw its token. Unlike `flow`, this compares runs of the same loss, and needs no idea of the masks.
"""

from __future__ import annotations

import math
import time

import torch

from cptrain.check.toy import MOST_WINDOWS, Batch, ToyTrainer
from cptrain.context_parallel.finding import Finding


def check_leak(trainer: ToyTrainer) -> Finding:
    """The number of tokens outside of a document whose final state, or gradient at the embedding, changes with it.

    Infinite if nothing inside of it changes either. A token is judged by what two runs of the same batch agree on:
    all of it, unless a kernel of the device adds up gradients in any order.
    """
    start = time.perf_counter()
    batch, inside = _batch_with_document(trainer)
    tokens = torch.where(inside, (batch["tokens"] + 1) % trainer.shape.vocab_size, batch["tokens"])
    once, again, changed = (trainer.states(each) for each in (batch, batch, {**batch, "tokens": tokens}))
    felt = torch.zeros_like(inside)
    unclear = torch.zeros_like(inside)
    for name in ("hidden", "gradient"):
        same, other, perturbed = (getattr(states, name).cpu() for states in (once, again, changed))
        is_clear = (same == other).all(-1)
        felt |= (same != perturbed).any(-1) & is_clear
        unclear |= ~is_clear
    leaked = int((felt & ~inside).sum())
    where = f"a document of {int(inside.sum())} tokens was changed, of {inside.numel()} in all"
    if unclear.any():
        where += f"; {int(unclear.sum())} tokens differ from run to run and were not compared in full"
    return Finding(
        name="leak between documents",
        error=leaked if (felt & inside).any() else math.inf,
        allowed=0,
        look_at="the documents that attention gets: document_ids of the batch, its packing, and that the batch is "
        "entered; cptrain/context_parallel/mask.py and schedule.py cut by them",
        where=where,
        seconds=time.perf_counter() - start,
    )


def _batch_with_document(trainer: ToyTrainer) -> tuple[Batch, torch.Tensor]:
    """A batch, and which of its tokens [B, length] are one document that has neighbours in its row."""
    number = trainer.stage.settings.training.local_batch_size
    for first in range(0, MOST_WINDOWS, number):
        batch = trainer.batch(first, number)
        for row, ids in enumerate(batch["document_ids"]):
            found = ids[ids >= 0].unique()
            if len(found) > 1:
                inside = torch.zeros_like(batch["document_ids"], dtype=torch.bool)
                inside[row] = ids == found[(len(found) - 1) // 2]
                return batch, inside
    raise AssertionError("the text of the check has windows of several documents")
