"""The memory that a dry run announces is what a training step of the real trainer holds."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_settings, write_text
from torch.distributed.tensor import DTensor

from cptrain.distributed.settings import Degrees
from cptrain.models.shape import ModelShape
from cptrain.parallel.footprint import Footprint
from cptrain.train.memory import listed, needed, shortage, ways_out
from cptrain.train.settings import TrainSettings
from cptrain.train.trainer import Trainer

LAST_WAY = "a larger parallelism.context_parallel_degree on as many more ranks"
TOOLS = Path(__file__).resolve().parent.parent / "tools"
MANY_WORDS = {"vocab_size": 16_384}  # whose embeddings are larger than all blocks
NARROW = {"num_kv_heads": 8, "ffn_dim": 128}  # attention needs more than the feed-forward
# What differs from `settings_of`, by the number of ranks.
CASES: dict[int, list[dict[str, dict[str, Any]]]] = {
    1: [
        {"activation_checkpoint": {"mode": "none"}},
        {"activation_checkpoint": {"mode": "none"}, "training": {"mixed_precision_param": "bfloat16"}},
        {"activation_checkpoint": {"mode": "full"}, "training": {"seq_len": 128}},
        {"activation_checkpoint": {"mode": "selective"}, "model": {"qk_norm": True, "tied_embeddings": True}},
        {"model": MANY_WORDS | {"tied_embeddings": True}, "training": {"seq_len": 64}},
        {"model": MANY_WORDS, "training": {"seq_len": 64, "mixed_precision_param": "bfloat16"}},
    ],
    2: [
        {"parallelism": {"ring_degree": 2}, "model": NARROW, "training": {"mixed_precision_param": "bfloat16"}},
        {"parallelism": {"ulysses_degree": 2}, "activation_checkpoint": {"mode": "none"}},
        {"parallelism": {"tensor_parallel_degree": 2}},
        {"parallelism": {"tensor_parallel_degree": 2}, "activation_checkpoint": {"mode": "none"}},
        {"parallelism": {"ring_degree": 2}, "training": {"global_batch_size": 2, "seq_len": 256}},
        {
            "parallelism": {"ring_degree": 2, "fsdp_reshard_after_forward": False},
            "training": {"seq_len": 256, "mixed_precision_param": "bfloat16"},
        },
        {
            "parallelism": {"ring_degree": 2, "fsdp_reduce_each_microbatch": True},
            "training": {"global_batch_size": 3, "seq_len": 64},
        },
        {"parallelism": {"ring_degree": 2}, "model": MANY_WORDS, "training": {"seq_len": 64}},
        {
            "parallelism": {"tensor_parallel_degree": 2},
            "model": MANY_WORDS,
            "training": {"seq_len": 64, "mixed_precision_param": "bfloat16"},
        },
        {"parallelism": {"data_parallel_shard_degree": 2}, "training": {"local_batch_size": 2, "seq_len": 512}},
    ],
    4: [
        {"parallelism": {"ring_degree": 4, "ring_inner_degree": 2}, "model": NARROW},
        {"parallelism": {"ring_degree": 4}, "model": NARROW},
        {"parallelism": {"ring_degree": 4}, "model": NARROW, "training": {"mixed_precision_param": "bfloat16"}},
        {
            "parallelism": {"ring_degree": 4, "context_parallel_method": "all_gather"},
            "model": {"num_kv_heads": 1, "ffn_dim": 128},
        },
        {"parallelism": {"ring_degree": 2, "ulysses_degree": 2}, "activation_checkpoint": {"mode": "full"}},
        {"parallelism": {"ulysses_degree": 4}, "model": {"num_kv_heads": 2}, "activation_checkpoint": {"mode": "none"}},
    ],
}


def settings_of(folder: Path, text: str, case: dict[str, dict[str, Any]]) -> TrainSettings:
    model = {"dim": 128, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 384, "vocab_size": 1024}
    sections: dict[str, dict[str, Any]] = {
        "model": model,
        "data": {"document_mask": False},
        "training": {"seq_len": 1024, "dtype": "float32", "global_batch_size": "auto"},
        "activation_checkpoint": {"mode": "selective"},
    }
    merged = {name: sections.get(name, {}) | case.get(name, {}) for name in sections | case}
    return small_settings(folder, text, **merged)


def measured(rank: int, world: int, folder: Path, text: str) -> list[tuple[int, Footprint]]:
    """Of every case, on rank 0: bytes of weights, moments and what a step needs beside them, and what was foretold."""
    sys.path.insert(0, str(TOOLS))
    from attention_clock import transient_bytes

    found = []
    for number, case in enumerate(CASES[world]):
        with Trainer(settings_of(folder / str(number), text, case), torch.device("cpu")) as trainer:
            trainer.train_step()  # which makes the moments
            held = [*trainer.model.parameters()]
            held += [x for state in trainer.optimizer.state.values() for x in state.values() if x.numel() > 1]
            num_bytes = sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in held)
            if rank == 0:
                num_bytes += transient_bytes(trainer.train_step, torch.device("cpu"))
            else:
                trainer.train_step()
            degrees = trainer.stage.meshes.degrees
            found.append((num_bytes, needed(trainer.settings, degrees, trainer.shape, "cpu")))
    return found


@pytest.mark.parametrize("world", CASES)
def test_footprint_is_what_a_step_holds(pool, tmp_path, world):
    text = write_text(tmp_path, num_files=60)
    for case, (actual, foretold) in zip(CASES[world], pool.run(world, measured, tmp_path, text)[0], strict=True):
        ratio = foretold.total / actual
        assert 0.97 < ratio < 1.12, f"{case}: {ratio:.3f} of {actual:,}; {listed(foretold)}"


def on_8_gpus(**sections: dict[str, Any]) -> tuple[TrainSettings, Degrees, ModelShape]:
    """Llama 3.1 8B on 131,072 tokens by Ulysses 8."""
    settings = TrainSettings()
    sections = {
        "model": {"flavor": "llama3.1-8b"},
        "training": {"seq_len": 131_072} | sections.pop("training", {}),
        "parallelism": {"ulysses_degree": 8} | sections.pop("parallelism", {}),
        **sections,
    }
    for name, keys in sections.items():
        settings = replace(settings, **{name: replace(getattr(settings, name), **keys)})
    shape = settings.shape(settings.known_vocabulary)
    return settings, settings.degrees(8, shape), shape


def test_footprint_of_a_gpu_by_hand():
    need = needed(*on_8_gpus(), "cuda")
    parameters, tokens, layers = 8_030_261_248, 16_384, 32
    assert need.moment == "as backward begins"
    assert need.parts["weights and AdamW"] == 3 * 4 * parameters // 8
    # In bf16: the block's input, attention's result before and after its all-to-all, q, and k and v of a fourth of the
    # heads; in fp32 a logarithm for each head.
    assert need.parts["kept activations"] == layers * tokens * (2 * 4096 * 4 + 2 * 2 * 1024 + 4 * 32)
    assert sum(need.parts.values()) == need.total
    assert listed(need).startswith("36.4 GiB of tensors as backward begins: kept activations 18.1 GiB, weights and ")


def test_footprint_counts_key_heads_that_are_repeated():
    def kept(num_kv_heads: int, degree: int) -> int:
        settings, _, shape = on_8_gpus(
            parallelism={"ulysses_degree": degree}, activation_checkpoint={"mode": "selective"}
        )
        shape = replace(shape, num_kv_heads=num_kv_heads)
        return needed(settings, settings.degrees(degree, shape), shape, "cuda").parts["kept activations"] * degree

    assert kept(8, 8) == kept(8, 4) == kept(2, 8) > kept(2, 4)


def test_footprint_of_an_all_gather_grows_with_the_ranks():
    def block(degree: int) -> int:
        settings, _, shape = on_8_gpus(
            parallelism={"ulysses_degree": 1, "ring_degree": 8, "context_parallel_method": "all_gather"},
            training={"seq_len": degree * 16_384},
        )
        degrees = Degrees(dp_replicate=1, dp_shard=1, ring=degree, ulysses=1, tp=1)
        return needed(settings, degrees, replace(shape, num_kv_heads=1, ffn_dim=128, vocab_size=64), "cuda").parts[
            "one block"
        ]

    # Keys and values of a head of each rank: two in bf16, as gathered, and their gradients, and two in fp32.
    assert block(16) - block(8) == 8 * 2 * 16_384 * 128 * 2 * (2 + 4)


@pytest.mark.parametrize("tied", [False, True])
def test_footprint_gathers_two_blocks_and_the_output(tied):
    settings, degrees, shape = on_8_gpus()
    shape = replace(shape, tied_embeddings=tied)
    block = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096
    # In bf16 the blocks and the output; a block's gradients in bf16, and in fp32 on their way.
    expected = 2 * (2 * block + 128_256 * 4096) + (2 + 4) * block
    assert needed(settings, degrees, shape, "cuda").parts["gathered weights"] == expected


def test_footprint_of_one_rank_without_fsdp_has_no_gathered_weights():
    settings, _, shape = on_8_gpus(
        parallelism={"ulysses_degree": "auto", "fsdp_reshard_after_forward": False},
        training={"mixed_precision_param": "float32", "global_batch_size": 4},
    )
    degrees = settings.degrees(1, shape)
    assert not needed(settings, degrees, shape, "cuda").parts["gathered weights"]
    assert ways_out(settings, degrees, "cuda").startswith('activation_checkpoint.mode = "full"')


def test_footprint_is_compared_with_a_gpu():
    settings, degrees, shape = on_8_gpus()
    need = needed(settings, degrees, shape, "cuda").total
    assert shortage(settings, degrees, shape, capacity=need * 5 // 4 + 1) == ""
    told = shortage(settings, degrees, shape, capacity=need * 5 // 4 - 1)
    assert told.startswith(
        "the GPU has 45.5 GiB for all that is reserved, and a step needs about 36.4 GiB of tensors as "
    )
    assert told.endswith(f"; less is needed with {ways_out(settings, degrees, 'cuda')}")


def test_footprint_ways_out_are_none_that_change_nothing():
    settings, degrees, _ = on_8_gpus(training={"global_batch_size": 1}, activation_checkpoint={"mode": "full"})
    assert ways_out(settings, degrees, "cuda") == LAST_WAY


@pytest.mark.parametrize(
    "sections",
    [
        {"activation_checkpoint": {"mode": "none"}},
        {"activation_checkpoint": {"mode": "selective"}},
        {"activation_checkpoint": {"mode": "full"}, "training": {"local_batch_size": 2}},
        {"activation_checkpoint": {"mode": "full"}, "parallelism": {"fsdp_reshard_after_forward": False}},
        {"activation_checkpoint": {"mode": "full"}, "training": {"global_batch_size": 4}},
    ],
)
def test_footprint_is_less_by_each_way_out(sections):
    settings, degrees, shape = on_8_gpus(**sections)
    *ways, last = ways_out(settings, degrees, "cuda").split(", or ")
    assert last == LAST_WAY
    assert len(ways) == 1
    value = re.fullmatch(r"(\w+)\.(\w+) (?:= |below )(.*)", ways[0])
    assert value is not None, ways[0]
    section, key, text = value.groups()
    new = int(text) - 1 if "below" in ways[0] else {"true": True}.get(text, text.strip('"'))
    mended = replace(settings, **{section: replace(getattr(settings, section), **{key: new})})
    assert needed(mended, degrees, shape, "cuda").total < needed(settings, degrees, shape, "cuda").total
