"""Whether every rank rotates its queries and keys by the global positions of its own tokens."""

from __future__ import annotations

import time
from typing import Any

import torch

from cptrain.check.toy import Batch, ToyTrainer
from cptrain.context_parallel.finding import Finding
from cptrain.models.llama import Attention
from cptrain.models.rope import Rope, rotary_tables

SAME = 1e-5  # distance of two rows of fp32 tables that are of one position


def check_rotary_positions(trainer: ToyTrainer) -> Finding:
    """The largest difference, in tokens, between a token's position and the one its rotary table was made for.

    Labels are replaced by the global index of each token, which tells where the trainer put it; the tables are those
    that reach the attention modules, each token's row looked up in the tables of all positions that there are: those of
    the whole sequence, or of the longest document where positions begin anew in each.
    """
    start = time.perf_counter()
    batch = trainer.batch(0, trainer.stage.settings.training.local_batch_size)
    positions = batch["positions"].to(trainer.device)
    index = torch.arange(positions.size(1)).expand_as(batch["labels"])
    expected = positions.gather(1, trainer.shard({**batch, "labels": index}).labels)
    used = _tables(trainer, batch)
    every = torch.arange(int(positions.max()) + 1, device=trainer.device)[None]
    whole = torch.cat(rotary_tables(every, trainer.shape, used[0][0].dtype), -1)[0].double()
    worst = 0
    for cos, sin in used:
        rows = torch.cat((cos, sin), -1).double()
        if rows.shape[:2] != expected.shape:
            worst = max(worst, positions.size(1))
            continue
        # Neighbours may be close where positions are stretched: not by way of products, which cancel.
        apart = torch.cdist(rows, whole.expand(len(rows), -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
        distance, nearest = apart.min(-1)
        # A row that is no position's counts as one that is wrong by the whole sequence.
        off = torch.where(distance < SAME, (nearest - expected).abs(), positions.size(1))
        worst = max(worst, int(off.max()))
    return Finding(
        name="rotary positions",
        error=worst,
        allowed=0,
        look_at="positions must go through the same ContextParallel.shard as the tokens, and the model must use them",
        where=f"{len(used)} layers",
        seconds=time.perf_counter() - start,
    )


def _tables(trainer: ToyTrainer, batch: Batch) -> list[Rope]:
    """Cosines and sines as each attention module gets them."""
    seen: list[Rope] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[1])

    modules = [module for module in trainer.model.modules() if isinstance(module, Attention)]
    handles = [module.register_forward_pre_hook(keep) for module in modules]
    # Compiled blocks would not call the hooks.
    shard = trainer.shard(batch)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), shard.documents_entered():
        trainer.loss(shard)
    for handle in handles:
        handle.remove()
    return seen
