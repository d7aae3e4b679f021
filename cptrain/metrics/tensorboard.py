"""The TensorBoard files of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from cptrain.metrics import tags

_FLUSH_S = 10  # how old the newest point on disk may be while somebody watches


class TensorBoard:
    """Curves, settings and hyper-parameters in `folder`, one new file per start.

    A run resumed from step N takes the steps after N again: N + 1 becomes the file's `purge_step`, which makes
    TensorBoard drop what earlier files say about those steps, so that curves neither overlap nor zigzag.
    """

    def __init__(self, folder: Path, *, style: Literal["titan", "hf"], resumed_step: int) -> None:
        self._style = style
        self._start = resumed_step
        # A training from the start also drops the points of step 0, the validation before the first step.
        purge_step = resumed_step + 1 if resumed_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=_FLUSH_S)

    def settings(self, toml: str, hyper_parameters: Mapping[str, bool | int | float | str]) -> None:
        """Show the resolved settings under TEXT, and `hyper_parameters` as a row under HPARAMS."""
        self._writer.add_text("config", f"```toml\n{toml.strip()}\n```", self._start)
        if hyper_parameters:
            # SummaryWriter.add_hparams would put them into a run of their own, apart from the curves.
            results = [self._tag("loss_metrics/global_avg_loss"), self._tag(tags.VALIDATION_LOSS)]
            file_writer: Any = self._writer.file_writer
            for summary in hparams_summaries(dict(hyper_parameters), dict.fromkeys(results, 0.0)):
                file_writer.add_summary(summary, self._start)

    def write(self, step: int, points: Mapping[str, float]) -> None:
        """Add a point to each curve; `points` is by torchtitan's tag."""
        for name, value in points.items():
            self._writer.add_scalar(self._tag(name), value, step)

    def close(self) -> None:
        self._writer.close()

    def _tag(self, name: str) -> str:
        return tags.tag(name, self._style)
