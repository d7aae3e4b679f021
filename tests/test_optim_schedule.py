from __future__ import annotations

import itertools
import math

import pytest

from cptrain.optim.schedule import learning_rate
from cptrain.optim.settings import LRSchedulerConfig, OptimizerConfig


def rates(total: int, **settings: object) -> list[float]:
    config = LRSchedulerConfig(**settings)
    assert not list(config.problems())
    return [learning_rate(step, config, lr=2.0, total_steps=total) for step in range(1, total + 1)]


def test_schedule_warm_up_starts_at_a_share_and_ends_at_the_peak():
    assert rates(6, warmup_steps=4, decay_type="constant") == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_schedule_linear_ends_at_the_floor_on_the_last_step():
    assert rates(6, warmup_steps=2, decay_type="linear", min_lr_factor=0.5) == [1.0, 2.0, 1.75, 1.5, 1.25, 1.0]


def test_schedule_cosine_is_half_way_in_the_middle_of_the_decay():
    curve = rates(10, warmup_steps=2, decay_type="cosine", min_lr_factor=0.2)
    assert curve[5] == pytest.approx(2.0 * 0.6)
    assert curve[3] == pytest.approx(2.0 * (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2))
    assert curve[-1] == 2.0 * 0.2


def test_schedule_sqrt_falls_fast_first():
    assert rates(4, warmup_steps=0, decay_type="sqrt", min_lr_factor=0.0) == pytest.approx(
        [1.0, 2 - math.sqrt(2), 2 - math.sqrt(3), 0.0]
    )


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "sqrt"])
def test_schedule_stable_phase_lasts_until_the_decaying_share(decay_type):
    curve = rates(20, warmup_steps=4, decay_type=decay_type, decay_ratio=0.25, min_lr_factor=0.1)
    assert curve[3:15] == [2.0] * 12
    assert all(a > b for a, b in itertools.pairwise(curve[14:]))
    assert curve[-1] == 2.0 * 0.1


def test_schedule_stable_phase_never_cuts_into_the_warm_up():
    assert rates(6, warmup_steps=4, decay_type="linear", decay_ratio=1.0, min_lr_factor=0.0) == [0.5, 1, 1.5, 2, 1, 0]


def test_schedule_run_shorter_than_its_warm_up_only_rises():
    assert rates(3, warmup_steps=4) == [0.5, 1.0, 1.5]


def test_schedule_own_total_steps_let_a_run_stop_early_unchanged():
    whole = rates(20, warmup_steps=2)
    assert rates(7, warmup_steps=2, total_steps=20) == whole[:7]
    assert rates(7, warmup_steps=2) != whole[:7]


def test_schedule_stays_at_the_floor_after_the_end():
    config = LRSchedulerConfig(warmup_steps=0, min_lr_factor=0.25)
    assert learning_rate(1000, config, lr=2.0, total_steps=10) == 0.5


def test_schedule_refuses_step_zero():
    with pytest.raises(ValueError, match="numbered from 1"):
        learning_rate(0, LRSchedulerConfig(), lr=1.0, total_steps=10)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("warmup_steps", {"warmup_steps": -1}),
        ("total_steps", {"total_steps": 0}),
        ("decay_ratio", {"decay_ratio": 0.0}),
        ("decay_ratio", {"decay_ratio": 1.5}),
        ("decay_ratio", {"decay_ratio": 0.5, "decay_type": "constant"}),
        ("min_lr_factor", {"min_lr_factor": 1.5}),
        ("min_lr_factor", {"min_lr_factor": math.nan}),
    ],
)
def test_schedule_settings_name_the_wrong_key(key, settings):
    assert [problem.key for problem in LRSchedulerConfig(**settings).problems()] == [key]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("lr", math.inf),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
    ],
)
def test_optim_settings_name_the_wrong_key(key, value):
    assert [problem.key for problem in OptimizerConfig(**{key: value}).problems()] == [key]


def test_optim_default_settings_have_no_problems():
    assert not [*OptimizerConfig().problems(), *LRSchedulerConfig().problems()]
