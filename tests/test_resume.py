"""Stopping and going on: nothing is lost, nothing is done twice, and the same ranks get the same bits."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from legs import (
    Leg,
    assert_same_numbers,
    assert_same_state,
    checkpoints,
    contents,
    flat,
    leg,
    read_by_all,
    start,
    start_each,
    steps_of,
)
from runs import GLOBAL_BATCH, small_settings, write_text

from cptrain.data.settings import DataConfig
from cptrain.models.settings import ModelConfig
from cptrain.optim.settings import LRSchedulerConfig
from cptrain.train.resume import plain_schedule, plain_shape, warn_of_other_schedule, warn_of_other_shape
from cptrain.train.settings import TrainingConfig, TrainingStage, TrainSettings
from cptrain.train.stage import Stage
from cptrain.train.trainer import Trainer

LAYOUTS = {
    "ring 2": (2, {"ring_degree": 2}, 8),
    "fsdp 2": (2, {"data_parallel_shard_degree": 2}, 2),
    "one rank": (1, {}, 4),
    "fsdp 2 x ulysses 2": (4, {"data_parallel_shard_degree": 2, "ulysses_degree": 2}, 1),
    "tp 2": (2, {"tensor_parallel_degree": 2}, 8),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def settings_of(text: str, cache: str, tmp_path: Path) -> Any:
    """`settings_of(layout, name, section={key: value})`: 6 steps on a layout, in a folder of their own by name."""

    def make(layout: str = "one rank", name: str = "run", **sections: dict[str, Any]) -> TrainSettings:
        _, degrees, local_batch_size = LAYOUTS[layout]
        keys: dict[str, dict[str, Any]] = {
            "data": {"cache_dir": cache},
            "training": {"steps": 6, "local_batch_size": local_batch_size},
            "lr_scheduler": {"total_steps": 8},  # so that training.steps may change and nothing else with it
            "parallelism": degrees,
            "checkpoint": {"enable": True, "interval": 100},
            "validation": {"enable": False},
        }
        for section, values in sections.items():
            keys[section] = keys.get(section, {}) | values
        settings = small_settings(tmp_path, text, **keys)
        return dataclasses.replace(settings, job=dataclasses.replace(settings.job, name=name))

    return make


# --- the same ranks ---------------------------------------------------------------------------------------------------


def straight_and_resumed(
    rank: int, world: int, straight: TrainSettings, resumed: TrainSettings
) -> tuple[Leg, Leg, Leg]:
    first = dataclasses.replace(resumed, training=dataclasses.replace(resumed.training, steps=3))
    return leg(straight), leg(first), leg(resumed)


@pytest.mark.parametrize("layout", ["ring 2", "fsdp 2"])
@pytest.mark.parametrize(
    "precision",
    [{"dtype": "float32"}, {"dtype": "float64"}, {"dtype": "float32", "mixed_precision_param": "bfloat16"}],
    ids=["fp32", "fp64", "bf16 over fp32"],
)
def test_resume_on_the_same_ranks_is_bitwise(pool, settings_of, layout, precision):
    both = [settings_of(layout, name, training=precision) for name in ("straight", "resumed")]
    for rank, (straight, first, second) in enumerate(pool.run(2, straight_and_resumed, *both)):
        assert (first.step, second.step) == (3, 6)
        assert first.read + second.read == straight.read
        assert first.drawn + second.drawn == straight.drawn
        assert second.state == straight.state
        if rank == 0:
            assert second.numbers() == straight.numbers()
            assert steps_of(second) == [1, 2, 3, 4, 5, 6]


def test_resume_has_something_to_lose(pool, settings_of):
    """What the comparison above rests on: weights, moments, data and generators differ between the steps."""
    (straight, first, _) = pool.run(1, straight_and_resumed, settings_of(name="straight"), settings_of(name="resumed"))[
        0
    ]
    assert all(first.state[name] != straight.state[name] for name in straight.state)
    assert len(set(straight.drawn)) == 6
    windows = [window for step in straight.read for window in step]
    assert len(set(windows)) == len(windows) == 6 * GLOBAL_BATCH
    assert any("exp_avg_sq" in name for name in straight.state)


def test_resume_inside_of_a_stage_is_bitwise(pool, settings_of):
    stages = TrainingStage(steps=2, ring_degree=2), TrainingStage(steps=4, ulysses_degree=2, local_batch_size=4)
    both = [settings_of("ring 2", name, training={"stages": stages}) for name in ("straight", "resumed")]
    straight, first, second = pool.run(2, straight_and_resumed, *both)[0]
    assert first.read + second.read == straight.read
    assert (second.state, second.numbers()) == (straight.state, straight.numbers())


def test_resume_of_a_finished_run_says_so_and_changes_nothing(pool, settings_of):
    settings = settings_of("ring 2", checkpoint={"interval": 3}, validation={"enable": True, "freq": 3})
    (done, *_) = pool.run(2, start, settings)
    files = contents(settings.job.folder)
    (again, *_) = pool.run(2, start, settings)
    assert "step 6 of 6 is done already; raise training.steps to go on" in again.log
    assert (again.step, again.read, again.metrics) == (6, [], done.metrics)
    assert {name: text for name, text in contents(settings.job.folder).items() if name != "environment.json"} == {
        name: text for name, text in files.items() if name != "environment.json"
    }


# --- other ranks ------------------------------------------------------------------------------------------------------


def test_resume_on_other_ranks_reads_the_same_data_and_agrees(pool, settings_of):
    straight = pool.run(1, start, settings_of("one rank", "straight", training={"steps": 8}))
    read = []
    for end, layout in ((2, "ring 2"), (4, "one rank"), (6, "fsdp 2 x ulysses 2"), (8, "tp 2")):
        legs = pool.run(LAYOUTS[layout][0], start, settings_of(layout, "moving", training={"steps": end}))
        assert legs[0].step == end
        read += read_by_all(legs)
    assert read == read_by_all(straight)
    assert steps_of(legs[0]) == list(range(1, 9))
    assert_same_numbers(legs[0], straight[0])
    assert_same_state(legs[0].state, straight[0].state)


@pytest.mark.parametrize("layout", ["one rank", "fsdp 2"])
def test_resume_with_another_accumulation_agrees(pool, settings_of, layout):
    world, _, _ = LAYOUTS[layout]
    straight = pool.run(world, start, settings_of(layout, "straight"))
    sizes = {"straight": 4, "first": 1, "second": 2}
    first = pool.run(world, start, settings_of(layout, training={"steps": 3, "local_batch_size": sizes["first"]}))
    second = pool.run(world, start, settings_of(layout, training={"local_batch_size": sizes["second"]}))
    assert read_by_all(first) + read_by_all(second) == read_by_all(straight)
    assert_same_numbers(second[0], straight[0])
    assert_same_state(second[0].state, straight[0].state)


def test_resume_with_another_global_batch_goes_on_at_the_next_window(pool, settings_of):
    straight, first, second = pool.run(
        1,
        start_each,
        [
            settings_of(name="straight"),
            settings_of(training={"steps": 3}),
            settings_of(training={"steps": 9, "global_batch_size": GLOBAL_BATCH // 2}),
        ],
    )[0]
    assert flat(first.read + second.read) == flat(straight.read)
    assert [record["tokens_seen"] for record in second.metrics][-1] == 6 * GLOBAL_BATCH * 64


def test_resume_at_another_length_goes_on_at_the_next_window(pool, settings_of):
    # 7 steps of 8 x 64 tokens are 149 1/3 windows of 24: the next whole one is number 150.
    batch = {"global_batch_size": 10, "local_batch_size": 10, "seq_len": 24}
    straight, _, second = pool.run(
        1,
        start_each,
        [
            settings_of(name="straight", training={"steps": 17, **batch}),
            settings_of(training={"steps": 7}),
            settings_of(training={"steps": 9, **batch}),
        ],
    )[0]
    assert second.read == straight.read[15:]


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_resume_after_a_signal_to_one_rank_is_bitwise(pool, settings_of):
    """SIGTERM in the middle of step 3 on rank 1: all ranks finish the step, save and stop."""
    straight = pool.run(2, start, settings_of("ring 2", "straight"))
    settings = settings_of("ring 2", validation={"enable": True, "freq": 3, "steps": 1})
    stopped = pool.run(2, start, settings, on_rank=1, signals={3: [signal.SIGTERM]})
    assert [found.stopped_by for found in stopped] == ["a signal on another rank", "SIGTERM"]
    assert [found.step for found in stopped] == [3, 3]
    assert checkpoints(settings) == ["step-3"]
    assert steps_of(stopped[0], "validation") == [0], "who sends a signal does not wait for a validation"
    going_on = pool.run(2, start, settings)
    for first, second, whole in zip(stopped, going_on, straight, strict=True):
        assert first.read + second.read == whole.read
        assert first.drawn + second.drawn == whole.drawn
        assert second.state == whole.state
    assert going_on[0].numbers() == straight[0].numbers()
    assert (steps_of(going_on[0]), steps_of(going_on[0], "validation")) == ([1, 2, 3, 4, 5, 6], [0, 6])


def interrupted_validation(rank: int, world: int, settings: TrainSettings, number: int) -> tuple[Leg, list[int]]:
    """SIGTERM on rank 1 before the second batch of the validation of this number; and the batches that each read."""
    whole, read = Stage.held_out_batches, []

    def batches(stage):
        read.append(0)
        for batch in whole(stage):
            read[-1] += 1
            if (rank, len(read), read[-1]) == (1, number, 2):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with mock.patch.object(Stage, "held_out_batches", batches):
        return leg(settings), read


@pytest.mark.parametrize(
    ("layout", "number", "steps", "measured"),
    [("ring 2", 1, 0, []), ("fsdp 2", 2, 2, [0]), ("ring 2", 3, 4, [0, 2])],
    ids=["before the first step", "between steps", "at the end"],
)
def test_resume_after_a_signal_in_a_validation_leaves_out_the_rest_of_it(
    pool, settings_of, layout, number, steps, measured
):
    """No further batch and no further step: who sends a signal does not wait for long."""
    keys = {"training": {"steps": 4, "local_batch_size": 2}, "validation": {"enable": True, "freq": 2, "steps": 2}}
    settings = settings_of(layout, **keys)
    stopped = pool.run(2, interrupted_validation, settings, number)
    (first, read), (second, read_by_other) = stopped
    assert [first.stopped_by, second.stopped_by] == ["a signal on another rank", "SIGTERM"]
    assert read == read_by_other and len(read) == number
    assert read[-1] == 2 < min([*read[:-1], 3])
    assert (steps_of(first), steps_of(first, "validation")) == (list(range(1, steps + 1)), measured)
    assert checkpoints(settings) == [f"step-{steps}"] * (steps > 0)
    straight, going_on = (pool.run(2, start, settings_of(layout, name, **keys)) for name in ("straight", "run"))
    assert [found.state for found in going_on] == [found.state for found in straight]


def stop_by(rank: int, world: int, settings: TrainSettings, numbers: list[int]) -> tuple[Leg, list[Any]]:
    found = leg(settings, signals={2: numbers})
    return found, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT],
        [signal.SIGUSR1],
        # A batch system tells every process, and torchrun passes on what it was told itself.
        [signal.SIGTERM, signal.SIGTERM, signal.SIGTERM],
        [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT],
    ],
    ids=lambda numbers: " ".join(signal.Signals(number).name for number in numbers),
)
def test_resume_is_possible_after_any_signal(pool, settings_of, numbers):
    settings = settings_of()
    found, handlers = pool.run(1, stop_by, settings, numbers)[0]
    assert (found.stopped_by, found.step, checkpoints(settings)) == (signal.Signals(numbers[0]).name, 2, ["step-2"])
    assert handlers == [signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL], "they are given back"


def end_by_two_interrupts(rank: int, world: int, settings: TrainSettings) -> None:
    with pytest.raises(KeyboardInterrupt):
        leg(settings, signals={6: [signal.SIGINT, signal.SIGINT]})
    assert gc.isenabled(), "a run that fails leaves the process as it found it"


def test_resume_after_a_crash_takes_the_lost_steps_again(pool, settings_of):
    """A second Ctrl-C ends the run at once, in its sixth step and with the fourth on disk."""
    straight = pool.run(1, start, settings_of(name="straight"))[0]
    settings = settings_of(checkpoint={"interval": 4})
    pool.run(1, end_by_two_interrupts, settings)
    assert checkpoints(settings) == ["step-4"]
    found = pool.run(1, start, settings)[0]
    assert found.read == straight.read[4:]
    assert (found.state, found.numbers()) == (straight.state, straight.numbers())
    assert steps_of(found) == [1, 2, 3, 4, 5, 6]
    rolled_back = (settings.job.folder / "metrics.rolled_back.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in rolled_back] == [5]


def test_resume_passes_over_a_damaged_checkpoint_and_replays(pool, settings_of):
    settings = settings_of("ring 2", checkpoint={"interval": 2})
    first = pool.run(2, start, settings)
    assert checkpoints(settings) == ["step-2", "step-4", "step-6"]
    shard = settings.job.folder / "checkpoint" / "step-6" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = pool.run(2, start, settings)
    assert "step-6 is damaged and not used: __1_0.distcp" in again[0].log
    for before, after in zip(first, again, strict=True):
        assert after.read == before.read[4:]
        assert after.state == before.state
    assert again[0].numbers() == first[0].numbers()
    assert steps_of(again[0]) == [1, 2, 3, 4, 5, 6]
    # What was replayed is saved again, so that the next start finds it.
    assert "resumed from" in pool.run(2, start, settings)[0].log and checkpoints(settings)[-1] == "step-6"


def test_resume_of_a_gradient_that_is_not_finite_before_any_checkpoint(pool, settings_of):
    settings = settings_of("fsdp 2", checkpoint={"interval": 4})
    for found in pool.run(2, start, settings, on_rank=1, poisoned=1):
        assert "were not updated; no checkpoint was saved yet. Lower optimizer.lr" in found.error


def test_resume_after_a_gradient_that_is_not_finite(pool, settings_of):
    """A loss of nan on one rank stops all of them; weights, moments and checkpoints stay as they were."""
    straight = pool.run(2, start, settings_of("fsdp 2", "straight"))
    before = pool.run(2, start, settings_of("fsdp 2", "before", training={"steps": 4}))
    settings = settings_of("fsdp 2", checkpoint={"interval": 4})
    for rank, found in enumerate(pool.run(2, start, settings, on_rank=1, poisoned=5)):
        assert found.error == (
            "step 5: the gradient norm is nan, so the weights were not updated; the last checkpoint is step 4. "
            "Lower optimizer.lr or look at the data"
        )
        assert found.step == 4
        assert found.state == before[rank].state
        assert rank > 0 or steps_of(found) == [1, 2, 3, 4]
    assert checkpoints(settings) == ["step-4"]
    for found, whole in zip(pool.run(2, start, settings), straight, strict=True):
        assert found.read == whole.read[4:]
        assert found.state == whole.state


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(rank: int, world: int, variants: list[TrainSettings]) -> list[str]:
    messages = []
    for settings in variants:
        with pytest.raises(ValueError, match="cannot resume") as caught:
            Trainer(settings, torch.device("cpu"))
        messages.append(str(caught.value))
    return messages


def test_resume_with_other_data_or_another_model_is_refused_by_name(pool, settings_of, tmp_path):
    (tmp_path / "other").mkdir()
    other_text = write_text(tmp_path / "other", num_files=20)
    settings = settings_of("ring 2", training={"steps": 1})
    pool.run(2, start, settings)
    files = contents(settings.job.folder)
    variants = {
        "data.seed = 3 (here 4)": {"data": {"seed": 4}},
        "data.seed = 3 (here 5)": {"debug": {"seed": 5}},
        "data.validation_fraction = 0.1 (here 0.2)": {"data": {"validation_fraction": 0.2}},
        "data.fingerprint = ": {"data": {"paths": (other_text,)}},
        "layers.0.attention.wq.weight (float64[32, 32] in the checkpoint, float64[16, 16] here)": {
            "model": {"dim": 16}
        },
        "not in the checkpoint: model.layers.2.": {"model": {"num_layers": 3}},
    }
    for messages in pool.run(2, refused, [settings_of("ring 2", **keys) for keys in variants.values()]):
        for told, message in zip(variants, messages, strict=True):
            assert told in message
            assert "another job.name" in message
    assert contents(settings.job.folder) == files


def test_resume_with_another_shape_is_warned_of_by_key(caplog):
    shape = TrainSettings(model=ModelConfig(flavor="llama3.2-1b")).shape(512)
    ours, older = plain_shape(shape, DataConfig()), dataclasses.asdict(shape)
    with caplog.at_level(logging.WARNING):
        for theirs in (ours, {}, json.loads(json.dumps(older))):
            warn_of_other_shape(ours, theirs)
        assert not caplog.records
        warn_of_other_shape({**ours, "rope_theta": 2.0}, ours)
    (record,) = caplog.records
    assert record.getMessage().endswith(f": rope_theta = {shape.rope_theta} (here 2.0)")


def test_resume_with_other_document_masks_is_warned_of_by_key(pool, settings_of):
    pool.run(1, start, settings_of("one rank", training={"steps": 1}))
    found = pool.run(1, start, settings_of("one rank", training={"steps": 2}, data={"document_mask": False}))
    masks, positions = (f"data.{key} = true (here false)" for key in ("document_mask", "reset_positions"))
    assert f"resuming a model that was trained with other settings: {masks}, {positions}" in found[0].log


def test_resume_warns_of_a_model_that_only_its_tensors_match(pool, settings_of):
    pool.run(2, start, settings_of("ring 2", training={"steps": 1}))
    found = pool.run(2, start, settings_of("ring 2", training={"steps": 2}, model={"rope_theta": 2.0}))
    warning = "resuming a model that was trained with other settings: rope_theta = "
    assert warning in found[0].log and "(here 2.0)" in found[0].log
    assert warning not in found[1].log
    assert (
        warning
        not in pool.run(2, start, settings_of("ring 2", training={"steps": 3}, model={"rope_theta": 2.0}))[0].log
    )


@pytest.mark.parametrize(
    ("step", "scheduler", "steps", "differs"),
    [
        (180, {}, 360, "lr_scheduler.total_steps = 180 (here 360)"),
        (180, {"total_steps": 180}, 360, ""),
        (180, {"warmup_steps": 30, "decay_ratio": 0.5}, 180, ""),  # both have come to the end
        (60, {"decay_type": "linear"}, 180, "lr_scheduler.decay_type = cosine (here linear)"),
        (10, {}, 360, ""),  # still in the warm-up, which is the same
    ],
)
def test_resume_with_a_learning_rate_that_jumps_is_warned_of_by_key(caplog, step, scheduler, steps, differs):
    def schedule(steps, **keys):
        settings = TrainSettings(
            training=TrainingConfig(steps=steps), lr_scheduler=LRSchedulerConfig(**{"warmup_steps": 20} | keys)
        )
        return json.loads(json.dumps(plain_schedule(settings, step)))

    with caplog.at_level(logging.WARNING):
        warn_of_other_schedule(schedule(steps, **scheduler), {})
        assert not caplog.records
        warn_of_other_schedule(schedule(steps, **scheduler), schedule(180))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == bool(differs)
    assert all(f": {differs}; " in message and "lr_scheduler.total_steps from the start" in message for message in told)


def test_resume_warns_of_a_schedule_that_grows_with_the_steps(pool, settings_of):
    def found(steps, total_steps):
        settings = settings_of("ring 2", training={"steps": steps}, lr_scheduler={"total_steps": total_steps})
        return [leg.log for leg in pool.run(2, start, settings)]

    warning = "the learning rate does not go on where it was"
    found(4, "auto")
    assert not any(warning in log for log in found(5, 4))
    grown = found(6, "auto")
    assert "at step 5" in grown[0] and "lr_scheduler.total_steps = 4 (here 6)" in grown[0]
    assert warning in grown[0] and warning not in grown[1]


def folder_refusals(rank: int, world: int, settings: TrainSettings) -> str:
    with pytest.raises(ValueError, match="that you may write") as caught:
        Trainer(settings, torch.device("cpu"))
    return str(caught.value)


def test_resume_has_a_folder_that_can_be_written_before_the_first_step(pool, settings_of):
    settings = settings_of("ring 2", checkpoint={"folder": __file__})
    assert set(pool.run(2, folder_refusals, settings)) == {
        f"{__file__}: File exists; set checkpoint.folder to a folder that you may write"
    }


def busy_refusals(rank: int, world: int, settings: TrainSettings) -> str:
    with mock.patch("cptrain.train.folder.PATIENCE_S", 0.2):
        first = Trainer(settings, torch.device("cpu"))
        with first, pytest.raises(ValueError, match="writes here; wait for its end") as caught:
            Trainer(settings, torch.device("cpu"))
        Trainer(settings, torch.device("cpu")).close()
        # nor is it held by one that was refused for something else
        with pytest.raises(ValueError, match="nowhere") as held:
            Trainer(
                dataclasses.replace(settings, data=dataclasses.replace(settings.data, paths=("nowhere",))),
                torch.device("cpu"),
            )
        Trainer(settings, torch.device("cpu")).close()
        del held, first
    return str(caught.value)


def test_resume_refuses_a_folder_that_another_run_writes_into(pool, settings_of):
    settings = settings_of("ring 2")
    (refusal,) = set(pool.run(2, busy_refusals, settings))
    assert refusal.startswith(f"{settings.job.folder}: process ")


def test_resume_saves_where_the_folder_of_checkpoints_is_held_by_itself(pool, settings_of, tmp_path):
    pool.run(2, start, settings_of("ring 2", training={"steps": 1}, checkpoint={"folder": str(tmp_path)}))
    assert {path.name for path in tmp_path.iterdir()} >= {"step-1", "run.lock", ".lock"}


# --- validation -------------------------------------------------------------------------------------------------------


def test_resume_and_training_do_not_notice_a_validation(pool, settings_of):
    without = pool.run(2, start, settings_of("fsdp 2", "without"))
    settings = settings_of("fsdp 2", "with", validation={"enable": True, "freq": 1, "steps": 2})
    with_it = pool.run(2, start, settings)
    assert steps_of(with_it[0], "validation") == [0, 1, 2, 3, 4, 5, 6]
    assert len(set(with_it[0].numbers("validation").values())) == 7
    assert with_it[0].numbers() == without[0].numbers()
    for some, none in zip(with_it, without, strict=True):
        assert (some.read, some.drawn, some.state) == (none.read, none.drawn, none.state)
