"""The user's own configuration at toy width: settings, and a trainer that reads a text of its own."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as CutAlong
from torch.utils.data import default_collate

from cptrain.checkpoint.settings import CheckpointConfig
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.packing import find_documents
from cptrain.context_parallel.selfcheck import exact_dtype, scaled, small_length
from cptrain.data.settings import TokenizerConfig
from cptrain.distributed.settings import sequence_multiple
from cptrain.loss import cross_entropy_sum
from cptrain.models.init import STD
from cptrain.models.llama import Llama
from cptrain.models.settings import ModelConfig
from cptrain.models.shape import ModelShape
from cptrain.train.batch import Shard
from cptrain.train.precision import resolve_precision
from cptrain.train.settings import JobConfig, TrainSettings
from cptrain.train.texts import Texts, open_texts
from cptrain.train.trainer import Trainer

TOKENS = 128  # of a sequence, or as few more as the mesh can cut
DIM, HEAD_DIM, FFN_DIM, VOCABULARY = 64, 16, 128, 320
NUM_LAYERS = 2  # one with a window and one without where the model has both
MOST_WINDOWS = 64  # of text

Batch = dict[str, torch.Tensor]


def real_shape(settings: TrainSettings) -> ModelShape:
    """The model that the settings train; its vocabulary may be the tokenizer's, which nothing here depends on."""
    return settings.shape(settings.known_vocabulary)


def distinct_plans(settings: TrainSettings, world_size: int) -> list[int]:
    """The first stage of each way in which the run divides the ranks; [0] for a run without stages."""
    first: dict[object, int] = {}
    for index in range(max(1, len(settings.training.stages))):
        stage = settings.at_stage(index)
        gathers = stage.parallelism.context_parallel_method == "all_gather"
        degrees = stage.degrees(world_size, real_shape(settings))
        first.setdefault((degrees, gathers, stage.parallelism.ring_inner_degree), index)
    return list(first.values())


def toy_settings(settings: TrainSettings, *, world_size: int, device: torch.device, folder: Path) -> TrainSettings:
    """The same degrees, methods, masks, heads and wrapping, with few short layers, tokens and sequences.

    One step per plan: each of `distinct_plans` is a stage. Everything is fp64 where the device's attention kernel has
    it. Weights stay what they are (the learning rate is 0), gradients unclipped. Files go to `folder`, which is this
    rank's own.
    """
    shape = real_shape(settings)
    plans = distinct_plans(settings, world_size)
    lengths = [_toy_lengths(settings.at_stage(index), world_size, shape) for index in plans]
    training = replace(settings.training, **lengths[0], steps=len(plans), max_norm=math.inf)
    if settings.training.stages:
        stages = [settings.training.stages[index] for index in plans]
        stages = [replace(stage, **numbers, steps=1) for stage, numbers in zip(stages, lengths, strict=True)]
        training = replace(training, stages=tuple(stages))
    dtype = resolve_precision(settings.training, device).param
    # The device's kernel, not the one that the settings name: whether that one works there is for the attention to say.
    if exact_dtype(device, dtype, "auto") == torch.float64:
        training = replace(training, dtype="float64", mixed_precision_param="auto", mixed_precision_reduce="auto")
    return replace(
        settings,
        job=JobConfig(name="check", dump_folder=str(folder)),
        model=_toy_model(
            settings.model,
            shape,
            length=settings.at_stage(0).training.seq_len,
            to=training.seq_len,
            tp=settings.parallelism.tensor_parallel_degree,
        ),
        tokenizer=TokenizerConfig(),
        data=replace(
            settings.data,
            source="jsonl",
            paths=(str(folder / "text.jsonl"),),
            text_field="text",
            validation_fraction=0.0,
            num_workers=0,
            cache_dir=str(folder / "cache"),
        ),
        parallelism=replace(settings.parallelism, chunk_size="auto"),
        training=training,
        optimizer=replace(settings.optimizer, lr=0.0),
        checkpoint=CheckpointConfig(enable=False),
        validation=replace(settings.validation, enable=False),
        metrics=replace(settings.metrics, enable_tensorboard=False, log_freq=1),
        debug=replace(settings.debug, startup_check=False),
    )


def _toy_lengths(stage: TrainSettings, world_size: int, shape: ModelShape) -> dict[str, Any]:
    """seq_len, local_batch_size and global_batch_size for a stage: small, with accumulation where the stage has it."""
    degrees = stage.degrees(world_size, shape)
    micro_batches = stage.global_batch_size(degrees) // (stage.training.local_batch_size * degrees.data)
    local = min(2, stage.training.local_batch_size)
    return {
        "seq_len": min(small_length(sequence_multiple(degrees), at_least=TOKENS), stage.training.seq_len),
        "local_batch_size": local,
        "global_batch_size": local * degrees.data * min(2, micro_batches),
    }


def _toy_model(config: ModelConfig, shape: ModelShape, *, length: int, to: int, tp: int) -> ModelConfig:
    windows = set(shape.windows())
    window = max(windows)
    small = scaled(Mask(shape.attention_mask == "causal", window), length=length, to=to).window
    return replace(
        config,
        dim=DIM,
        num_layers=NUM_LAYERS,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        # Kernels ask for multiples of 8: a head that is none is none at toy width either.
        head_dim=min(shape.head_dim, HEAD_DIM + shape.head_dim % 8),
        ffn_dim=-(-FFN_DIM // tp) * tp,
        vocab_size=-(-VOCABULARY // tp) * tp,
        window_size=small,
        full_attention_every=NUM_LAYERS if len(windows) == 2 else 0,
    )


def widen(model: Llama) -> None:
    """Scale the initial weights so that attention scores and logits are about 1, and every part has its weight.

    With the small weights that training starts from, a softmax is nearly even whatever is wrong with its scores.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1 / (STD * math.sqrt(DIM)))


@dataclass(frozen=True)
class States:
    """What a batch does in the model: final states, and the gradient of its loss at the embeddings. [B, length, E]."""

    hidden: torch.Tensor
    gradient: torch.Tensor


class ToyTrainer(Trainer):
    """A trainer of toy settings. All ranks have the same text, each in a folder of its own: none need be shared."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        widen(self.model)

    def _open_texts(self) -> Texts:
        settings = self.settings
        stages = range(max(1, len(settings.training.stages)))
        lengths = [settings.at_stage(index).training.seq_len for index in stages]
        # Every window holds documents beside each other.
        longest = min(lengths) * 3 // 4
        _write_text(Path(settings.data.paths[0]), tokens=max(lengths) * MOST_WINDOWS, longest=longest)
        return open_texts(
            settings.data, settings.tokenizer, default_seed=settings.debug.seed, share=lambda make: make()
        )

    def enter(self, index: int) -> None:
        """Go on to a stage, as training does."""
        self._enter_stage(index)

    @property
    def masks(self) -> list[Mask]:
        """The mask of each layer, documents aside."""
        return [Mask(self.shape.attention_mask == "causal", window) for window in self.shape.windows()]

    @property
    def has_documents(self) -> bool:
        """Whether tokens are to see those of their own document alone."""
        return self.settings.data.document_mask

    def masks_of(self, document_ids: torch.Tensor) -> list[Mask]:
        """The mask of each layer for rows whose tokens have these ids [B, length]."""
        documents = find_documents(document_ids) if self.has_documents else None
        return [replace(mask, documents=documents) for mask in self.masks]

    def batch(self, first: int, number: int) -> Batch:
        """Whole windows of training, [number, seq_len], the same on all ranks."""
        batch = default_collate([self.stage.windows[index] for index in range(first, first + number)])
        return self.stage.finish(batch) if self.stage.finish else batch

    def loss(self, shard: Shard) -> torch.Tensor:
        """Summed loss of this rank's part of a batch, as the training step computes it inside of the documents."""
        return self.model(shard.tokens, shard.positions, head=partial(cross_entropy_sum, labels=shard.labels))

    def states(self, batch: Batch) -> States:
        """What this rank's model makes of a batch of whole windows, gathered from all ranks."""
        shard, kept = self.shard(batch), {}

        def keep_embeddings(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            kept["embeddings"] = output

        def head(hidden: torch.Tensor, output: torch.nn.Linear) -> torch.Tensor:
            kept["hidden"] = hidden.detach()
            return cross_entropy_sum(hidden, output, shard.labels)

        handle = self.model.tok_embeddings.register_forward_hook(keep_embeddings)
        with shard.documents_entered():
            self.model(shard.tokens, shard.positions, head=head).backward()
        handle.remove()
        self.optimizer.zero_grad(set_to_none=True)
        gradient = kept["embeddings"].grad
        assert gradient is not None
        cut = shard.packed or self.stage.context
        return States(*(cut.unshard(self._whole_shard(x), dim=1) for x in (kept["hidden"], gradient)))

    def _whole_shard(self, x: torch.Tensor) -> torch.Tensor:
        """x of all of this rank's tokens, which sequence parallel cuts once more."""
        if isinstance(x, DTensor):
            return x.full_tensor()
        if self.stage.meshes.degrees.tp == 1:
            return x
        return DTensor.from_local(x, self.stage.meshes.tp, [CutAlong(1)], run_check=False).full_tensor()


def _write_text(path: Path, *, tokens: int, longest: int) -> None:
    """Documents of a letter to `longest`, many of them short, so many that they fill `tokens`."""
    chance, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written <= tokens:
            length = chance.randint(1, max(1, chance.choice((longest // 8, longest))))
            file.write(json.dumps({"text": "".join(chance.choices("abcdefgh ", k=length))}) + "\n")
            written += length
