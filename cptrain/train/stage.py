"""A part of a run with a length, degrees and a method of its own; a run without stages is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from cptrain.context_parallel import ContextParallel
from cptrain.data.loader import TrainBatches
from cptrain.data.windows import Windows
from cptrain.distributed.mesh import Meshes
from cptrain.models.shape import ModelShape
from cptrain.train.batch import PackDocuments
from cptrain.train.settings import TrainSettings
from cptrain.train.texts import Texts


@dataclass(frozen=True)
class Plan:
    """How batches of a stage are divided: settings with the stage's own values in place, its ranks and attention."""

    settings: TrainSettings
    meshes: Meshes
    context: ContextParallel

    def changed(self, settings: TrainSettings, shape: ModelShape) -> Self:
        """The plan of another stage over the same ranks; this one's mesh and attention where degrees stay as they are.

        Collective over all ranks.
        """
        meshes, context = self.meshes, self.context
        if settings.parallelism != self.settings.parallelism:
            degrees = settings.degrees(meshes.degrees.world, shape)
            gathers = settings.parallelism.context_parallel_method == "all_gather" and degrees.ring > 1
            context = context.regroup(
                ring=degrees.ring,
                ulysses=degrees.ulysses,
                method="all_gather" if gathers else "auto",
                ring_inner_degree=settings.parallelism.ring_inner_degree,
            )
            meshes = meshes.regrouped(context.mesh, degrees)
        return type(self)(settings, meshes, context)


class Stage:
    """What training reads during a stage. `close` it to end its workers.

    finish: what the loader adds to a batch; None without document masks.
    """

    def __init__(self, plan: Plan, texts: Texts, shape: ModelShape, *, tokens_seen: int) -> None:
        """tokens_seen: by the run so far, from which follows where the stage begins to read.

        At an unchanged length that is the next sample; another length is shuffled in an order of its own, which begins
        at the same share of the epoch.
        """
        settings, degrees = plan.settings, plan.meshes.degrees
        self.settings, self.meshes, self.context = settings, plan.meshes, plan.context
        length, global_batch = settings.training.seq_len, settings.global_batch_size(degrees)
        self.windows = texts.windows(length)
        self.held_out: Windows | None = texts.held_out_windows(length) if settings.validation.enable else None
        # Work is balanced for the layers that see most.
        spans = shape.windows()
        packer = plan.context.packer(max(spans) if all(spans) else 0)
        self.finish = PackDocuments(packer) if settings.data.document_mask else None
        self.batches = TrainBatches(
            self.windows,
            start_index=-(-tokens_seen // length),
            global_batch_size=global_batch,
            local_batch_size=settings.training.local_batch_size,
            dp_rank=plan.meshes.data_rank,
            dp_degree=degrees.data,
            num_workers=settings.data.num_workers,
            prefetch_factor=settings.data.prefetch_factor,
            finish=self.finish,
        )
        self.tokens_per_step = global_batch * length

    def summary(self) -> str:
        """One line: batch, length, plan."""
        length = self.settings.training.seq_len
        return (
            f"{self.tokens_per_step // length} x {length:,} tokens, {self.context.summary()}, "
            f"data parallel {self.meshes.degrees.data}"
        )

    def close(self) -> None:
        """End the data workers."""
        self.batches.close()
