"""A run whose stages change the plan, and one whose stages change the length."""

from __future__ import annotations

import dataclasses
import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from runs import GLOBAL_BATCH, Outcome, assert_same_training, small_settings, train, write_text
from torch.distributed.distributed_c10d import _world

from cptrain.train.settings import TrainingConfig, TrainingStage, TrainSettings
from cptrain.train.stage import Stage
from cptrain.train.trainer import Trainer

CPU = torch.device("cpu")

# every way to divide four ranks between data, ring and ulysses, and what only methods tell apart
FACTORISATIONS = [
    {"ring_degree": 1, "ulysses_degree": 1},
    {"ring_degree": 4},
    {"ring_degree": 2, "ulysses_degree": 2},
    {"ulysses_degree": 4},
    {"ring_degree": 2},
    {"ulysses_degree": 2},
    {"ring_degree": 4, "context_parallel_method": "all_gather"},
    {"ring_degree": 4},
]


def train_all(rank: int, world: int, variants: list[TrainSettings]) -> list[Outcome | None]:
    return [train(settings) for settings in variants]


def stages(each: list[dict], **common: int) -> tuple[TrainingStage, ...]:
    return tuple(TrainingStage(**keys, **common) for keys in each)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("model", "mode"),
    [({}, "selective"), ({"window_size": 20, "full_attention_every": 2}, "none")],
    ids=["causal", "windows"],
)
def test_stages_that_change_the_plan_at_every_step_change_nothing(pool, text, tmp_path, model, mode):
    plain = small_settings(tmp_path / "plain", text, training={"local_batch_size": GLOBAL_BATCH}, model=model)
    expected = pool.run(1, train_all, [plain])[0][0]
    changing = small_settings(
        tmp_path / mode,
        text,
        model=model,
        training={"stages": stages(FACTORISATIONS, steps=1)},
        activation_checkpoint={"mode": mode},
    )
    assert_same_training(pool.run(4, train_all, [changing])[0][0], expected)


def timeouts(rank: int, world: int, settings: TrainSettings) -> list[tuple[set[timedelta], int]]:
    """What any group waits, and how many groups there are: before the first step, and behind the last."""

    def now() -> tuple[set[timedelta], int]:
        groups = list(_world.pg_map)
        return {group._get_backend(CPU).options._timeout for group in groups}, len(groups)

    with Trainer(settings, CPU) as trainer:
        found = [now()]
        trainer.train()
        return [*found, now()]


def test_stages_wait_as_long_as_the_settings_say_in_every_group(pool, text, tmp_path):
    each = stages([{"ring_degree": 2}, {"ring_degree": 2}, {"ulysses_degree": 2}], steps=1)
    settings = small_settings(
        tmp_path,
        text,
        training={"stages": each, "steps": 3},
        comm={"init_timeout_seconds": 71, "train_timeout_seconds": 83},
        validation={"enable": False},
    )
    for (before, num_before), (after, num_after) in pool.run(4, timeouts, settings):
        assert before == {timedelta(seconds=71)}
        assert after == {timedelta(seconds=83)}
        assert num_after > num_before, "the third stage made groups of its own"


def test_stages_change_the_length_and_go_on_in_the_text(pool, text, tmp_path):
    lengths = stages([{"seq_len": 32, "steps": 4}, {"seq_len": 128, "ring_degree": 2, "steps": 6}])
    one = small_settings(
        tmp_path / "one", text, training={"stages": stages([{"seq_len": 32, "steps": 4}, {"seq_len": 128, "steps": 6}])}
    )
    two = dataclasses.replace(small_settings(tmp_path / "two", text, training={"stages": lengths}))
    expected = pool.run(1, train_all, [one])[0][0]
    assert_same_training(pool.run(2, train_all, [two])[0][0], expected)


@pytest.mark.parametrize(
    ("seq_len", "ring", "chunk_size", "says"),
    [
        (8 * 8198, 8, "auto", "gets 2 chunks .* training.seq_len / 8 be a multiple of 16"),
        (8 * 8192, 8, 4096, "gets 2 chunks"),
        (8 * 8192, 8, "auto", ""),
        (8198, 1, "auto", ""),
    ],
)
def test_stages_warn_where_too_few_chunks_leave_work_uneven(seq_len, ring, chunk_size, says):
    context = SimpleNamespace(ring_degree=ring, chunk_size=chunk_size)
    settings = dataclasses.replace(TrainSettings(), training=TrainingConfig(seq_len=seq_len))
    stage = SimpleNamespace(context=context, settings=settings, finish=object())
    warning = Stage.warning(stage)
    assert re.search(says, warning) if says else warning == ""
    assert Stage.warning(SimpleNamespace(context=context, settings=settings, finish=None)) == ""
