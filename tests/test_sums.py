"""Sums of values for ranges of rows: nothing is cleared that one block reaches, nor read before it is written."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch

from cptrain.context_parallel import sums
from cptrain.context_parallel.sums import Reached, Sum

LENGTH = 40


def random_ranges(generator: random.Random, *, apart: bool) -> tuple[tuple[int, int], ...]:
    cuts = sorted(generator.sample(range(LENGTH + 1), 2 * generator.randint(1, 7)))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
    if not apart:
        ranges += generator.sample(ranges, 1)
        generator.shuffle(ranges)
    return tuple(ranges)


def unwritten() -> torch.Tensor:
    return torch.full((2, 3, LENGTH, 4), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(40))
def test_sums_equal_those_over_cleared_memory(seed):
    generator = random.Random(seed)
    x, expected = unwritten(), torch.zeros(2, 3, LENGTH, 4, dtype=torch.float64)
    if seed % 3 == 0:  # as tokens are stored on CUDA
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    total = Sum(x)
    for _ in range(generator.randint(0, 5)):
        ranges = random_ranges(generator, apart=generator.random() < 0.7)
        values = torch.randint(1, 9, (2, 3, sum(stop - start for start, stop in ranges), 4)).double()
        total.add(ranges, values)
        before = 0
        for start, stop in ranges:
            expected[:, :, start:stop] += values[:, :, before : before + stop - start]
            before += stop - start
    assert total.result().data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


def test_sums_clear_nothing_that_is_reached_first_by_one_block():
    def clear(x: torch.Tensor, ranges: tuple) -> None:
        assert ranges == ()

    with mock.patch.object(sums, "_clear", clear):
        total = Sum(unwritten())
        for ranges in (((0, 10), (30, LENGTH)), ((10, 30),), ((5, 20),)):
            total.add(ranges, torch.ones(2, 3, sum(stop - start for start, stop in ranges), 4))
        assert total.result().sum() == (LENGTH + 15) * 24


def test_sums_go_on_from_what_there_is():
    x = torch.ones(2, 3, LENGTH, 4)
    total = Sum.of(x)
    total.add(((3, 5),), torch.ones(2, 3, 2, 4))
    assert total.result().sum() == 24 * (LENGTH + 2)


@pytest.mark.parametrize("seed", range(40))
def test_sums_know_which_rows_are_reached(seed):
    generator, reached, rows = random.Random(seed), Reached(LENGTH), set()
    for _ in range(4):
        ranges = random_ranges(generator, apart=generator.random() < 0.7)
        numbers = [row for start, stop in ranges for row in range(start, stop)]
        all_new, new = reached.add(ranges)
        assert all_new == (len(numbers) == len(set(numbers) - rows))
        assert [row for start, stop in new for row in range(start, stop)] == sorted(set(numbers) - rows)
        rows |= set(numbers)
        assert {row for start, stop in reached.rest() for row in range(start, stop)} == set(range(LENGTH)) - rows
