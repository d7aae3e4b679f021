"""The figures of a step are those of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_settings, write_text

from cptrain.train.settings import TrainSettings
from cptrain.train.trainer import Trainer


def figures(rank: int, world: int, settings: TrainSettings) -> list[dict[str, Any]]:
    with Trainer(settings, torch.device("cpu")) as trainer:
        trainer.train()
    lines = (settings.job.folder / "metrics.jsonl").read_text().splitlines() if rank == 0 else []
    return [json.loads(line) for line in lines]


def test_loss_is_the_mean_and_max_loss_the_largest_of_ranks_that_read_different_text(pool, tmp_path: Path):
    text = write_text(tmp_path)

    def run(world: int, steps: int, batch: int, **degrees: int) -> list[dict[str, Any]]:
        settings = small_settings(
            tmp_path / str(world),
            text,
            training={"steps": steps, "global_batch_size": batch, "local_batch_size": 1},
            optimizer={"lr": 1e-30},  # two steps of one rank are to find the same weights
            data={"document_mask": False},
            validation={"enable": False},
            parallelism=degrees,
        )
        return pool.run(world, figures, settings)[0]

    one_after_the_other = [step["loss"] for step in run(1, 2, 1)]
    (together,) = run(4, 1, 2, data_parallel_shard_degree=2, tensor_parallel_degree=2)
    assert abs(one_after_the_other[0] - one_after_the_other[1]) > 1e-3
    assert together["max_loss"] == pytest.approx(max(one_after_the_other), abs=1e-10)
    assert together["loss"] == pytest.approx(sum(one_after_the_other) / 2, abs=1e-10)
