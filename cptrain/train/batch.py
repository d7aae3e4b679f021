"""What a rank computes on: its part of a batch, how documents of a batch are packed, and what a step's batches hold."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch

from cptrain.context_parallel.packed_batch import PackedBatch
from cptrain.context_parallel.packing import Packer, find_documents
from cptrain.metrics.flops import attention_pairs
from cptrain.models.shape import ModelShape

PACKING = "packing"  # key of a batch: `Packing.encode`


@dataclass(frozen=True)
class Shard:
    """This rank's part of one micro-batch, cut by one permutation. Each [B, T] int64; labels are already shifted.

    packed: the documents that its tokens see alone; None if they see all that comes before.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    packed: PackedBatch | None = None

    def documents_entered(self) -> AbstractContextManager[object]:
        """What forward and backward passes of this micro-batch run inside of."""
        return nullcontext() if self.packed is None else self.packed


@dataclass(frozen=True)
class PackDocuments:
    """Adds to a batch of windows how its documents are dealt over the ranks of a ring, where the batch is built."""

    packer: Packer

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = batch["document_ids"]
        return {**batch, PACKING: self.packer(find_documents(ids), ids.size(0)).encode()}


@dataclass
class Counts:
    """What the micro-batches of a step hold, summed over all sequences; the last four over rings.

    pairs: (query, key) pairs of the attention of all layers, without padding. work: those by which `Packing.cost` makes
    a ring even. moved_keys: that travel forward, over all layers, by what carries them in each.
    """

    sequences: int = 0
    documents: int = 0
    padding: int = 0
    pairs: int = 0
    work: int = 0
    largest_work: int = 0  # of a rank, times the ranks of its ring
    moved_keys: int = 0
    ring_keys: int = 0  # that full rings would move

    @staticmethod
    def of(batch: dict[str, torch.Tensor], shape: ModelShape, packed: PackedBatch | None, dtype: torch.dtype) -> Counts:
        """Counts of one micro-batch of whole windows; without document masks attention sees a window as one document.

        dtype: of keys, which has a say in how they travel.
        """
        ids = batch["document_ids"]
        documents = packed.packing.documents if packed else find_documents(ids)
        lengths = [stop - start for start, stop in documents.spans()]
        counts = Counts(sequences=len(ids), documents=len(lengths), padding=documents.length - sum(lengths))
        counts.pairs = attention_pairs(shape, lengths if packed else (ids >= 0).sum(1).tolist())
        if packed is None:
            return counts
        cost, windows = packed.packing.cost, shape.windows()
        counts.work, counts.largest_work = cost.num_pairs, cost.largest_work * packed.packing.layout.num_ranks
        counts.moved_keys = sum(packed.num_moved(window, dtype) for window in windows)
        counts.ring_keys = packed.packing.ring_keys * len(windows)
        return counts

    @staticmethod
    def total(counts: Sequence[Counts]) -> Counts:
        """The sum of some counts."""
        return Counts.from_list([sum(column) for column in zip(*(c.to_list() for c in counts), strict=True)])

    def to_list(self) -> list[int]:
        return [getattr(self, field.name) for field in fields(self)]

    @staticmethod
    def from_list(numbers: Sequence[int]) -> Counts:
        return Counts(*numbers)

    def curves(self, tokens: int) -> dict[str, float]:
        """Points of the curves about documents, by tag; those about ranks only where documents are packed over some.

        tokens: of the step, with padding. The imbalance is that of a ring, the work of its busiest rank over the mean
        of its ranks; what one data-parallel ring has to do beyond another does not show.
        """
        points = {
            "long_context/docs_per_seq": self.documents / max(self.sequences, 1),
            "long_context/padding(%)": 100 * self.padding / max(tokens, 1),
        }
        if self.ring_keys:
            points["cp/work_imbalance"] = self.largest_work / max(self.work, 1)
            points["cp/keys_moved(%)"] = 100 * self.moved_keys / self.ring_keys
        return points
