"""What the loss of some tokens depends on, read off the gradients at the embeddings of all tokens.

Which tokens can influence which follows from the masks of all layers. Whatever can must have a gradient that is not
zero; whatever cannot must have one of exactly zero, bitwise, or something leaks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from cptrain.check.toy import ToyTrainer
from cptrain.context_parallel.finding import Finding
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.selfcheck import probes, visible
from cptrain.loss import IGNORED


@dataclass(frozen=True)
class Probe:
    """The loss of `chosen` tokens may depend on `reach` and on nothing else; both [length] bool."""

    chosen: torch.Tensor
    reach: torch.Tensor


def check_flow(trainer: ToyTrainer) -> list[Finding]:
    """Two findings: tokens that the loss of the last token (and of others) does not reach, and that leak into it."""
    start = time.perf_counter()
    layout = trainer.context.ring_layout(trainer.stage.training.seq_len)
    reach = influence(trainer.masks, layout.length, trainer.device)
    batch = trainer.batch(0, trainer.stage.training.local_batch_size)
    missed = leaked = 0
    for probe in (Probe(chosen, reach[chosen].any(0)) for chosen in probes(layout, trainer.device)):
        strength = _gradient_at_embeddings(trainer, batch, probe.chosen).abs().sum(-1)
        missed += int((probe.reach & (strength == 0)).sum())
        leaked += int((~probe.reach & (strength != 0)).sum())
    last = int(reach[-1].sum())
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
            look_at="masks: is_causal and window_size as attention gets them, labels shifted before sharding",
        ),
    ]


def influence(masks: Sequence[Mask], length: int, device: torch.device) -> torch.Tensor:
    """[length, length] bool: whether the final state of a token (row) can depend on another's embedding (column)."""
    reach = torch.eye(length, device=device)
    for mask in masks:
        seen = visible(mask, length, device).float()
        reach = ((torch.eye(length, device=device) + seen) @ reach > 0).float()
    return reach > 0


def _gradient_at_embeddings(trainer: ToyTrainer, batch: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
    """[B, length, E]: gradient of the loss of the chosen tokens alone at the embedding of every token."""
    # Not the batch's own labels, which may be none at the end of a document.
    labels = torch.where(chosen.cpu(), batch["tokens"], IGNORED)
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = trainer.model.tok_embeddings.register_forward_hook(keep)
    trainer.loss({**batch, "labels": labels}).backward()
    handle.remove()
    trainer.optimizer.zero_grad(set_to_none=True)
    gradient = kept[0].grad
    assert gradient is not None
    if trainer.meshes.degrees.tp > 1:
        # Sequence parallel cuts the embeddings of this rank's tokens once more.
        gradient = DTensor.from_local(gradient, trainer.meshes.tp, [Shard(1)], run_check=False).full_tensor()
    return trainer.context.unshard(gradient, dim=1)
