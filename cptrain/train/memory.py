"""What a run needs of each rank's memory, and what to do where there is less. Torch is never imported here."""

from __future__ import annotations

from cptrain.distributed.settings import Degrees
from cptrain.metrics import human
from cptrain.models.shape import ModelShape
from cptrain.parallel.footprint import Footprint, Load, footprint
from cptrain.train.settings import TrainSettings

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
ROOM = 0.8  # of a GPU for tensors: the rest is CUDA's, NCCL's, and what the allocator cannot use


def load_of(settings: TrainSettings, degrees: Degrees, device_type: str) -> Load:
    """What the settings, of one stage, put on a rank."""
    training, parallelism = settings.training, settings.parallelism
    weight, param = training.dtype, training.compute_dtype(device_type)
    wrapped = degrees.world > 1 or param != weight
    accumulates = settings.global_batch_size(degrees) > training.local_batch_size * degrees.data
    return Load(
        tokens=training.local_batch_size * training.seq_len // degrees.context,
        checkpointing=settings.activation_checkpoint.mode,
        weight_bytes=BYTES[weight],
        param_bytes=BYTES[param],
        all_gather=parallelism.context_parallel_method == "all_gather",
        fused_norms=device_type == "cuda",
        wrapped=wrapped,
        keeps_gathered=wrapped and not parallelism.fsdp_reshard_after_forward,
        accumulates=accumulates,
        whole_gradients=wrapped and accumulates and not parallelism.fsdp_reduce_each_microbatch,
    )


def needed(settings: TrainSettings, degrees: Degrees, shape: ModelShape, device_type: str) -> Footprint:
    """The tensors of a training step on one rank of "cuda" or "cpu"."""
    return footprint(shape, degrees, load_of(settings, degrees, device_type))


def listed(need: Footprint) -> str:
    """The sum, when it is reached, and what most of it is."""
    parts = sorted(need.parts.items(), key=lambda part: -part[1])
    named = [f"{name} {human.size(part)}" for name, part in parts if part >= need.total / 100]
    return f"{human.size(need.total)} of tensors {need.moment}: {', '.join(named)}"


def ways_out(settings: TrainSettings, degrees: Degrees, device_type: str) -> str:
    """What makes a run need less, the cheapest first."""
    load, batch = load_of(settings, degrees, device_type), settings.training.local_batch_size
    ways = {
        "parallelism.fsdp_reshard_after_forward = true": load.keeps_gathered,
        "parallelism.fsdp_reduce_each_microbatch = true": load.whole_gradients,
        f"training.local_batch_size below {batch}": batch > 1,
        'activation_checkpoint.mode = "selective"': load.checkpointing == "none",
        'activation_checkpoint.mode = "full"': load.checkpointing == "selective",
        "a larger parallelism.context_parallel_degree on as many more ranks": True,
    }
    return ", or ".join(way for way, helps in ways.items() if helps)


def shortage(settings: TrainSettings, degrees: Degrees, shape: ModelShape, *, capacity: int) -> str:
    """A warning where a GPU of so many bytes has little room, or none, beside the tensors of a step, else ""."""
    need = needed(settings, degrees, shape, "cuda")
    if need.total <= ROOM * capacity:
        return ""
    return (
        f"the GPU has {human.size(capacity)} for all that is reserved, and a step needs about {listed(need)}; "
        f"less is needed with {ways_out(settings, degrees, 'cuda')}"
    )
