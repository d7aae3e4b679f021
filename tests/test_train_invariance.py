"""The same losses and weights however the ranks are divided, whatever is recomputed or accumulated."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from runs import GLOBAL_BATCH, Outcome, assert_same_training, small_settings, train, write_text

from cptrain.train.settings import TrainSettings

MODES = ("none", "selective", "full")
ACCUMULATION = (1, 2)
MASK = {True: "documents", False: "causal"}
FACTORISATIONS = {
    "fsdp 4": (4, {"data_parallel_shard_degree": 4}),
    "ring 4": (4, {"ring_degree": 4}),
    "ulysses 4": (4, {"ulysses_degree": 4}),
    "ring 2 x ulysses 2": (4, {"ring_degree": 2, "ulysses_degree": 2}),
    "ring 2 x tp 2": (4, {"ring_degree": 2, "tensor_parallel_degree": 2}),
    "dp_replicate 2 x ring 2": (4, {"data_parallel_replicate_degree": 2, "ring_degree": 2}),
    "ring 2 x ulysses 2 x tp 2": (8, {"ring_degree": 2, "ulysses_degree": 2, "tensor_parallel_degree": 2}),
}


def train_each(rank: int, world: int, variants: list[TrainSettings]) -> list[Outcome | None]:
    return [train(settings) for settings in variants]


def variants(folder: Path, text: str, degrees: dict[str, int], world: int) -> dict[str, TrainSettings]:
    """All six, one of them with plain causal attention: another one for every factorisation.

    The first alone measures the held-out loss, which neither recomputation nor accumulation has a part in.
    """
    context = degrees.get("ring_degree", 1) * degrees.get("ulysses_degree", 1)
    data = world // (context * degrees.get("tensor_parallel_degree", 1))
    cases = list(itertools.product(MODES, ACCUMULATION))
    # FSDP alone knows nothing of masks.
    causal = cases[[other for _, other in FACTORISATIONS.values()].index(degrees) % 6] if context > 1 else None
    return {
        f"{MASK[case != causal]}, checkpointing {mode}, accumulation {accumulation}": small_settings(
            folder / f"{mode}-{accumulation}",
            text,
            parallelism={
                **degrees,
                "fsdp_reduce_each_microbatch": mode == "full",
                "fsdp_reshard_after_forward": mode != "selective",
            },
            activation_checkpoint={"mode": mode},
            training={"local_batch_size": GLOBAL_BATCH // (data * accumulation)},
            validation={"enable": case == cases[0]},
            data={"cache_dir": str(folder / "cache"), "document_mask": case != causal},
        )
        for case in cases
        for mode, accumulation in [case]
    }


def assert_same_trainings(runs: dict[str, TrainSettings], outcomes: list[Outcome], one_rank: dict[str, Outcome]):
    """Each run is the one of its mask on one rank."""
    for (name, settings), outcome in zip(runs.items(), outcomes, strict=True):
        expected = one_rank[name.partition(",")[0]]
        if not settings.validation.enable:
            expected = dataclasses.replace(expected, validation=[])
        try:
            assert_same_training(outcome, expected)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def one_rank(pool, text, tmp_path_factory) -> dict[str, Outcome]:
    """Ten steps on one rank with nothing recomputed and nothing accumulated, by mask."""
    outcomes = {}
    for masks, name in MASK.items():
        folder, keys = tmp_path_factory.mktemp("one-rank"), {"document_mask": masks}
        settings = small_settings(folder, text, training={"local_batch_size": GLOBAL_BATCH}, data=keys)
        outcome = pool.run(1, train_each, [settings])[0][0]
        assert outcome.losses[-1] < outcome.losses[0] - 0.5, "the run must learn, or equal losses mean little"
        outcomes[name] = outcome
    losses = [outcome.losses for outcome in outcomes.values()]
    assert abs(losses[0][-1] - losses[1][-1]) > 1e-4, "documents must make a difference, or equal losses mean little"
    return outcomes


def test_training_on_one_rank_is_the_same_with_recompute_and_accumulation(pool, one_rank, text, tmp_path):
    runs = variants(tmp_path, text, {}, 1)
    assert_same_trainings(runs, pool.run(1, train_each, list(runs.values()))[0], one_rank)


@pytest.mark.parametrize("name", FACTORISATIONS)
def test_training_is_the_same_for_every_factorisation(pool, one_rank, text, tmp_path, name):
    world, degrees = FACTORISATIONS[name]
    runs = variants(tmp_path, text, degrees, world)
    assert_same_trainings(runs, pool.run(world, train_each, list(runs.values()))[0], one_rank)
