"""A part of a run with a length, degrees and a method of its own; a run without stages is one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Self

import torch

from cptrain.context_parallel import ContextParallel
from cptrain.context_parallel.balance import FEWEST_CHUNKS, choose_chunk_size
from cptrain.data.loader import Batch, TrainBatches, validation_batches
from cptrain.data.needles import Needles
from cptrain.data.tokenizer import Tokenizer
from cptrain.data.windows import Windows
from cptrain.distributed.mesh import Meshes
from cptrain.distributed.settings import ParallelismConfig
from cptrain.models.shape import ModelShape
from cptrain.train.batch import PackDocuments
from cptrain.train.settings import TrainSettings
from cptrain.train.texts import Texts


@dataclass(frozen=True)
class Plan:
    """How batches of a stage are divided over the ranks, and attention with them."""

    parallelism: ParallelismConfig
    meshes: Meshes
    context: ContextParallel

    def changed(self, settings: TrainSettings, shape: ModelShape) -> Self:
        """The plan of another stage over the same ranks: the same mesh and attention where degrees stay as they are.

        settings: with the stage's own values in place. Collective over all ranks.
        """
        if settings.parallelism == self.parallelism:
            return self
        degrees = settings.degrees(self.meshes.degrees.world, shape)
        gathers = settings.parallelism.context_parallel_method == "all_gather" and degrees.ring > 1
        context = self.context.regroup(
            ring=degrees.ring,
            ulysses=degrees.ulysses,
            method="all_gather" if gathers else "auto",
            ring_inner_degree=settings.parallelism.ring_inner_degree,
        )
        return type(self)(settings.parallelism, self.meshes.regrouped(context.mesh, degrees), context)


class Stage:
    """What is read during a stage, and under which plan. `close` it to end its workers.

    settings: of the run, with the stage's own values in place. finish: what the loader adds to a batch; None without
    document masks. tokenizer: of the needles. device: where batches go.
    """

    def __init__(
        self,
        settings: TrainSettings,
        plan: Plan,
        texts: Texts,
        tokenizer: Tokenizer,
        shape: ModelShape,
        *,
        tokens_seen: int,
        device: torch.device,
    ) -> None:
        """tokens_seen: by the run so far, from which follows where the stage begins to read.

        At an unchanged length that is the next sample; windows of another length are shuffled in an order of their own,
        and read from where as many tokens are behind.
        """
        self.settings, self.meshes, self.context = settings, plan.meshes, plan.context
        self.device = device
        length, self.global_batch_size = settings.training.seq_len, settings.global_batch_size(plan.meshes.degrees)
        self.windows = texts.windows(length)
        self._held_out = texts.held_out_windows(length) if settings.validation.enable else None
        seed = settings.data.resolved_seed(settings.debug.seed)
        self._needles = (
            Needles(self._held_out, tokenizer, count=settings.validation.needles, seed=seed)
            if self._held_out is not None and settings.validation.needles
            else None
        )
        packs = settings.data.document_mask
        self.finish = PackDocuments(plan.context.packer(shape.windows())) if packs else None
        self.batches = TrainBatches(
            self.windows,
            start_index=-(-tokens_seen // length),
            global_batch_size=self.global_batch_size,
            local_batch_size=settings.training.local_batch_size,
            dp_rank=plan.meshes.data_rank,
            dp_degree=plan.meshes.degrees.data,
            num_workers=settings.data.num_workers,
            prefetch_factor=settings.data.prefetch_factor,
            finish=self.finish,
            device=device,
        )
        self.tokens_per_step = self.global_batch_size * length

    def held_out_batches(self) -> Generator[Batch]:
        """The held-out windows that are validated on, the same ones whatever the mesh; close what is not used up."""
        steps = self.settings.validation.steps
        return self._batches_of(self._held_out, "all" if steps == -1 else steps * self.global_batch_size)

    def needle_batches(self) -> Generator[Batch]:
        """The windows of validation.needles, as `held_out_batches`."""
        return self._batches_of(self._needles, "all")

    def _batches_of(self, windows: Windows | Needles | None, count: int | Literal["all"]) -> Generator[Batch]:
        assert windows is not None
        return validation_batches(
            windows,
            local_batch_size=self.settings.training.local_batch_size,
            dp_rank=self.meshes.data_rank,
            dp_degree=self.meshes.degrees.data,
            num_windows=count,
            finish=self.finish,
            device=self.device,
        )

    def summary(self) -> str:
        """One line: batch, length, plan."""
        return (
            f"{self.global_batch_size} x {self.settings.training.seq_len:,} tokens, {self.context.summary()}, "
            f"data parallel {self.meshes.degrees.data}"
        )

    def warning(self) -> str:
        """What makes the work of ranks uneven, if anything does."""
        ring = self.context.ring_degree
        if self.finish is None or ring == 1:
            return ""
        held = self.settings.training.seq_len // ring
        num_chunks = held // choose_chunk_size(held, self.context.chunk_size)
        if num_chunks >= FEWEST_CHUNKS:
            return ""
        return (
            f"each rank of the ring gets {num_chunks} chunks of the documents of a sequence, too few for even work: "
            f"let training.seq_len / {ring} be a multiple of 16, and parallelism.chunk_size small"
        )

    def close(self) -> None:
        """End the data workers."""
        self.batches.close()
