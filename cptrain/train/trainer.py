"""The trainer: builds a run from its settings and repeats the step."""

from __future__ import annotations

import gc
import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Self

import numpy
import torch
import torch.distributed as dist

from cptrain.checkpoint import rng
from cptrain.checkpoint.checkpointer import Checkpointer
from cptrain.checkpoint.state import training_state
from cptrain.config.document import dump
from cptrain.context_parallel.kernels import choose_kernel
from cptrain.data.loader import SENT
from cptrain.data.tokenizer import build_tokenizer
from cptrain.distributed.mesh import build_meshes
from cptrain.distributed.process_group import first_rank_result, set_timeouts
from cptrain.distributed.shared_gloo import shared_gloo
from cptrain.distributed.standstill import measured_standstill
from cptrain.distributed.transport import gather
from cptrain.loss import IGNORED, cross_entropy_sum
from cptrain.metrics.flops import training_flops
from cptrain.metrics.logger import Metrics
from cptrain.metrics.memory import capacity_bytes
from cptrain.metrics.profiler import profiling
from cptrain.metrics.record import StepRecord
from cptrain.optim.adamw import build_optimizer, set_learning_rate
from cptrain.optim.clip import clip_grad_norm
from cptrain.optim.schedule import learning_rate
from cptrain.parallel.apply import apply_context_parallel, parallelise
from cptrain.train.batch import PACKING, Counts, Shard
from cptrain.train.environment import write_environment
from cptrain.train.evaluation import Evaluation, StoppedError, check_needles_fit
from cptrain.train.folder import Folders
from cptrain.train.interruption import Interruption
from cptrain.train.memory import shortage
from cptrain.train.precision import resolve_precision
from cptrain.train.report import describe, hyper_parameters
from cptrain.train.resume import (
    check_same_data,
    plain_schedule,
    plain_shape,
    warn_of_other_schedule,
    warn_of_other_shape,
)
from cptrain.train.settings import TrainSettings
from cptrain.train.stage import Plan, Stage
from cptrain.train.startup import StartupCheck
from cptrain.train.texts import Texts, open_texts

logger = logging.getLogger("cptrain")


class Trainer:
    """Everything one rank holds during a run. Making one is collective; `train` runs to the end or to a signal.

    ValueError for data and checkpoints that do not fit the settings, on all ranks.
    """

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        random.seed(settings.debug.seed)
        numpy.random.seed(settings.debug.seed % 2**32)
        torch.manual_seed(settings.debug.seed)
        torch.use_deterministic_algorithms(settings.debug.deterministic)

        self.tokenizer = build_tokenizer(settings.tokenizer)
        self.shape = settings.shape(self.tokenizer.vocab_size)
        check_needles_fit(settings, self.tokenizer)
        first = settings.at_stage(0)
        degrees = first.degrees(self.world_size, self.shape)
        meshes = build_meshes(degrees, device, order=settings.parallelism.context_parallel_order)
        self.folders = Folders()
        first_rank_result(partial(self.folders.take, settings))
        with ExitStack() as if_refused:
            if_refused.callback(self.folders.release)
            self.texts = self._open_texts()
            self.precision = resolve_precision(settings.training, device)
            self.parallel = parallelise(
                self.shape,
                meshes,
                parallelism=first.parallelism,
                layout=settings.layout,
                activation_checkpoint=settings.activation_checkpoint,
                compile=settings.compile,
                precision=self.precision,
                seed=settings.debug.seed,
            )
            self.model = self.parallel.model
            self.plan = Plan(first.parallelism, meshes, self.parallel.context)
            self.optimizer = build_optimizer(self.model, settings.optimizer)
            self.startup_check = StartupCheck(
                self.shape, tp=degrees.tp, dtype=self.precision.param, enabled=settings.debug.startup_check
            )

            self.step = 0
            self.tokens_seen = 0
            gloo = dist.new_group(backend=shared_gloo()) if self.world_size > 1 else None
            self._wait_for(settings.comm.init_timeout_seconds)
            self.checkpointer = Checkpointer(settings.checkpoint, settings.job.folder, gloo, mesh=asdict(degrees))
            self.toml = dump(settings)
            data_of_checkpoint = self._resume()
            self.stage_index = settings.stage_of(self.step + 1)
            self.stage = self._make_stage()
            check_same_data(self.stage.windows.identity(), data_of_checkpoint, job=settings.job.name)
            self.metrics = Metrics(
                settings.metrics,
                folder=settings.job.folder,
                rank=self.rank,
                num_devices=self.world_size,
                device=device,
                compute_dtype=self.precision.param,
                total_steps=settings.training.steps,
                resumed_step=self.step,
                toml=self.toml,
                hyper_parameters=hyper_parameters(self.stage.settings, self.stage.meshes.degrees, self.shape),
            )
            if self.rank == 0:
                self._introduce()
            if_refused.pop_all()

    def train(self) -> str:
        """Run until training.steps, or until a signal on any rank; returns the signal's name, or ""."""
        settings, stopped_by = self.settings, ""
        if self.step >= settings.training.steps:
            logger.info(f"step {self.step} of {settings.training.steps} is done already; raise training.steps to go on")
            return ""
        first_step, folder = self.step + 1, settings.job.folder
        with (
            _garbage_kept(),
            Interruption() as interruption,
            profiling(
                settings.profiling, folder=folder, rank=self.rank, device=self.device, resumed_step=self.step
            ) as profiler,
        ):
            if settings.validation.enable and self.step == 0:
                stopped_by = self._measure(interruption)
            while self.step < settings.training.steps and not stopped_by:
                self._enter_stage(settings.stage_of(self.step + 1))
                self.train_step()
                stopped_by = self._signal_on_any_rank(interruption.requested)
                profiler.step()
                finished = self.step == settings.training.steps
                saved = self.checkpointer.due(self.step) or finished or bool(stopped_by)
                if saved:
                    self.save()
                # Who sends a signal may not wait for long: held-out text is left out, or the rest of it.
                measures = settings.validation.enable and (finished or self.step % settings.validation.freq == 0)
                if measures and not stopped_by:
                    stopped_by = self._measure(interruption)
                    if stopped_by and not saved:
                        self.save()
                if self.step % settings.training.gc_freq == 0:
                    gc.collect()
                if self.step == first_step:
                    self._wait_for(settings.comm.train_timeout_seconds)
        return stopped_by

    def train_step(self) -> None:
        """One optimizer step over the global batch."""
        start = time.perf_counter()
        step, settings = self.step + 1, self.settings
        lr = learning_rate(step, settings.lr_scheduler, lr=settings.optimizer.lr, total_steps=settings.training.steps)
        set_learning_rate(self.optimizer, lr)
        batches = [next(self.stage.batches) for _ in range(self.stage.batches.micro_batches)]
        shards = [self.shard(batch) for batch in batches]
        data_time_s = time.perf_counter() - start

        valid_here = sum((shard.labels != IGNORED).sum() for shard in shards)
        valid, counts = self._count(valid_here, batches, shards)
        loss_here = torch.zeros((), dtype=torch.float64, device=self.device)
        due = self.metrics.due(step)
        with measured_standstill(self.device, wanted=due) as standstill:
            for index, shard in enumerate(shards):
                last = index == len(shards) - 1
                self.parallel.set_reduction(last or settings.parallelism.fsdp_reduce_each_microbatch)
                head = partial(cross_entropy_sum, labels=shard.labels)
                with shard.documents_entered():
                    loss = self.model(shard.tokens, shard.positions, head=head)
                    # A sum over the global count: no factor of any degree; ranks without valid tokens take part.
                    (loss / valid).backward()
                loss_here += loss.detach()
        grad_norm = clip_grad_norm(self.model.parameters(), settings.training.max_norm)
        if not math.isfinite(grad_norm.item()):
            latest = self.checkpointer.latest_step()
            raise RuntimeError(
                f"step {step}: the gradient norm is {grad_norm.item()}, so the weights were not updated; "
                f"{'no checkpoint was saved yet' if latest is None else f'the last checkpoint is step {latest}'}. "
                "Lower optimizer.lr or look at the data"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step = step
        self.tokens_seen += self.stage.tokens_per_step
        loss = max_loss = exposed_s = float("nan")
        if due:
            exposed_here = loss_here.new_tensor(standstill.seconds())
            here = torch.stack((loss_here, loss_here / max(int(valid_here), 1), exposed_here))
            losses, means, exposed = gather(here).T.tolist()
            loss = sum(losses[:: self.stage.meshes.degrees.tp]) / valid  # tensor peers hold the same tokens
            max_loss, exposed_s = max(means), sum(exposed) / self.world_size
        step_time_s = time.perf_counter() - start
        points = counts.curves(self.stage.tokens_per_step)
        if self.stage.context.degree > 1:
            points["cp/comm_exposed(%)"] = 100 * exposed_s / step_time_s
        self.metrics.record(
            StepRecord(
                step=step,
                loss=loss,
                max_loss=max_loss,
                grad_norm=grad_norm,
                lr=lr,
                tokens=self.stage.tokens_per_step,
                tokens_seen=self.tokens_seen,
                step_time_s=step_time_s,
                data_time_s=data_time_s,
                flops=training_flops(
                    self.shape, tokens=self.stage.tokens_per_step - counts.padding, pairs=counts.pairs
                ),
                extra=points,
            )
        )

    def shard(self, batch: dict[str, torch.Tensor]) -> Shard:
        """This rank's part of a batch of whole windows [B, S], as DTensors cut along S and taken locally."""
        context = self.stage.context
        packed = context.packed(batch[PACKING]) if PACKING in batch else None
        parts = (packed or context).shard(
            *(batch[key].to(self.device, non_blocking=True) for key in SENT),
            dim=1,
            as_dtensor=True,
        )
        tokens, labels, positions = (part.to_local() for part in parts)
        return Shard(tokens, labels, positions, packed)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        train_state = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "data": self.stage.windows.identity(),
            "model": plain_shape(self.shape, self.settings.data),
            "schedule": plain_schedule(self.settings, self.step),
            "world_size": self.world_size,
        }
        self.checkpointer.save(self.step, self._state(), train_state, self.toml)

    def close(self) -> None:
        """Stop the data workers, write out the metrics and leave the folder to other runs."""
        try:
            self.stage.close()
            self.metrics.close()
        finally:
            self.folders.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _measure(self, interruption: Interruption) -> str:
        """Validate and record it, unless a signal comes first; returns the signal's name, or ""."""

        def stopped() -> bool:
            return bool(self._signal_on_any_rank(interruption.requested))

        evaluation = Evaluation(self.model, self.stage, self.shard, stopped)
        try:
            loss, points = evaluation.held_out_loss()
            self.metrics.validation(self.step, loss, points | evaluation.needles())
        except StoppedError:
            pass
        return self._signal_on_any_rank(interruption.requested)

    def _state(self) -> dict[str, Any]:
        return {**training_state(self.model, self.optimizer), rng.SECTION: rng.capture(self.rank)}

    def _enter_stage(self, index: int) -> None:
        """Put a stage's length, batches and context-parallel plan in place; does nothing inside of one."""
        if index == self.stage_index:
            return
        self.stage.close()
        self.stage_index = index
        self.stage = self._make_stage()
        if self.rank == 0:
            logger.info(f"stage {index + 1} from step {self.step + 1}: {self.stage.summary()}")
            self._warn()

    def _warn(self) -> None:
        stage, warnings = self.stage, [self.stage.warning()]
        if self.device.type == "cuda":
            capacity = capacity_bytes(self.device)
            warnings.append(shortage(stage.settings, stage.meshes.degrees, self.shape, capacity=capacity))
        for warning in filter(None, warnings):
            logger.warning(warning)

    def _make_stage(self) -> Stage:
        """The stage of `stage_index`, for which the model is switched over and checked."""
        before, settings = self.plan, self.settings.at_stage(self.stage_index)
        self.plan = before.changed(settings, self.shape)
        if self.plan.context is not before.context:
            apply_context_parallel(self.model, self.plan.context)
            self._wait_for(self._timeout_s)
        stage = Stage(
            settings,
            self.plan,
            self.texts,
            self.tokenizer,
            self.shape,
            tokens_seen=self.tokens_seen,
            device=self.device,
        )
        self.startup_check(stage.context, stage.settings.training.seq_len)
        return stage

    def _wait_for(self, seconds: int) -> None:
        """Ranks wait so long for each other, in groups that are there: new ones have a timeout of torch's choice."""
        self._timeout_s = seconds
        set_timeouts(seconds)

    def _resume(self) -> dict[str, Any]:
        """Take the state of the newest checkpoint, if there is one; returns what its data were, else nothing."""
        state = self._state()
        found = self.checkpointer.load(state)
        if found is None:
            return {}
        rng.restore(state[rng.SECTION])
        self.step, self.tokens_seen = found["step"], found["tokens_seen"]
        if self.rank == 0:
            warn_of_other_shape(plain_shape(self.shape, self.settings.data), found.get("model", {}))
            warn_of_other_schedule(plain_schedule(self.settings, self.step), found.get("schedule", {}))
        return found["data"]

    def _open_texts(self) -> Texts:
        """What is trained on; rank 0 prepares it, and its errors are raised on all ranks."""
        return open_texts(self.settings.data, self.settings.tokenizer, default_seed=self.settings.debug.seed)

    def _count(
        self, valid_here: torch.Tensor | int, batches: list[dict[str, torch.Tensor]], shards: list[Shard]
    ) -> tuple[int, Counts]:
        """Valid tokens (at least 1) and other counts of the step over all ranks, in one reduction."""
        dtype = self.precision.param
        here = [Counts.of(batch, self.shape, shard.packed, dtype) for batch, shard in zip(batches, shards, strict=True)]
        numbers = torch.tensor([0, *Counts.total(here).to_list()]).to(self.device)
        numbers[0] += valid_here
        valid, *others = self._sum_over_ranks(numbers).tolist()
        degrees = self.stage.meshes.degrees
        # Tensor-parallel peers hold the same tokens, and context-parallel peers read the same batches.
        copies = degrees.tp * degrees.context
        return max(valid // degrees.tp, 1), Counts.from_list([number // copies for number in others])

    def _sum_over_ranks(self, numbers: torch.Tensor) -> torch.Tensor:
        """int64 numbers, summed over all ranks."""
        total = numbers.to(self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def _signal_on_any_rank(self, requested: str) -> str:
        """The signal that this rank was sent, or that another one was; "" where none was. The same question on all."""
        anywhere = bool(self._sum_over_ranks(torch.tensor(int(bool(requested)))))
        return (requested or "a signal on another rank") if anywhere else ""

    def _introduce(self) -> None:
        """Write the run's folder and say what runs."""
        folder = self.settings.job.folder
        (folder / "config.toml").write_text(self.toml, encoding="utf-8")
        write_environment(folder / "environment.json", self.world_size)
        for line in describe(
            self.stage.settings,
            self.stage.meshes.degrees,
            self.shape,
            device_type=self.device.type,
            context_modules=self.parallel.context_modules,
        ).splitlines():
            logger.info(line)
        self._warn()
        choose_kernel(  # which logs its choice
            self.device.type,
            self.precision.param,
            key_dim=self.shape.head_dim,
            packed=self.settings.data.document_mask,
            name=self.settings.parallelism.attention_kernel,
        )


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect no garbage by itself: at a step of Python's own choosing, all ranks would wait for each in turn."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
