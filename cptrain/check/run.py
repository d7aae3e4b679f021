"""All checks of a configuration, on the ranks that this process is one of."""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from cptrain.check.flow import check_flow
from cptrain.check.layers import methods_by_layer
from cptrain.check.leak import check_leak
from cptrain.check.messages import check_messages
from cptrain.check.positions import check_rotary_positions
from cptrain.check.step import check_step
from cptrain.check.toy import ToyTrainer, distinct_plans, real_shape, toy_settings
from cptrain.context_parallel.finding import Finding, agreed, table
from cptrain.context_parallel.selfcheck import Sizes, check_attention, check_positions, cuts_of
from cptrain.distributed.device import local_device
from cptrain.distributed.process_group import process_group
from cptrain.train.run import worded
from cptrain.train.settings import TrainSettings
from cptrain.train.startup import title


def run(settings: TrainSettings, show: Callable[[str], None]) -> bool:
    """Check on the ranks of the launcher and `show` the tables on rank 0; whether everything passed.

    Combinations that are refused end the process with 2, without a traceback.
    """
    # Gathering a gradient that FSDP2 and tensor parallel cut takes two collectives, of which torch warns on every rank.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    with ExitStack() as ends:
        with worded():
            device = local_device()
            ends.enter_context(process_group(settings.comm, device))
        passed = True
        with worded():
            for heading, findings in check(settings, device):
                passed &= all(finding.passed for finding in findings)
                if dist.get_rank() == 0:
                    show(f"{heading}\n\n{table(findings)}\n")
        if dist.get_rank() == 0:
            show("all checks passed" if passed else "FAILED: training with this configuration would not be exact")
    return passed


def check(settings: TrainSettings, device: torch.device) -> Iterator[tuple[str, list[Finding]]]:
    """A heading and the findings of each plan of the run, agreed by all ranks. Collective over the default group.

    A run whose stages divide the ranks anew has several plans; each is checked after the switch that training makes.
    """
    start = time.perf_counter()
    shape = real_shape(settings)
    with tempfile.TemporaryDirectory(prefix="cptrain-check-") as folder:
        toy = toy_settings(settings, world_size=dist.get_world_size(), device=device, folder=Path(folder))
        with ToyTrainer(toy, device) as trainer:
            for index, stage in enumerate(distinct_plans(settings, dist.get_world_size())):
                trainer.enter(index)
                findings = agreed(_findings(trainer), device)
                lines = methods_by_layer(trainer.stage.context, shape, settings.at_stage(stage).training.seq_len)
                yield "\n".join([_heading(trainer, time.perf_counter() - start), *lines]), findings
                start = time.perf_counter()


def _findings(trainer: ToyTrainer) -> list[Finding]:
    plan, degrees, shape = trainer.stage.context, trainer.stage.meshes.degrees, trainer.shape
    sizes = Sizes(
        length=trainer.stage.settings.training.seq_len,
        heads=shape.num_heads // degrees.tp,
        kv_heads=shape.num_kv_heads // degrees.tp,
        head_dim=shape.head_dim,
        dtype=trainer.precision.param,
    )
    cuts = [cuts_of(plan, mask, sizes.length) for mask in dict.fromkeys(trainer.masks)]
    findings = [finding for cut in itertools.chain(*cuts) for finding in check_attention(cut, sizes)]
    findings.append(check_positions(cuts[0][0]))
    findings.append(check_rotary_positions(trainer))
    findings += check_step(trainer)
    findings += check_flow(trainer)
    if trainer.has_documents:
        findings.append(check_leak(trainer))
    findings += check_messages(trainer)
    return findings


def _heading(trainer: ToyTrainer, seconds: float) -> str:
    shape, degrees, settings = trainer.shape, trainer.stage.meshes.degrees, trainer.stage.settings
    axes = ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    mesh = " x ".join(f"{axis} {getattr(degrees, axis)}" for axis in axes)
    return (
        f"{title(trainer.stage.context)} on {degrees.world} x {trainer.device.type} ({mesh})\n"
        f"toy of {shape.num_layers} layers, dim {shape.dim}, {shape.num_heads} heads, {shape.num_kv_heads} kv heads of "
        f"{shape.head_dim}, {settings.training.seq_len} tokens, {str(trainer.precision.param).removeprefix('torch.')}, "
        f"checkpointing {settings.activation_checkpoint.mode}, "
        f"compile {settings.compile.backend if settings.compile.enable else 'off'}: {seconds:.1f} s"
    )
