"""The root of all settings: `TrainSettings` composes the sections and checks what spans several of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cptrain.checkpoint.settings import CheckpointConfig
from cptrain.config import Problem, setting
from cptrain.data.pass_key import tokens_needed
from cptrain.data.settings import DataConfig, TokenizerConfig
from cptrain.distributed.divide import MOST_CHUNKS, divisors
from cptrain.distributed.settings import (
    CommConfig,
    Degrees,
    Method,
    ParallelismConfig,
    heads_decide,
    resolve_degrees,
    sequence_multiple,
)
from cptrain.metrics.settings import MetricsConfig, ProfilingConfig
from cptrain.models.settings import ModelConfig, known_sizes, resolve
from cptrain.models.shape import ModelShape
from cptrain.optim.settings import LRSchedulerConfig, OptimizerConfig
from cptrain.parallel.settings import ActivationCheckpointConfig, CompileConfig

BYTE_VOCABULARY = 259
VOCABULARY_MULTIPLE = 64  # embedding rows are padded to this, so that tensor parallel cuts them evenly


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What this run is called and where it writes."""

    name: str = setting("train", "folder of this run below dump_folder; the same name resumes the run")
    dump_folder: str = setting("outputs", "folder of all runs")

    def problems(self) -> Iterator[Problem]:
        if not self.name or self.name in (".", "..") or "/" in self.name:
            yield Problem(key="name", rule="must be the name of one folder, without a slash", fix='set it to "train"')
        for key in ("name", "dump_folder"):
            if re.search(r"[\x00-\x1f\x7f]", getattr(self, key)):
                yield Problem(key=key, rule="must not hold control characters", fix="leave them out")
        if not self.dump_folder:
            yield Problem(key="dump_folder", rule="must name a folder", fix='set it to "outputs"')

    @property
    def folder(self) -> Path:
        """Where this run writes everything."""
        return Path(os.path.expanduser(self.dump_folder)) / self.name


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """A part of the run with its own length and division of ranks; "auto" keeps what the run says."""

    steps: int = setting(1, "optimizer steps of this stage; the last stage goes on to training.steps")
    seq_len: int | Literal["auto"] = setting("auto", "tokens of one sequence, global")
    local_batch_size: int | Literal["auto"] = setting("auto", "sequences per data-parallel rank at a time")
    global_batch_size: int | Literal["auto"] = setting("auto", "sequences per step over all ranks")
    context_parallel_method: Method | Literal["same"] = setting("same", 'method, or "same" as in [parallelism]')
    context_parallel_degree: int | Literal["auto"] = setting("auto", "ranks that share one sequence")
    ring_degree: int | Literal["auto"] = setting("auto", "ranks in the ring")
    ulysses_degree: int | Literal["auto"] = setting("auto", "ranks that exchange heads for sequence")

    def problems(self) -> Iterator[Problem]:
        for key in ("steps", "seq_len", "local_batch_size", "global_batch_size"):
            if getattr(self, key) != "auto" and getattr(self, key) < 1:
                yield Problem(key=key, rule="must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, on what lengths and batches, and in which precision."""

    seq_len: int = setting(2048, "tokens of one sequence, always global: before it is cut over ranks")
    steps: int = setting(10000, "optimizer steps of the whole run")
    local_batch_size: int = setting(1, "sequences that one data-parallel rank holds at a time (micro-batch)")
    global_batch_size: int | Literal["auto"] = setting(
        "auto", "sequences per step over all ranks; more than fit at a time are accumulated; auto = no accumulation"
    )
    max_norm: float = setting(1.0, "gradients are scaled down to this global norm")
    dtype: Literal["float32", "float64", "bfloat16"] = setting("float32", "what the optimizer's weights are kept in")
    mixed_precision_param: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "what blocks compute in; auto = bfloat16 on CUDA, training.dtype on CPU"
    )
    mixed_precision_reduce: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "what gradients are summed over ranks in; auto = float32 (float64 for float64)"
    )
    stages: tuple[TrainingStage, ...] = setting((), "[[training.stages]]: parts of the run, one after the other")
    gc_freq: int = setting(50, "steps between two collections of Python's garbage, at the same step on all ranks")

    def compute_dtype(self, device_type: str) -> str:
        """What blocks compute in, with "auto" resolved for "cuda" or "cpu"."""
        if self.mixed_precision_param != "auto":
            return self.mixed_precision_param
        return "bfloat16" if device_type == "cuda" and self.dtype == "float32" else self.dtype

    def problems(self) -> Iterator[Problem]:
        for key in ("seq_len", "steps", "local_batch_size", "gc_freq"):
            if getattr(self, key) < 1:
                yield Problem(key=key, rule="must be at least 1")
        if self.global_batch_size != "auto" and self.global_batch_size < 1:
            yield Problem(key="global_batch_size", rule='must be at least 1, or "auto"')
        if not self.max_norm > 0:
            yield Problem(key="max_norm", rule="must be positive", fix="set it to inf to measure without clipping")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on held-out text."""

    enable: bool = setting(True, "measure the loss on held-out text before the first step, at times, and at the end")
    freq: int = setting(100, "steps between two measurements")
    steps: int = setting(16, "global batches of held-out text, the same ones on any mesh; -1 = all there are")
    needles: int = setting(
        0,
        "windows of held-out text with five digits hidden in each, which its end asks for; the share that is found is "
        "long_context/needle_acc (0: none)",
    )

    def problems(self) -> Iterator[Problem]:
        if self.freq < 1:
            yield Problem(key="freq", rule="must be at least 1 step")
        if self.steps < 1 and self.steps != -1:
            yield Problem(key="steps", rule="must be at least 1, or -1 for all")
        if self.needles < 0:
            yield Problem(key="needles", rule="must not be negative", fix="set it to 0 for none")


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Reproducibility, and what a run checks about itself."""

    seed: int = setting(0, "of the weights and, unless data.seed says otherwise, of the order of the data")
    deterministic: bool = setting(False, "refuse operations whose result may differ from run to run (slower on CUDA)")
    startup_check: bool = setting(
        True,
        "compare attention on these ranks with one process's before the first step (a second), and stop if it differs",
    )

    def problems(self) -> Iterator[Problem]:
        if not 0 <= self.seed < 2**63:
            yield Problem(key="seed", rule="must be between 0 and 2**63 - 1", fix="set it to 0")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything a run is made of."""

    job: JobConfig = JobConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    metrics: MetricsConfig = MetricsConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    comm: CommConfig = CommConfig()
    debug: DebugConfig = DebugConfig()

    def problems(self, world_size: int | None) -> Iterator[Problem]:
        """What is wrong between sections; with world_size None, only what no number of ranks would mend."""
        if self.validation.enable and self.data.validation_fraction == 0:
            yield Problem(
                key="data.validation_fraction",
                rule="validation needs held-out text",
                fix="set it to 0.01, or validation.enable to false",
            )
        if self.validation.enable and self.validation.needles > 0 and self.model.attention_mask == "full":
            yield Problem(
                key="validation.needles",
                rule='with model.attention_mask = "full" the model sees the digits that it is asked for',
                fix="set it to 0",
            )
        yield from self._problems_of_documents()
        for index in range(max(1, len(self.training.stages))):
            for problem in self.at_stage(index)._problems_of_needles():
                yield self._at_stage(index, problem)
        # What is wrong inside of a section is said by it; only checks that rest on such a key are left out.
        ids = self.known_vocabulary
        sizes = known_sizes(self.model, _padded(ids))
        if 0 < sizes["vocab_size"] < ids:
            yield Problem(key="model.vocab_size", rule=f"the tokenizer has {ids} ids", fix=f"set it to {ids} or more")
            sizes["vocab_size"] = 0
        if world_size is None:
            return
        if any(problem.key != "chunk_size" for problem in self.parallelism.problems()):
            return
        heads_known = sizes["num_heads"] > 0 and sizes["num_kv_heads"] > 0
        for index in range(max(1, len(self.training.stages))):
            stage = self.at_stage(index)
            degrees, found = resolve_degrees(
                stage.parallelism,
                world_size=world_size,
                num_heads=sizes["num_heads"] if heads_known else 0,
                num_kv_heads=sizes["num_kv_heads"] if heads_known else 0,
                windowed=sizes["window_size"] > 0 and sizes["full_attention_every"] != 1,
            )
            found = [replace(problem, key=f"parallelism.{problem.key}") for problem in found]
            if degrees is not None:
                lengths = stage._problems_of_lengths(degrees)
                ring_known = heads_known or not heads_decide(stage.parallelism)
                found += [problem for problem in lengths if ring_known or problem.key != "parallelism.chunk_size"]
                found += _problems_of_widths(degrees.tp, ffn_dim=sizes["ffn_dim"], vocab_size=sizes["vocab_size"])
                if degrees.world == world_size:  # or it is not known how many ranks read different data
                    found += stage._problems_of_batches(degrees)
            yield from (self._at_stage(index, problem) for problem in found)

    def _at_stage(self, index: int, problem: Problem) -> Problem:
        """The problem by the key of a stage where the stage sets it, else by the run's own, with the stage named."""
        if not self.training.stages:
            return problem
        name = problem.key.partition(".")[2]
        if getattr(self.training.stages[index], name, "auto") not in ("auto", "same"):
            return replace(problem, key=f"training.stages[{index}].{name}")
        return replace(problem, rule=f"in training.stages[{index}]: {problem.rule}")

    @property
    def layout(self) -> Literal["zigzag", "contiguous", "balanced"]:
        """Which tokens a rank holds, "auto" resolved."""
        layout = self.parallelism.context_parallel_layout
        if layout == "auto":
            return "balanced" if self.data.document_mask else "zigzag"
        return layout

    def _problems_of_documents(self) -> Iterator[Problem]:
        """What document masks do not go together with, and the layout that is for them alone."""
        masks = self.data.document_mask
        if masks and self.layout != "balanced":
            yield Problem(
                key="parallelism.context_parallel_layout",
                rule="documents that see only themselves are uneven work, which the balanced layout deals out",
                fix='set it to "auto", or data.document_mask to false',
            )
        if not masks and self.layout == "balanced":
            yield Problem(
                key="parallelism.context_parallel_layout",
                rule="the balanced layout deals out documents that see only themselves",
                fix='set it to "zigzag", or data.document_mask to true',
            )
        if masks and self.model.attention_mask == "full":
            yield Problem(
                key="data.document_mask",
                rule='attention inside of documents is causal, but model.attention_mask = "full"',
                fix="set it to false",
            )
        if not masks and self.parallelism.chunk_size != "auto":
            yield Problem(
                key="parallelism.chunk_size",
                rule="has no effect with data.document_mask = false, which deals no chunks out",
                fix="leave it out",
            )

    def at_stage(self, index: int) -> TrainSettings:
        """The settings as they are during a stage: its length, batch and degrees put in, no stages left."""
        if not self.training.stages:
            return self
        stage = self.training.stages[index]
        lengths = {key: getattr(stage, key) for key in ("seq_len", "local_batch_size", "global_batch_size")}
        training = replace(
            self.training, stages=(), **{key: value for key, value in lengths.items() if value != "auto"}
        )
        parallelism = self.parallelism
        keys = ("context_parallel_degree", "ring_degree", "ulysses_degree")
        given = {key: getattr(stage, key) for key in keys}
        if any(value != "auto" for value in given.values()):
            # Degrees of a stage replace those of the run as a whole, and data parallel takes the ranks that they leave.
            parallelism = replace(parallelism, data_parallel_shard_degree=-1, ring_inner_degree=1, **given)
            if parallelism.context_parallel_method != "all_gather":
                parallelism = replace(parallelism, context_parallel_method="auto")
        if stage.context_parallel_method != "same":
            parallelism = replace(parallelism, context_parallel_method=stage.context_parallel_method)
        return replace(self, training=training, parallelism=parallelism)

    def stage_of(self, step: int) -> int:
        """Which stage optimizer step `step` (from 1) belongs to; 0 for a run without stages."""
        end = 0
        for index, stage in enumerate(self.training.stages):
            end += stage.steps
            if step <= end:
                return index
        return max(0, len(self.training.stages) - 1)

    def _problems_of_lengths(self, degrees: Degrees) -> Iterator[Problem]:
        multiple, length = sequence_multiple(degrees), self.training.seq_len
        if length > 0 and length % multiple:
            below, above = length // multiple * multiple, -(-length // multiple) * multiple
            yield Problem(
                key="training.seq_len",
                rule=f"must be a multiple of {multiple} = context degree {degrees.context} x lcm(2, tensor degree "
                f"{degrees.tp})"
                if degrees.context > 1
                else f"must be a multiple of the tensor degree {degrees.tp}",
                fix=f"set it to {f'{below} or {above}' if below else above}",
            )
        chunk_size = self.parallelism.chunk_size if self.data.document_mask else "auto"
        if chunk_size != "auto" and chunk_size > 0 and length > 0 and length % degrees.ring == 0:
            held = length // degrees.ring
            if held % chunk_size or held // chunk_size > MOST_CHUNKS:
                fitting = [divisor for divisor in divisors(held) if held // divisor <= MOST_CHUNKS]
                nearest = min(fitting, key=lambda size: max(size / chunk_size, chunk_size / size))
                yield Problem(
                    key="parallelism.chunk_size",
                    rule=f"must divide the {held} tokens of a sequence that a ring rank holds, into {MOST_CHUNKS} "
                    "chunks at most",
                    fix=f"set it to {nearest}, or leave it out",
                )

    def _problems_of_needles(self) -> Iterator[Problem]:
        """Windows too short for a needle, as far as the tokenizer is known."""
        if not (self.validation.enable and self.validation.needles > 0 and self.known_vocabulary):
            return
        needed = tokens_needed(len)  # the sentences are ASCII, of which the byte tokenizer makes a token each
        if 0 < self.training.seq_len < needed:
            yield Problem(
                key="training.seq_len",
                rule=f"a window with a needle needs {needed} tokens",
                fix="set it to that or more, or validation.needles to 0",
            )

    def _problems_of_batches(self, degrees: Degrees) -> Iterator[Problem]:
        at_a_time, global_batch = self.training.local_batch_size * degrees.data, self.training.global_batch_size
        if global_batch != "auto" and at_a_time > 0 and global_batch > 0 and global_batch % at_a_time:
            yield Problem(
                key="training.global_batch_size",
                rule=f"must be a multiple of local_batch_size {self.training.local_batch_size} x {degrees.data} "
                "data-parallel ranks",
                fix=f"set it to {-(-global_batch // at_a_time) * at_a_time}",
            )

    @property
    def known_vocabulary(self) -> int:
        """Ids of the tokenizer, 0 where it has to be built to know them."""
        return BYTE_VOCABULARY if self.tokenizer.name == "byte" else 0

    def shape(self, vocabulary: int) -> ModelShape:
        """The model for a tokenizer with this many ids; ValueError if its embedding is too small for them.

        With 0 ids, which is to say that they are not known, an embedding as large as they are has no rows.
        """
        return resolve(self.model, _padded(vocabulary) if self.model.vocab_size == "auto" else vocabulary)

    def degrees(self, world_size: int, shape: ModelShape) -> Degrees:
        """The mesh for this many ranks; ValueError if there is none that cuts the model's widths evenly."""
        degrees, found = resolve_degrees(
            self.parallelism,
            world_size=world_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            windowed=any(shape.windows()),
        )
        found = [replace(problem, key=f"parallelism.{problem.key}") for problem in found]
        if degrees is not None:
            found += _problems_of_widths(degrees.tp, ffn_dim=shape.ffn_dim, vocab_size=shape.vocab_size)
        if degrees is None or found:
            raise ValueError("\n".join(f"{p.key}: {p.rule}" + (p.fix and f"; {p.fix}") for p in found))
        return degrees

    def global_batch_size(self, degrees: Degrees) -> int:
        """Sequences per optimizer step over all ranks."""
        if self.training.global_batch_size == "auto":
            return self.training.local_batch_size * degrees.data
        return self.training.global_batch_size


def _padded(vocabulary: int) -> int:
    """Rows of an embedding for this many ids."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _problems_of_widths(tp: int, *, ffn_dim: int, vocab_size: int) -> Iterator[Problem]:
    """Which widths of the model tensor parallel cannot cut evenly; 0 is one that is not known."""
    for key, value in (("ffn_dim", ffn_dim), ("vocab_size", vocab_size)):
        if value % tp:
            fix = f"set it to {math.ceil(value / tp) * tp}"
            yield Problem(key=f"model.{key}", rule=f"{value} does not divide over the tensor degree {tp}", fix=fix)
