"""Loss by position: which ranges there are, and that tokens count in theirs, whatever rank holds them."""

from __future__ import annotations

import itertools
import json
from unittest import mock

import pytest
import torch
from runs import small_settings, train, write_text

from cptrain.train import positions
from cptrain.train.positions import curves, ranges, sums_by_range
from cptrain.train.stage import Stage


@pytest.mark.parametrize(
    ("seq_len", "expected"),
    [
        (64, [(0, 64)]),
        (128, [(0, 128)]),
        (200, [(0, 128), (128, 200)]),
        (1024, [(0, 128), (128, 256), (256, 512), (512, 1024)]),
    ],
)
def test_positions_are_in_ranges_that_double(seq_len, expected):
    assert ranges(seq_len) == expected


@pytest.mark.parametrize("seq_len", [65_536, 131_072, 1_048_576, 3_000_000])
def test_positions_of_any_length_are_in_few_ranges_without_gaps(seq_len):
    found = ranges(seq_len)
    assert len(found) <= 11 and found[0][0] == 0 and found[-1][1] == seq_len
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(found))


def test_positions_sum_losses_in_their_ranges_and_name_those_that_have_tokens():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 16.0]])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    sums = sums_by_range(losses, valid, torch.tensor([[0, 127, 128], [255, 300, 512]]), 1024)
    assert sums.tolist() == [[3.0, 12.0, 0.0, 16.0], [2.0, 2.0, 0.0, 1.0]]
    tag = "long_context/loss_by_position/"
    assert curves(sums.tolist(), 1024) == {f"{tag}0-128": 1.5, f"{tag}128-256": 6.0, f"{tag}512-1024": 16.0}
    assert curves([[3.0], [2.0]], 64) == {}


def validated(rank: int, world: int, folder, text: str) -> list[dict]:
    positions.SMALLEST = 16
    settings = small_settings(
        folder, text, training={"steps": 1}, parallelism={"ring_degree": world}, job={"name": f"of-{world}"}
    )
    train(settings)
    records = [json.loads(line) for line in (settings.job.folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "validation"]


def test_positions_of_held_out_text_are_the_same_on_any_mesh_and_add_up(pool, tmp_path):
    text = write_text(tmp_path)
    one, two = (pool.run(world, validated, tmp_path, text)[0] for world in (1, 2))
    tags = [f"long_context/loss_by_position/{span}" for span in ("0-16", "16-32", "32-64")]
    for record, other in zip(one, two, strict=True):
        assert [key for key in record if key.startswith("long_context/")] == tags
        assert all(abs(record[tag] - other[tag]) < 1e-10 for tag in tags)
        values = [record[tag] for tag in tags]
        assert min(values) < record["loss"] < max(values) and len(set(values)) == 3


def validated_without_batches(rank: int, world: int, folder, text: str) -> list[dict]:
    with mock.patch.object(Stage, "held_out_batches", side_effect=lambda: (batch for batch in ())):
        return validated(rank, world, folder, text)


def test_positions_without_held_out_batches_are_none(pool, tmp_path):
    records = pool.run(1, validated_without_batches, tmp_path, write_text(tmp_path))[0]
    assert records and all(record["loss"] == 0 for record in records)
    assert not [key for record in records for key in record if key.startswith("long_context/")]
