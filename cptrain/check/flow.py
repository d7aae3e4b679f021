"""What the loss of some tokens depends on, read off the gradients at the embeddings of all tokens.

Which tokens can influence which follows from the masks of all layers. Whatever can must have a gradient that is not
zero; whatever cannot must have one of exactly zero, bitwise, or something leaks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from cptrain.check.toy import ToyTrainer
from cptrain.context_parallel.finding import Finding
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.selfcheck import probes, reach_of, visible
from cptrain.loss import IGNORED


def check_flow(trainer: ToyTrainer) -> list[Finding]:
    """Two findings: tokens that the loss of the last token (and of others) does not reach, and that leak into it."""
    start = time.perf_counter()
    length = trainer.stage.settings.training.seq_len
    batch = trainer.batch(0, trainer.stage.settings.training.local_batch_size)
    packed, masks = trainer.shard(batch).packed, trainer.masks_of(batch["document_ids"])
    reach = influence(masks, length, trainer.device)
    layout = packed.packing.layout if packed else trainer.stage.context.ring_layout(length)
    missed = leaked = 0
    for chosen in probes(layout, trainer.device, documents=masks[0].documents, rows=len(reach)):
        # Not the batch's own labels, which may be none at the end of a document.
        labels = torch.where(chosen.cpu(), batch["tokens"], IGNORED)
        strength = trainer.states({**batch, "labels": labels}).gradient.abs().sum(-1)
        reached = reach_of(chosen, reach)
        missed += int((reached & (strength == 0)).sum())
        leaked += int((~reached & (strength != 0)).sum())
    last = int(reach[-1, -1].sum())
    return [
        Finding(
            name="flow: tokens not reached",
            error=missed,
            allowed=0,
            look_at="keys that do not travel, or whose gradients do not come back (detached, dropped hop)",
            where=f"the last token's loss reaches back {last} tokens",
            seconds=time.perf_counter() - start,
        ),
        Finding(
            name="flow: leaks from unseen tokens",
            error=leaked,
            allowed=0,
            look_at="masks: is_causal, window_size and documents as attention gets them, labels shifted before "
            "sharding",
        ),
    ]


def influence(masks: Sequence[Mask], length: int, device: torch.device) -> torch.Tensor:
    """[rows, length, length] bool: whether the final state of a token (second) can depend on an embedding (last).

    One row stands for all without documents; the masks have the same ones.
    """
    own = torch.eye(length, device=device)
    reach = own[None]
    for mask in masks:
        reach = ((own + visible(mask, length, device).float()) @ reach > 0).float()
    return reach > 0
