"""What is measured of a model without training it: the loss on held-out text, and how many needles it finds."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import nn

from cptrain.data.loader import Batch
from cptrain.data.needles import check_needles
from cptrain.data.tokenizer import Tokenizer
from cptrain.loss import IGNORED, correct_each, cross_entropy_each
from cptrain.metrics import tags
from cptrain.train.batch import Shard
from cptrain.train.positions import curves, ranges, sums_by_range
from cptrain.train.settings import TrainSettings
from cptrain.train.stage import Stage


def check_needles_fit(settings: TrainSettings, tokenizer: Tokenizer) -> None:
    """ValueError unless the needles of a run can be hidden in the windows of all its stages."""
    count, stages = settings.validation.needles, settings.training.stages
    for index in range(max(1, len(stages)) if settings.validation.enable and count else 0):
        own = bool(stages) and stages[index].seq_len != "auto"
        key = f"training.stages[{index}].seq_len" if own else "training.seq_len"
        check_needles(tokenizer, count=count, length=settings.at_stage(index).training.seq_len, key=key)


class StoppedError(Exception):
    """A signal came, and who sends one may not wait for long."""


class Evaluation:
    """Passes of the model over windows that are the same whatever the mesh. Touches neither data order nor RNG.

    shard: what makes this rank's part of a batch. stopped: whether a signal came to any rank; collective, and asked
    before every batch.
    """

    def __init__(
        self, model: nn.Module, stage: Stage, shard: Callable[[Batch], Shard], stopped: Callable[[], bool]
    ) -> None:
        self._model, self._stage, self._shard, self._stopped = model, stage, shard, stopped

    @torch.no_grad()
    def held_out_loss(self) -> tuple[float, dict[str, float]]:
        """Mean loss over the held-out windows, and by position, by tag. StoppedError if it is cut short."""
        length = self._stage.settings.training.seq_len
        totals = torch.zeros(2, len(ranges(length)), dtype=torch.float64, device=self._stage.device)
        for _, shard, losses in self._passes(self._stage.held_out_batches(), cross_entropy_each):
            totals += sums_by_range(losses, shard.labels != IGNORED, shard.positions, length)
        losses, counts = self._stage.meshes.sum_over_batch(totals).tolist()
        return sum(losses) / max(sum(counts), 1), curves((losses, counts), length)

    @torch.no_grad()
    def needles(self) -> dict[str, float]:
        """The share of needles that the model finds, by tag; nothing where none are hidden. StoppedError as above."""
        count = self._stage.settings.validation.needles
        if not count:
            return {}
        wrong = torch.zeros(count, device=self._stage.device)
        for batch, shard, right in self._passes(self._stage.needle_batches(), correct_each):
            # Labels of what fills a batch up are ignored.
            missed = ((shard.labels != IGNORED) & ~right).sum(1)
            wrong.index_add_(0, batch["needle"].to(wrong.device), missed.to(wrong.dtype))
        return {tags.NEEDLE_ACC: (self._stage.meshes.sum_over_batch(wrong) == 0).double().mean().item()}

    def _passes(self, batches: Generator[Batch], of_each: Any) -> Iterator[tuple[Batch, Shard, torch.Tensor]]:
        """Every batch, this rank's part of it, and what the function says of its tokens [B, T]."""
        with closing(batches):
            for batch in batches:  # as many on all ranks, so that all ask alike
                if self._stopped():
                    raise StoppedError
                shard = self._shard(batch)
                with shard.documents_entered():
                    found = self._model(shard.tokens, shard.positions, head=partial(of_each, labels=shard.labels))
                yield batch, shard, found
