"""Small training runs for tests: a text to learn, settings in fp64, and the losses and weights that come out."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from cptrain.checkpoint.settings import CheckpointConfig
from cptrain.data.settings import DataConfig
from cptrain.distributed.settings import ParallelismConfig
from cptrain.metrics.settings import MetricsConfig
from cptrain.models.settings import ModelConfig
from cptrain.optim.settings import LRSchedulerConfig, OptimizerConfig
from cptrain.parallel.settings import ActivationCheckpointConfig
from cptrain.train.settings import DebugConfig, JobConfig, TrainingConfig, TrainSettings, ValidationConfig
from cptrain.train.trainer import Trainer

GLOBAL_BATCH = 8


def write_text(folder: Path, *, num_files: int = 30) -> str:
    """Files of words in `folder`, and the glob that finds them."""
    chance = random.Random(0)
    words = ["ring", "rank", "shard", "token", "chunk", "hop", "axis", "head", "mask", "block"]
    for number in range(num_files):
        text = " ".join(chance.choice(words) for _ in range(chance.randint(40, 300)))
        (folder / f"{number}.txt").write_text(text)
    return str(folder / "*.txt")


def small_settings(folder: Path, text: str, **sections: dict[str, Any]) -> TrainSettings:
    """A two-layer model in fp64 on 64 tokens; `sections` replace single keys, as in parallelism={"ring_degree": 2}."""
    settings = TrainSettings(
        job=JobConfig(name="run", dump_folder=str(folder)),
        model=ModelConfig(dim=32, num_layers=2, num_heads=8, num_kv_heads=4, ffn_dim=64, rope_theta=10000.0),
        data=DataConfig(source="text", paths=(text,), validation_fraction=0.1, cache_dir=str(folder / "cache")),
        training=TrainingConfig(seq_len=64, steps=10, global_batch_size=GLOBAL_BATCH, dtype="float64"),
        optimizer=OptimizerConfig(lr=1e-2),
        lr_scheduler=LRSchedulerConfig(warmup_steps=3),
        activation_checkpoint=ActivationCheckpointConfig(mode="none"),
        checkpoint=CheckpointConfig(enable=False),
        validation=ValidationConfig(freq=1000, steps=2),
        metrics=MetricsConfig(enable_tensorboard=False),
        parallelism=ParallelismConfig(),
        debug=DebugConfig(seed=3, startup_check=False),
    )
    for section, keys in sections.items():
        settings = dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **keys)})
    return settings


@dataclasses.dataclass
class Outcome:
    """What a run leaves: loss, gradient norm and held-out loss by step, final weights by plain name, in full."""

    losses: list[float]
    grad_norms: list[float]
    validation: list[float]
    weights: dict[str, np.ndarray]


def train(settings: TrainSettings, device: torch.device | None = None) -> Outcome | None:
    """Run to the end on every rank of the default group; the outcome on rank 0."""
    with Trainer(settings, device or torch.device("cpu")) as trainer:
        trainer.train()
        weights = {}
        for name, parameter in trainer.model.state_dict().items():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            weights[name.replace("_checkpoint_wrapped_module.", "")] = whole.cpu().numpy().copy()
    if trainer.rank > 0:
        return None
    records = [json.loads(line) for line in (settings.job.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    return Outcome(
        losses=[record["loss"] for record in steps],
        grad_norms=[record["grad_norm"] for record in steps],
        validation=[record["loss"] for record in records if record["kind"] == "validation"],
        weights=weights,
    )


def assert_same_training(actual: Outcome, expected: Outcome, *, atol: float = 1e-10) -> None:
    """Losses, gradient norms and weights agree to `atol`."""
    for name in ("losses", "grad_norms", "validation"):
        a, e = np.array(getattr(actual, name)), np.array(getattr(expected, name))
        assert a.shape == e.shape and (a.size or name == "validation"), name
        assert np.abs(a - e).max(initial=0) <= atol, f"{name}: {a} against {e}"
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        error = np.abs(actual.weights[name] - weight).max()
        assert error <= atol, f"{name}: largest difference {error:.2e}"
