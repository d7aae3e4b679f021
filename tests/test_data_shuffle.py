from __future__ import annotations

import numpy as np
import pytest

from cptrain.data.shuffle import mix, shuffled_order, shuffled_position


def permutation(size: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    return [shuffled_position(position, size, seed=seed, epoch=epoch) for position in range(size)]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097])
def test_data_shuffle_is_a_permutation(size: int) -> None:
    assert sorted(permutation(size, seed=size)) == list(range(size))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"seed": 2**63 - 1}, {"epoch": 12345}])
def test_data_shuffle_differs_by_seed_and_epoch(other: dict[str, int]) -> None:
    equal = sum(a == b for a, b in zip(permutation(1000), permutation(1000, **other), strict=True))
    assert equal < 10  # 1 is expected of two random permutations


def test_data_shuffle_leaves_no_order() -> None:
    order = np.array(permutation(4096, seed=3))
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06  # 4 standard deviations
    assert (np.diff(order) == 1).sum() < 8


def test_data_shuffle_covers_sizes_beyond_32_bits() -> None:
    size = 10**12 + 7
    positions = {shuffled_position(position, size, seed=1, epoch=0) for position in range(500)}
    assert len(positions) == 500
    assert size // 2 < max(positions) < size


def test_data_shuffle_refuses_a_position_outside() -> None:
    with pytest.raises(ValueError, match=r"range\(5\)"):
        shuffled_position(5, 5, seed=0, epoch=0)


def test_data_shuffle_of_documents_is_a_permutation_by_seed() -> None:
    orders = [shuffled_order(1000, seed=seed) for seed in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert (orders[0] == orders[1]).sum() < 10


def test_data_shuffle_hashes_arrays_like_numbers() -> None:
    numbers = [0, 1, 2**32 + 5, 2**64 - 1]
    assert mix(np.array(numbers, dtype=np.uint64)).tolist() == [mix(number) for number in numbers]


def test_data_shuffle_order_stays_what_it_was() -> None:
    """A checkpoint's cursor means these very samples."""
    assert permutation(12, seed=42, epoch=3) == [4, 8, 1, 6, 3, 7, 9, 5, 0, 11, 2, 10]
    assert shuffled_order(12, seed=42).tolist() == [1, 10, 5, 8, 9, 3, 2, 0, 6, 7, 11, 4]
