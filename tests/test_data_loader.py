from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_corpus import corpus_of
from test_data_windows import random_texts

from cptrain.data import loader
from cptrain.data.loader import Batch, TrainBatches, validation_batches
from cptrain.data.settings import Packing
from cptrain.data.split import split_documents
from cptrain.data.windows import IGNORE, Windows

SEQ_LEN = 16


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def windows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """About 60 windows of random text, no two alike."""
    return windows_in(tmp_path_factory.mktemp("corpus"), request.param)


@pytest.fixture(scope="module")
def plain_windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """The same of one kind, for what does not depend on it and takes seconds: the start of a worker."""
    return windows_in(tmp_path_factory.mktemp("corpus"), "concat")


def windows_in(folder: Path, packing: Packing) -> Windows:
    corpus = corpus_of(folder, random_texts(50))
    return Windows(split_documents(corpus, fraction=0.0, seed=5)[0], seq_len=SEQ_LEN, packing=packing)


def batches_of(
    windows: Windows,
    *,
    start: int = 0,
    world: int = 1,
    rank: int = 0,
    local: int = 2,
    workers: int = 0,
    **options: Any,
) -> TrainBatches:
    return TrainBatches(
        windows,
        start_index=start,
        global_batch_size=8,
        local_batch_size=local,
        dp_rank=rank,
        dp_degree=world,
        num_workers=workers,
        **options,
    )


def longest_document(batch: Batch) -> Batch:
    """The batch, with the most tokens that a document has in each row, and the process that counted."""
    counts = torch.stack([row[row >= 0].bincount().max() for row in batch["document_ids"]])
    return {**batch, "longest": counts, "process": torch.full_like(counts, os.getpid())}


def take(batches: TrainBatches, count: int) -> torch.Tensor:
    return torch.cat([next(batches)["tokens"] for _ in range(count)])


def rows(tokens: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens.tolist()]


@pytest.mark.parametrize(("world", "local"), [(1, 2), (2, 2), (4, 2), (4, 1), (8, 1), (2, 4)])
def test_data_loader_row_is_the_sample_of_its_global_index(windows: Windows, world: int, local: int) -> None:
    for rank in range(world):
        batches = batches_of(windows, world=world, rank=rank, local=local)
        for step in range(2):
            for micro in range(8 // (world * local)):
                batch = next(batches)
                for row in range(local):
                    sample = windows[step * 8 + (micro * world + rank) * local + row]
                    assert all(torch.equal(batch[name][row], sample[name]) for name in sample)


@pytest.mark.parametrize(("world", "local"), [(2, 2), (4, 2), (4, 1), (8, 1), (2, 1)])
def test_data_loader_step_reads_the_same_set_at_any_world_size(windows: Windows, world: int, local: int) -> None:
    count = 8 // (world * local)
    together = [take(batches_of(windows, world=world, rank=rank, local=local), count) for rank in range(world)]
    assert sorted(rows(torch.cat(together))) == sorted(rows(take(batches_of(windows), 4)))


def test_data_loader_runs_on_into_the_next_epochs(windows: Windows) -> None:
    steps = len(windows) * 2 // 8 + 1
    seen = rows(take(batches_of(windows), steps * 4))
    assert sorted(seen[: len(windows)]) == sorted(seen[len(windows) : 2 * len(windows)])
    assert seen[: len(windows)] != seen[len(windows) : 2 * len(windows)]


@pytest.mark.parametrize(("before", "after"), [((1, 2), (1, 2)), ((1, 2), (4, 1)), ((2, 2), (1, 1)), ((8, 1), (2, 4))])
def test_data_loader_resumes_exactly_at_any_world_size(
    windows: Windows, before: tuple[int, int], after: tuple[int, int]
) -> None:
    straight = rows(take(batches_of(windows), 12))
    first = [batches_of(windows, world=before[0], rank=rank, local=before[1]) for rank in range(before[0])]
    for batches in first:
        take(batches, batches.micro_batches)
    [start] = {batches.next_index for batches in first}
    second = [batches_of(windows, start=start, world=after[0], rank=rank, local=after[1]) for rank in range(after[0])]
    for step in (1, 2):
        read = torch.cat([take(batches, batches.micro_batches) for batches in second])
        assert sorted(rows(read)) == sorted(straight[step * 8 : step * 8 + 8])
    assert {batches.next_index for batches in second} == {24}


def test_data_loader_cursor_in_the_middle_of_a_step_is_refused(windows: Windows) -> None:
    batches = batches_of(windows)
    next(batches)
    with pytest.raises(RuntimeError, match="1 of 4 micro-batches of this step are taken"):
        _ = batches.next_index


def test_data_loader_workers_give_the_same_batches(windows: Windows) -> None:
    alone, helped = batches_of(windows, start=8), batches_of(windows, start=8, workers=2)
    read = take(helped, 9)
    helped.close()
    assert torch.equal(take(alone, 9), read)


def test_data_loader_finishes_each_batch(windows: Windows) -> None:
    finished, plain = batches_of(windows, finish=longest_document), batches_of(windows)
    for _ in range(9):
        batch, expected = next(finished), longest_document(next(plain))
        assert all(torch.equal(batch[name], part) for name, part in expected.items())


def test_data_loader_finishes_batches_in_its_workers(plain_windows: Windows) -> None:
    others = multiprocessing.active_children()
    batches = batches_of(plain_windows, workers=1, finish=longest_document)
    batch = next(batches)
    workers = [child.pid for child in multiprocessing.active_children() if child not in others]
    batches.close()  # before anything can fail: workers ignore the signal that ends a process' children
    expected = longest_document(next(batches_of(plain_windows)))
    assert torch.equal(batch["longest"], expected["longest"])
    assert batch["process"].tolist() == workers * 2


class Watched:
    """Counts the batches that are built, and the threads that build them; one may fail."""

    def __init__(self, fails_at: int = 0) -> None:
        self.built = 0
        self.fails_at = fails_at
        self.threads: set[threading.Thread] = set()

    def __call__(self, batch: Batch) -> Batch:
        self.threads.add(threading.current_thread())
        self.built += 1
        if self.built == self.fails_at:
            raise OSError("no such document")
        return batch

    def waited(self, count: int) -> int:
        """How many are built once there are so many, and a moment later."""
        deadline = time.monotonic() + 30
        while self.built < count and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        return self.built


@pytest.mark.parametrize("local", [8, 2], ids=["whole batch", "four micro-batches"])
def test_data_loader_builds_one_step_ahead_in_a_thread(windows: Windows, local: int) -> None:
    watched = Watched()
    batches = batches_of(windows, local=local, finish=watched)
    assert watched.built == 0
    for step in (1, 2, 3):
        take(batches, batches.micro_batches)
        assert watched.waited((step + 1) * batches.micro_batches) == (step + 1) * batches.micro_batches
    (thread,) = watched.threads
    assert thread is not threading.current_thread() and thread.is_alive()
    batches.close()
    assert not thread.is_alive()


def test_data_validation_builds_one_batch_ahead_in_a_thread(windows: Windows) -> None:
    watched = Watched()
    batches = validation_batches(windows, local_batch_size=2, dp_rank=0, dp_degree=1, finish=watched)
    for number in (1, 2):
        next(batches)
        assert watched.waited(number + 1) == number + 1
    (thread,) = watched.threads
    assert thread is not threading.current_thread()
    batches.close()
    assert not thread.is_alive()


def test_data_loader_error_comes_in_the_place_of_its_batch(windows: Windows) -> None:
    watched = Watched(fails_at=3)
    batches = batches_of(windows, finish=watched)
    assert torch.equal(take(batches, 2), take(batches_of(windows), 2))
    with pytest.raises(OSError, match="no such document"):
        next(batches)
    assert batches._taken == 2
    with pytest.raises(RuntimeError, match="could not be built"):
        next(batches)
    batches.close()


class Lost:
    """Batches of which the first is lost, and would be waited for for ever."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Lost:
        return self

    def __next__(self) -> Batch:
        self.asked += 1
        if self.asked > 1:
            time.sleep(60)
        raise OSError("lost")


class AtOnce(ThreadPoolExecutor):
    """A thread that is always ahead of who waits for it."""

    def submit(self, work, /, *arguments, **options):  # type: ignore[no-untyped-def]
        future = super().submit(work, *arguments, **options)
        wait([future], timeout=5)
        return future


def test_data_loader_does_not_ask_again_for_a_lost_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "ThreadPoolExecutor", AtOnce)
    lost = Lost()
    batches = loader._built_ahead(lost, 3, torch.device("cpu"))
    with pytest.raises(OSError, match="lost"):
        next(batches)
    assert lost.asked == 1


def test_data_loader_keeps_no_file_of_a_workers_batch_open(plain_windows: Windows) -> None:
    batches = batches_of(plain_windows, workers=1)
    try:
        assert not any(x.is_shared() for x in next(batches).values())
    finally:
        batches.close()


@pytest.mark.parametrize("place", ["cpu", "cuda:3", "cuda:0", "cuda"])
def test_data_loader_pins_what_goes_to_cuda_by_way_of_that_device(
    windows: Windows, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    chosen: dict[threading.Thread, int] = {}
    pinned: list[int] = []
    device = torch.device(place)

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(chosen[threading.current_thread()])
        return x + 1

    monkeypatch.setattr(torch.cuda, "set_device", lambda to: chosen.update({threading.current_thread(): to}))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches = batches_of(windows, local=8, device=device)
    batch, expected = next(batches), next(batches_of(windows, local=8))
    batches.close()
    places = {"local_batch_size": 8, "dp_rank": 0, "dp_degree": 1, "num_windows": 8}
    held_out = list(validation_batches(windows, **places, device=device))  # type: ignore[arg-type]
    assert len(held_out) == 1
    if place == "cpu":
        assert not pinned and not chosen
        return
    assert all(torch.equal(batch[name], expected[name] + (name != "document_ids")) for name in expected)
    assert set(pinned) == {5 if device.index is None else device.index} and len(pinned) >= 6


def test_data_loader_close_stops_its_workers(plain_windows: Windows) -> None:
    others = multiprocessing.active_children()
    batches = batches_of(plain_windows, workers=1)
    next(batches)
    assert len(multiprocessing.active_children()) == len(others) + 1
    batches.close()
    assert multiprocessing.active_children() == others


class Broken:
    """Windows that cannot be read from the third on."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index > 2:
            raise RuntimeError("the file has changed")
        return {"tokens": torch.ones(4)}


def test_data_loader_close_stops_the_workers_after_an_error_of_one() -> None:
    others = multiprocessing.active_children()
    batches = TrainBatches(
        Broken(),  # type: ignore[arg-type]
        start_index=0,
        global_batch_size=1,
        local_batch_size=1,
        dp_rank=0,
        dp_degree=1,
        num_workers=1,
    )
    with pytest.raises(RuntimeError, match="the file has changed") as kept:
        list(itertools.islice(batches, 5))
    batches.close()
    assert kept, "as its traceback holds the loader where a run ends by it"
    assert multiprocessing.active_children() == others


UNCLOSED = """
import torch
from cptrain.data.loader import TrainBatches

class Ones:
    def __getitem__(self, index):
        return {"tokens": torch.ones(4)}

if __name__ == "__main__":
    place = dict(start_index=0, global_batch_size=1, local_batch_size=1, dp_rank=0, dp_degree=1)
    batches = TrainBatches(Ones(), **place, num_workers=1)
    next(batches)
    raise SystemExit(3)
"""


def test_data_loader_that_nobody_closes_does_not_keep_its_process(tmp_path: Path) -> None:
    script = tmp_path / "unclosed.py"
    script.write_text(UNCLOSED)
    done = subprocess.run([sys.executable, str(script)], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr


def test_data_loader_workers_outlive_the_signals_that_end_a_run(plain_windows: Windows) -> None:
    others = multiprocessing.active_children()
    batches = batches_of(plain_windows, workers=1)
    first = take(batches, 1)
    [worker] = [child for child in multiprocessing.active_children() if child not in others]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(int(worker.pid or 0), number)
    assert torch.equal(torch.cat([first, take(batches, 8)]), take(batches_of(plain_windows), 9))
    batches.close()


def test_data_loader_leaves_the_generator_of_the_training_alone(windows: Windows) -> None:
    before = torch.get_rng_state()
    next(batches_of(windows))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_loader_closed_is_refused(windows: Windows) -> None:
    batches = batches_of(windows)
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"local": 3}, r"global_batch_size = 8: must be a multiple of .* = 3 x 1 data-parallel ranks; set it to 9"),
        ({"world": 16, "local": 1}, r"= 1 x 16 data-parallel ranks; set it to 16"),
        ({"local": 5}, r"set it to 10"),
        ({"local": 0}, "local_batch_size = 0: must be positive"),
        ({"rank": 1}, r"dp_rank = 1: must be in range\(1\)"),
        ({"start": -1}, "start_index = -1"),
    ],
)
def test_data_loader_impossible_arguments_are_refused(windows: Windows, values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches_of(windows, **values)


# Validation


def validation(windows: Windows, world: int, local: int, count: int) -> list[list[Batch]]:
    return [
        list(validation_batches(windows, local_batch_size=local, dp_rank=rank, dp_degree=world, num_windows=count))
        for rank in range(world)
    ]


SHAPES = [(1, 1), (1, 3), (2, 1), (2, 2), (4, 2), (8, 1)]


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize(("world", "local"), SHAPES)
def test_data_validation_covers_each_window_once(windows: Windows, world: int, local: int, count: int) -> None:
    ranks = validation(windows, world, local, count)
    labels = [row for batches in ranks for batch in batches for row in rows(batch["labels"])]
    expected = rows(torch.stack([windows.window(number)["labels"] for number in range(count)]))
    assert sorted(row for row in labels if set(row) != {IGNORE}) == sorted(expected)


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize(("world", "local"), SHAPES)
def test_data_validation_gives_every_rank_equal_shapes(windows: Windows, world: int, local: int, count: int) -> None:
    ranks = validation(windows, world, local, count)
    shapes = {tuple(tuple(batch[name].shape) for batch in batches for name in batch) for batches in ranks}
    assert shapes == {((local, SEQ_LEN),) * (4 * -(-count // (world * local)))}


def test_data_validation_takes_all_windows_and_no_more(windows: Windows) -> None:
    for count in ("all", 10**6):
        batches = validation_batches(windows, local_batch_size=1, dp_rank=0, dp_degree=1, num_windows=count)  # type: ignore[arg-type]
        assert len(list(batches)) == len(windows)


def test_data_validation_is_in_the_order_of_the_windows(windows: Windows) -> None:
    [batches] = validation(windows, 1, 2, 6)
    read = torch.cat([batch["tokens"] for batch in batches])
    assert rows(read) == rows(torch.stack([windows.window(number)["tokens"] for number in range(6)]))


def test_data_validation_finishes_each_batch(windows: Windows) -> None:
    arguments = {"local_batch_size": 3, "dp_rank": 1, "dp_degree": 2, "num_windows": 10}
    plain = list(validation_batches(windows, **arguments))  # type: ignore[arg-type]
    finished = list(validation_batches(windows, **arguments, finish=longest_document))  # type: ignore[arg-type]
    assert len(finished) == 2
    for batch, expected in zip(finished, map(longest_document, plain), strict=True):
        assert all(torch.equal(batch[name], part) for name, part in expected.items())


@pytest.mark.parametrize("values", [{"num_windows": 0}, {"local_batch_size": 0}, {"dp_rank": 2}])
def test_data_validation_impossible_arguments_are_refused_at_once(windows: Windows, values: dict[str, int]) -> None:
    arguments = {"local_batch_size": 1, "dp_rank": 0, "dp_degree": 2, "num_windows": 1, **values}
    with pytest.raises(ValueError, match=f"{next(iter(values))} = .*: must be"):
        validation_batches(windows, **arguments)
