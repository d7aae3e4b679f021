"""What a run will do, in a few lines: shown by --dry-run and at the start. Torch is never imported here."""

from __future__ import annotations

from collections.abc import Sequence

from cptrain.distributed.settings import Degrees, choose_degrees
from cptrain.models.shape import ModelShape, num_parameters
from cptrain.train.memory import listed, needed
from cptrain.train.settings import TrainSettings


def describe(
    settings: TrainSettings,
    degrees: Degrees,
    shape: ModelShape,
    *,
    device_type: str = "",
    context_modules: Sequence[str] | None = None,
) -> str:
    """Mesh, sequence, batch, model and one rank's share; with `context_modules`, which layers run context parallel.

    device_type: "cuda" or "cpu", "" where it is not known: memory is then that on a GPU.
    """
    training, length = settings.training, settings.training.seq_len
    global_batch = settings.global_batch_size(degrees)
    accumulation = global_batch // (training.local_batch_size * degrees.data)
    local = length // degrees.context
    parameters = num_parameters(shape)
    vocabulary, embedded = f"{shape.vocab_size}", ""
    if not shape.vocab_size:
        vocabulary, embedded = "as the tokenizer has it", " without embeddings"
    heads, kv_heads = shape.num_heads // degrees.tp, shape.num_kv_heads // degrees.tp
    seen = length // degrees.ring
    q = [training.local_batch_size, heads // degrees.ulysses, seen, shape.head_dim]
    kv = [training.local_batch_size, max(1, kv_heads // degrees.ulysses), seen, shape.head_dim]
    lines = {
        "job": f"{settings.job.name}, writes to {settings.job.folder}",
        "mesh": f"dp_replicate {degrees.dp_replicate} x dp_shard {degrees.dp_shard} x ring {degrees.ring} x ulysses "
        f"{degrees.ulysses} x tp {degrees.tp} = {degrees.world} {'rank' if degrees.world == 1 else 'ranks'}",
        "context parallel": _context(settings, degrees, shape),
        "sequence": f"{length:,} tokens, {local:,} per rank",
        "batch": f"{global_batch} {'sequence' if global_batch == 1 else 'sequences'} = {global_batch * length:,} "
        f"tokens per step: {accumulation} micro-batch{'' if accumulation == 1 else 'es'} of "
        f"{training.local_batch_size} on {degrees.data} data-parallel {'rank' if degrees.data == 1 else 'ranks'}",
        "model": f"{settings.model.flavor}: {parameters:,} parameters{embedded}, {shape.num_layers} layers, "
        f"dim {shape.dim}, {shape.num_heads} heads, {shape.num_kv_heads} kv heads of {shape.head_dim}, "
        f"ffn {shape.ffn_dim}, vocabulary {vocabulary}, {_mask(settings, shape)}",
        "per rank": f"about {parameters // (degrees.fsdp * degrees.tp):,} parameters{embedded}; tokens "
        f"[{training.local_batch_size}, {local}], attention sees q {q}, k and v {kv} at a time",
        "memory": f"about {listed(needed(settings, degrees, shape, device_type or 'cuda'))}"
        f"{'' if device_type else ' (on a GPU)'}{embedded and f'{embedded} and logits'}",
        "recompute": f"activation checkpointing {settings.activation_checkpoint.mode}, compile "
        f"{settings.compile.backend if settings.compile.enable else 'off'}",
    }
    if context_modules is not None and degrees.context > 1:
        first, last = context_modules[0], context_modules[-1]
        lines["context layers"] = f"{len(context_modules)} of {shape.num_layers}: {first} .. {last}"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def hyper_parameters(
    settings: TrainSettings, degrees: Degrees, shape: ModelShape
) -> dict[str, bool | int | float | str]:
    """What runs are compared by, with "auto" resolved: a row of TensorBoard's HPARAMS."""
    training, optimizer, scheduler = settings.training, settings.optimizer, settings.lr_scheduler
    return {
        "model.flavor": settings.model.flavor,
        "model.parameters": num_parameters(shape),
        **{f"model.{key}": getattr(shape, key) for key in ("dim", "num_layers", "num_heads", "num_kv_heads")},
        "training.seq_len": training.seq_len,
        "training.global_batch_size": settings.global_batch_size(degrees),
        "training.steps": training.steps,
        "optimizer.lr": optimizer.lr,
        "optimizer.weight_decay": optimizer.weight_decay,
        "lr_scheduler.warmup_steps": scheduler.warmup_steps,
        "lr_scheduler.decay_type": scheduler.decay_type,
        **{f"degree.{axis}": getattr(degrees, axis) for axis in ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")},
        "context parallel": _context(settings, degrees, shape),
        "data.document_mask": settings.data.document_mask,
        "activation_checkpoint.mode": settings.activation_checkpoint.mode,
        "compile.enable": settings.compile.enable,
        "debug.seed": settings.debug.seed,
    }


def _mask(settings: TrainSettings, shape: ModelShape) -> str:
    text = f"{shape.attention_mask} attention{' inside of documents' if settings.data.document_mask else ''}"
    if not any(shape.windows()):
        return text
    windowed = sum(window > 0 for window in shape.windows())
    return f"{text}, {windowed} layers with a sliding window of {shape.window_size}"


def _context(settings: TrainSettings, degrees: Degrees, shape: ModelShape) -> str:
    if degrees.context == 1:
        return "off (each rank holds whole sequences)"
    config, inner = settings.parallelism, settings.parallelism.ring_inner_degree
    hops = degrees.ring - 1
    ring = f"ring of {degrees.ring}, {settings.layout}, {hops} {'hop' if hops == 1 else 'hops'} each way"
    if config.context_parallel_method == "all_gather":
        ring = f"all-gather over {degrees.ring}, {settings.layout}"
    elif inner > 1:
        ring += f", inner rings of {inner}"
    ulysses = f"ulysses over {degrees.ulysses}"
    chosen = [ring] * (degrees.ring > 1) + [ulysses] * (degrees.ulysses > 1)
    name = "hybrid: " if len(chosen) == 2 else ""
    overlap = "" if config.context_parallel_overlap else ", no overlap"
    return f"{name}{' x '.join(chosen)}{overlap}{_reason(settings, degrees, shape)}"


def _reason(settings: TrainSettings, degrees: Degrees, shape: ModelShape) -> str:
    """Why "auto" chose what it chose; nothing where the degrees were given."""
    config = settings.parallelism
    left_to_auto = config.context_parallel_method == config.ring_degree == config.ulysses_degree == "auto"
    if not left_to_auto:
        return ""
    choice = choose_degrees(
        degrees.context,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        tp=degrees.tp,
        windowed=any(shape.windows()),
    )
    return f" (auto: {choice.reason})"
