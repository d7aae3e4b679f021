"""Which key an unknown one was meant to be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType

# The words of other trainers for our keys. They appear in suggestions and are never accepted.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "parallelism.context_parallel_degree": "cp cp_size cp_degree context_parallel context_parallel_size sp sp_size "
        "sp_degree sequence_parallel sequence_parallel_size sequence_parallel_degree ulysses_sequence_parallel_size",
        "parallelism.context_parallel_method": "context_parallel_rotate_method ring_attn_func cp_backend sp_backend "
        "cp_style cp_comm_type",
        "parallelism.ring_degree": "ring ring_size",
        "parallelism.ulysses_degree": "ulysses ulysses_size",
        "parallelism.data_parallel_shard_degree": "dp dp_size dp_shard dp_shard_size dp_degree shard_degree "
        "data_parallel_size data_parallel_degree fsdp fsdp_size",
        "parallelism.data_parallel_replicate_degree": "dp_replicate dp_replicate_size replicate_degree hsdp",
        "parallelism.tensor_parallel_degree": "tp tp_size tp_degree tensor_parallel tensor_parallel_size "
        "tensor_model_parallel_size",
        "training.seq_len": "sequence_len sequence_length seq_length seqlen max_length max_seq_len max_seq_length "
        "max_sequence_length context_length cutoff_len block_size model_max_length",
        "training.local_batch_size": "batch_size micro_batch_size per_device_batch_size per_device_train_batch_size "
        "rank_microbatch_size train_micro_batch_size_per_gpu device_batch_size",
        "training.global_batch_size": "train_batch_size total_batch_size global_train_batch_size grad_accum "
        "gradient_accumulation_steps",
        "training.steps": "max_steps num_steps train_steps num_train_steps total_steps train_iters num_iterations",
        "training.max_norm": "max_grad_norm grad_clip clip_grad grad_norm_clip gradient_clipping gradient_clip_val",
        "optimizer.lr": "learning_rate peak_lr max_lr",
        "lr_scheduler.warmup_steps": "num_warmup_steps lr_warmup_steps warmup_iters warmup_ratio",
        "activation_checkpoint.mode": "gradient_checkpointing activation_checkpointing recompute",
        "compile.enable": "torch_compile use_compile",
        "checkpoint.interval": "save_steps save_interval save_every save_freq",
        "checkpoint.keep_latest_k": "save_total_limit keep_last_k max_checkpoints",
        "metrics.log_freq": "logging_steps log_interval log_every log_every_n_steps",
        "data.num_workers": "dataloader_num_workers",
        "job.name": "run_name experiment_name",
    }
)


def suggest(wanted: str, known: Sequence[str]) -> str | None:
    """The known key that an unknown one most likely means; None where nothing is near."""
    wanted = re.sub(r"\[\d+\]", "[]", wanted)
    section, _, name = wanted.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    namesakes = [key for key in known if key.rpartition(".")[2] == name]
    candidates = [
        *(key for key in known if key.lower() == wanted.lower()),
        *(siblings[near] for near in get_close_matches(name, siblings, n=1, cutoff=0.9)),  # a slip of the fingers
        *(key for key, aliases in ALIASES.items() if name.lower() in aliases.split() and key in known),
        *(namesakes if len(namesakes) == 1 else []),
        *(siblings[near] for near in get_close_matches(name, siblings, n=1, cutoff=0.6)),
        # Paths of one section are all alike, so they are compared only where the section is not known.
        *get_close_matches(wanted, [] if siblings else known, n=1, cutoff=0.8),
    ]
    return next(iter(candidates), None)


def did_you_mean(wanted: str, known: Sequence[str]) -> str:
    """The suggestion, or all keys of this name, as a question, else the sections or keys that there are."""
    found = suggest(wanted, known)
    if found is not None:
        return f"did you mean `{found}`?"
    section, name = wanted.partition(".")[0], wanted.rpartition(".")[2]
    sections = dict.fromkeys(key.partition(".")[0] for key in known)
    if section in sections:
        return f"--help {section} lists its keys"
    if namesakes := [f"`{key}`" for key in known if key.rpartition(".")[2] == name]:
        return f"did you mean {' or '.join(namesakes)}?"
    return f"sections are {', '.join(sections)}"
