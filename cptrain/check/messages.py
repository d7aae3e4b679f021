"""The messages of context-parallel attention, forward and backward, counted and compared with the formulas."""

from __future__ import annotations

import time
from collections import Counter

from cptrain.check.toy import Batch, ToyTrainer
from cptrain.context_parallel.finding import Finding
from cptrain.context_parallel.traffic import Call, Traffic, attention_traffic, num_bytes
from cptrain.distributed.transport import recorded_messages
from cptrain.train.batch import Shard


def check_messages(trainer: ToyTrainer) -> list[Finding]:
    """Two findings, forward and backward: how many messages are missing, too many, or of another size.

    Full activation checkpointing repeats those of forward in backward; selective repeats none.
    """
    start = time.perf_counter()
    batch = trainer.batch(0, trainer.stage.settings.training.local_batch_size)
    shard = trainer.shard(batch)
    with shard.documents_entered():
        with recorded_messages() as sent_forward:
            loss = trainer.loss(shard)
        with recorded_messages() as sent_backward:
            loss.backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    forward, backward = _expected(trainer, batch, shard)
    if trainer.settings.activation_checkpoint.mode == "full":
        backward = backward + forward
    return [
        _finding("forward", Counter(sent_forward), forward, seconds=time.perf_counter() - start),
        _finding("backward", Counter(sent_backward), backward, seconds=0.0),
    ]


def _expected(trainer: ToyTrainer, batch: Batch, shard: Shard) -> tuple[Traffic, Traffic]:
    plan, shape, degrees = trainer.stage.context, trainer.shape, trainer.stage.meshes.degrees
    call = Call(
        batch=trainer.stage.settings.training.local_batch_size,
        heads=shape.num_heads // degrees.tp,
        kv_heads=shape.num_kv_heads // degrees.tp,
        key_dim=shape.head_dim,
        value_dim=shape.head_dim,
        itemsize=trainer.precision.param.itemsize,
    )
    packing = shard.packed.packing if shard.packed else None
    forward, backward = Traffic(), Traffic()
    for mask in trainer.masks_of(batch["document_ids"]):
        there, back = attention_traffic(
            call,
            mask,
            packing.layout if packing else plan.ring_layout(trainer.stage.settings.training.seq_len),
            ring_rank=plan.ring_rank,
            gathers=plan.method == "all_gather",
            exchanges=shard.packed is not None and shard.packed.exchanges(mask.window, trainer.precision.param),
            ulysses_degree=plan.ulysses_degree,
        )
        forward += there
        backward += back
    return forward, backward


def _finding(name: str, sent: Traffic, expected: Traffic, *, seconds: float) -> Finding:
    where = f"{sent.total()} of {num_bytes(sent):,} bytes in all on rank 0"
    if sent != expected:
        where += f", expected {expected.total()} of {num_bytes(expected):,}"
    return Finding(
        name=f"messages of {name}",
        error=(sent - expected).total() + (expected - sent).total(),
        allowed=0,
        look_at="cptrain/context_parallel/traffic.py has the formulas; repeated messages come from recomputing them",
        where=where,
        seconds=seconds,
    )
