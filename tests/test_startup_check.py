"""The check at the start of a run: one line for each new plan, an error for a wrong one, and no trace of it after."""

from __future__ import annotations

import gc
import logging
import re
import time
from pathlib import Path
from unittest import mock

import planted
import pytest
import torch
import torch.distributed as dist
from runs import small_settings, write_text
from test_attention import make_plan
from torch.distributed.tensor import DTensor

from cptrain.context_parallel import launches
from cptrain.models.shape import ModelShape
from cptrain.train import startup
from cptrain.train.settings import TrainingStage, TrainSettings
from cptrain.train.startup import StartupCheck
from cptrain.train.trainer import Trainer

DOCUMENTS = {"document_mask": True}
LINE = r"startup check: {}: attention exact to \d\.\de-1[4-7] \(\d+\.\d s\)"


class Lines(logging.Handler):
    """The lines of the startup check that are logged while it is active."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("startup check"):
            self.lines.append(record.getMessage())

    def __enter__(self) -> Lines:
        self._logger = logging.getLogger("cptrain")
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)


def train_and_listen(
    rank: int, world: int, settings: TrainSettings, fault: str = "nothing"
) -> tuple[list[str], list[float]]:
    """Lines of the check, and weights after a few steps (a few numbers of each)."""
    with Lines() as heard, getattr(planted, fault)(), Trainer(settings, torch.device("cpu")) as trainer:
        trainer.train()
        local = (p.to_local() if isinstance(p, DTensor) else p for p in trainer.model.parameters())
        weights = [parameter.double().sum().item() for parameter in local]
    return heard.lines, weights


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def two_steps(folder: Path, text: str, *, check: bool = True, **sections: dict) -> TrainSettings:
    sections["training"] = {"steps": 2} | sections.get("training", {})
    sections["data"] = {"document_mask": False} | sections.get("data", {})
    return small_settings(folder, text, validation={"enable": False}, debug={"startup_check": check}, **sections)


@pytest.mark.parametrize(
    ("world", "sections", "title"),
    [
        (2, {"parallelism": {"ring_degree": 2}}, "ring 2, zigzag"),
        (2, {"parallelism": {"ulysses_degree": 2}, "model": {"window_size": 9}}, "ulysses 2"),
        (1, {"model": {"window_size": 9}}, "whole sequences on each rank"),
        (
            4,
            {"parallelism": {"ring_degree": 2, "ulysses_degree": 2}, "model": {"attention_mask": "full"}},
            "ring 2 x ulysses 2, zigzag",
        ),
        (1, {"data": DOCUMENTS}, "whole sequences on each rank, packed documents"),
        (
            2,
            {"data": DOCUMENTS, "parallelism": {"ring_degree": 2, "chunk_size": 16}, "model": {"window_size": 9}},
            "ring 2, packed documents",
        ),
    ],
    ids=["ring", "windows", "windows on one rank", "hybrid", "documents on one rank", "documents and windows"],
)
def test_startup_check_logs_one_line(pool, tmp_path, text, world, sections, title):
    lines, *others = (lines for lines, _ in pool.run(world, train_and_listen, two_steps(tmp_path, text, **sections)))
    assert len(lines) == 1 and re.fullmatch(LINE.format(re.escape(title)), lines[0]), lines
    assert others == [[]] * (world - 1), "only rank 0 speaks"


def test_startup_check_also_looks_at_whole_sequences_on_each_rank(pool, tmp_path, text):
    (line,), others = (lines for lines, _ in pool.run(2, train_and_listen, two_steps(tmp_path, text)))
    assert "whole sequences on each rank: attention exact to" in line
    assert others == []


def test_startup_check_visits_each_new_plan_of_the_stages_once(pool, tmp_path, text):
    degrees = [
        {"ring_degree": 2},
        {"ulysses_degree": 2},
        {"ring_degree": 1, "ulysses_degree": 1},
        {"ulysses_degree": 2},
    ]
    stages = tuple(TrainingStage(steps=1, **each) for each in degrees)
    settings = two_steps(tmp_path, text, training={"steps": 4, "stages": stages})
    lines, _ = pool.run(2, train_and_listen, settings)[0]
    assert [line.split(": ")[1] for line in lines] == ["ring 2, zigzag", "ulysses 2", "whole sequences on each rank"]


def errors_of(rank: int, world: int, settings: TrainSettings, fault: str) -> str:
    with pytest.raises(RuntimeError) as caught:
        train_and_listen(rank, world, settings, fault)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        ("dropped_hop", "attention, causal: out"),
        ("detached_keys", "attention, causal: dk"),
        ("no_causal_mask", "flow, causal: leaks"),
        ("swapped_chunks", "positions of each rank's tokens"),
    ],
)
def test_startup_check_stops_the_run_with_a_table_on_all_ranks(pool, tmp_path, text, fault, row):
    settings = two_steps(tmp_path, text, parallelism={"ring_degree": 2})
    for message in pool.run(2, errors_of, settings, fault):
        assert "ring 2, zigzag: attention over these ranks is not what one rank computes" in message
        assert re.search(rf"{re.escape(row)} .*FAILED", message), message
        assert "debug.startup_check = false" in message


@pytest.mark.parametrize(
    ("world", "fault", "row"),
    [
        (1, "no_document_mask", "attention, causal in 8 documents: out"),
        (2, "no_document_mask", "flow, causal in 11 documents by exchange: leaks"),
        (2, "dropped_hop", "attention, causal in 11 documents by ring: out"),
    ],
)
def test_startup_check_stops_a_run_whose_documents_are_not_masked_or_not_whole(pool, tmp_path, text, world, fault, row):
    settings = two_steps(tmp_path, text, data=DOCUMENTS, parallelism={"ring_degree": world})
    for message in pool.run(world, errors_of, settings, fault):
        assert "packed documents: attention over these ranks is not what one rank computes" in message
        assert re.search(rf"{re.escape(row)} .*FAILED", message), message


def test_startup_check_can_be_switched_off(pool, tmp_path, text):
    settings = two_steps(tmp_path, text, check=False, parallelism={"ring_degree": 2})
    lines, _ = pool.run(2, train_and_listen, settings, "dropped_hop")[0]
    assert lines == []


def test_startup_check_changes_nothing_of_the_training(pool, tmp_path, text):
    runs = [
        two_steps(tmp_path / str(check), text, check=check, parallelism={"ring_degree": 2}) for check in (True, False)
    ]
    (_, with_check), (_, without) = (pool.run(2, train_and_listen, settings)[0] for settings in runs)
    assert with_check == without


def traces(rank: int, world: int, shape: ModelShape, layout: str) -> dict[str, tuple[int, int]]:
    """Tensors alive and process groups, before and after; and whether the generator has moved."""
    plan = make_plan(layout, ring=2)

    def count() -> dict[str, int]:
        launches._index.cache_clear()  # of any packing, bounded, and as small as the check
        gc.collect()
        return {
            "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
            "groups": len(dist.distributed_c10d._world.pg_map),
            "generator": hash(torch.get_rng_state().numpy().tobytes()),
        }

    before = count()
    StartupCheck(shape, tp=1, dtype=torch.float32, enabled=True)(plan, 4096)
    after, patience = count(), 20
    while after["tensors"] > before["tensors"] and (patience := patience - 1):
        time.sleep(0.1)  # gloo's thread lets go of what the ranks have agreed on a moment after it is there
        after = count()
    return {key: (before[key], after[key]) for key in before}


@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
def test_startup_check_leaves_no_tensors_or_groups_and_draws_no_random_numbers(pool, tmp_path, text, layout):
    shape = two_steps(tmp_path, text, model={"window_size": 64, "full_attention_every": 2}).shape(64)
    for rank in pool.run(2, traces, shape, layout):
        before, after = rank.pop("tensors")
        assert after <= before, "a cache of earlier jobs may let go of one, but none may stay"
        assert all(before == after for before, after in rank.values()), rank


def different_documents(rank: int, world: int, shape: ModelShape) -> None:
    plan, length = make_plan("balanced", ring=2), 128
    StartupCheck(shape, tp=1, dtype=torch.float32, enabled=True)(plan, 4096)
    ids = torch.zeros(1, length, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(4):  # as many as a validation may have
            with plan.pack(ids):
                pass
    ids[0, length - 1 - rank :] = 1
    with pytest.raises(RuntimeError, match="have packed different documents"):
        plan.pack(ids).__enter__()


def test_startup_check_leaves_the_comparison_of_documents_to_the_training(pool, tmp_path, text):
    shape = two_steps(tmp_path, text, model={"window_size": 64, "full_attention_every": 2}).shape(64)
    pool.run(2, different_documents, shape)


def line_in_bf16(rank: int, world: int, shape: ModelShape) -> list[str]:
    """As on a device whose kernel has no fp64."""
    with mock.patch.object(startup, "exact_dtype", lambda device, dtype, kernel: dtype), Lines() as heard:
        StartupCheck(shape, tp=1, dtype=torch.bfloat16, enabled=True)(make_plan(ring=2), 4096)
    return heard.lines


def test_startup_check_in_bf16_compares_with_the_rounding_of_one_device(pool, tmp_path, text):
    (line,) = pool.run(2, line_in_bf16, two_steps(tmp_path, text).shape(64))[0]
    assert re.search(r"ring 2, zigzag: attention off by [01]\.\d times one device's rounding in bfloat16 \(", line), (
        line
    )


def test_startup_check_is_a_setting_that_is_on():
    assert TrainSettings().debug.startup_check
