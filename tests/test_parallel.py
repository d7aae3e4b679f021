"""Models put together by `parallelise` compute the loss and gradients of one process, whatever is applied to them."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from small import SEED, loss_sum, small_batch, small_model, small_shape
from tolerance import assert_matches
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cptrain.distributed.mesh import Meshes, build_meshes
from cptrain.distributed.settings import Degrees, ParallelismConfig
from cptrain.loss import cross_entropy_sum
from cptrain.models.shape import num_parameters
from cptrain.parallel.apply import ParallelModel, Precision, compile_blocks, parallelise
from cptrain.parallel.settings import ActivationCheckpointConfig, CompileConfig

CPU = torch.device("cpu")
FP64 = Precision(torch.float64, torch.float64, torch.float64)
BATCH, LENGTH = 4, 16
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "query and key norms": {"qk_norm": True},
    "biases": {"qkv_bias": True},
    "tied embeddings": {"tied_embeddings": True},
    "full mask": {"attention_mask": "full"},
    "sliding window": {"window_size": 3},
    "all heads alike": {"num_kv_heads": 4},
    "wide heads": {"head_dim": 6, "qk_norm": True, "qkv_bias": True, "tied_embeddings": True},
}


def build(
    degrees: Degrees,
    *,
    mode: str = "none",
    compile_it: bool = False,
    precision: Precision = FP64,
    parallelism: dict[str, Any] | None = None,
    **keys: Any,
) -> tuple[ParallelModel, Meshes]:
    meshes = build_meshes(degrees, CPU)
    parallel = parallelise(
        small_shape(**keys),
        meshes,
        parallelism=ParallelismConfig(**parallelism or {}),
        activation_checkpoint=ActivationCheckpointConfig(mode=mode),  # type: ignore[arg-type]
        compile=CompileConfig(enable=compile_it, backend="aot_eager"),
        precision=precision,
        seed=SEED,
    )
    return parallel, meshes


def loss_of(parallel: ParallelModel, meshes: Meshes) -> torch.Tensor:
    """The loss of this rank's tokens, out of a batch that the data-parallel ranks share out."""
    rows = BATCH // meshes.degrees.data
    mine = slice(meshes.data_rank * rows, (meshes.data_rank + 1) * rows)
    batch = (x[mine] for x in small_batch(LENGTH, size=BATCH))
    tokens, labels, positions = parallel.context.shard(*batch)
    return parallel.model(tokens, positions, head=partial(cross_entropy_sum, labels=labels))


def assert_same_gradients(parallel: ParallelModel, expected: dict[str, torch.Tensor]) -> None:
    """Gradients, gathered from all ranks, by the name that the parameter has in the plain model."""
    actual = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in parallel.model.named_parameters()
    }
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert grad is not None, f"{name} has no gradient"
        try:
            assert_matches(grad.full_tensor() if isinstance(grad, DTensor) else grad, expected[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def one_process(**keys: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the plain model; a sliding window is the dense mask that it stands for."""
    plain, window = F.scaled_dot_product_attention, keys.get("window_size", 0)

    def windowed(q, k, v, *, is_causal, enable_gqa):
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        return plain(q, k, v, attn_mask=(distance >= 0) & (distance < window), enable_gqa=enable_gqa)

    model = small_model(**keys)
    with mock.patch.object(F, "scaled_dot_product_attention", windowed if window else plain):
        loss = loss_sum(model, *small_batch(LENGTH, size=BATCH))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equals_one_process(degrees: Degrees, keys: dict[str, Any], **options: Any) -> None:
    parallel, meshes = build(degrees, **options, **keys)
    loss = loss_of(parallel, meshes)
    loss.backward()
    expected_loss, expected_grads = one_process(**keys)
    assert_matches(meshes.sum_over_batch(loss.detach().clone()), expected_loss)
    assert_same_gradients(parallel, expected_grads)


def check_variants(rank: int, world: int, degrees: Degrees, names: list[str]) -> None:
    for name in names:
        try:
            assert_equals_one_process(degrees, VARIANTS[name])
        except AssertionError as error:
            raise AssertionError(f"{name}, {error}") from None


@pytest.mark.parametrize(
    ("degrees", "names"),
    [
        (Degrees(tp=2), list(VARIANTS)),
        (Degrees(ring=2, tp=2), list(VARIANTS)),
        (Degrees(ulysses=2, tp=2), ["wide heads", "sliding window"]),
        (Degrees(dp_shard=2, tp=2), ["wide heads"]),
        (Degrees(dp_replicate=2, dp_shard=2), ["wide heads"]),
    ],
    ids=["tp 2", "ring 2 x tp 2", "ulysses 2 x tp 2", "fsdp 2 x tp 2", "replicate 2 x fsdp 2"],
)
def test_parallel_model_of_any_variant_has_the_loss_and_gradients_of_one_process(pool, degrees, names):
    pool.run(degrees.world, check_variants, degrees, names)


def check_deep_combinations(rank: int, world: int) -> None:
    keys = VARIANTS["wide heads"]
    assert_equals_one_process(Degrees(dp_replicate=2, ring=2, tp=2), keys, mode="selective")
    assert_equals_one_process(Degrees(ring=2, ulysses=2, tp=2), keys, mode="full")


def test_parallel_model_over_eight_ranks_and_with_recompute_has_the_gradients_of_one_process(pool):
    pool.run(8, check_deep_combinations)


def check_compiled(rank: int, world: int, cases: list[tuple[Degrees, str]]) -> None:
    for degrees, mode in cases:
        assert_equals_one_process(degrees, {"qk_norm": True}, mode=mode, compile_it=True)


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [(Degrees(ring=2), "selective"), (Degrees(dp_shard=2), "full"), (Degrees(tp=2), "none")]),
        (4, [(Degrees(ring=2, tp=2), "selective")]),
    ],
)
def test_parallel_model_whose_blocks_are_compiled_has_the_gradients_of_one_process(pool, world, cases):
    pool.run(world, check_compiled, cases)


def test_parallel_model_is_not_compiled_by_a_backend_that_torch_does_not_have():
    with pytest.raises(ValueError, match=r'compile\.backend = "nope": must be one that torch has: .*inductor'):
        compile_blocks(small_model(), backend="nope")


def gradients_by_microbatch(rank: int, world: int) -> None:
    parallel, meshes = build(Degrees(dp_shard=2))
    for last in (False, True):
        parallel.set_reduction(last)
        loss_of(parallel, meshes).backward()
        if not last:
            assert all(parameter.grad is None for parameter in parallel.model.parameters()), "reduced too early"
    _, expected = one_process()
    assert_same_gradients(parallel, {name: 2 * grad for name, grad in expected.items()})


def test_parallel_model_adds_up_microbatches_and_reduces_them_with_the_last(pool):
    pool.run(2, gradients_by_microbatch)


def local_numel(rank: int, world: int, degrees: Degrees, keys: dict[str, Any]) -> tuple[int, int, bool]:
    """Elements of parameters that this rank holds, those of norms counted alone, and whether all blocks are groups."""
    parallel, _ = build(degrees, **keys)
    named = list(parallel.model.named_parameters())
    held = {name: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for name, p in named}
    norms = sum(numel for name, numel in held.items() if "norm" in name)
    return sum(held.values()), norms, all(isinstance(layer, FSDPModule) for layer in parallel.model.layers)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parallel_model_holds_each_weight_once_over_fsdp_and_tensor_parallel(pool, tied):
    keys = {"tied_embeddings": tied}
    found = pool.run(4, local_numel, Degrees(ring=2, tp=2), keys)
    whole, norms = num_parameters(small_shape(**keys)), 5 * 16
    # Norms are whole on each tensor-parallel rank: every token needs all of their weights.
    assert sum(total for total, _, _ in found) == whole + norms
    assert [of_norms for _, of_norms, _ in found] == [norms // 2] * 4
    assert all(grouped for *_, grouped in found)


def seen_dtypes(rank: int, world: int) -> dict[str, set[torch.dtype]]:
    parallel, meshes = build(Degrees(ring=world), precision=Precision(torch.float32, torch.bfloat16, torch.float32))
    inside = set()
    for module in parallel.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: inside.add(output.dtype))
    loss = loss_of(parallel, meshes)
    loss.backward()
    parameters = list(parallel.model.parameters())
    return {
        "inside blocks": inside,
        "loss": {loss.dtype},
        "weights": {p.dtype for p in parameters},
        "gradients": {p.grad.dtype for p in parameters},
    }


@pytest.mark.parametrize("world", [1, 2])
def test_parallel_model_computes_in_the_parameter_dtype_and_keeps_weights_and_gradients_wide(pool, world):
    wide = {torch.float32}
    for found in pool.run(world, seen_dtypes):
        assert found == {"inside blocks": {torch.bfloat16}, "loss": wide, "weights": wide, "gradients": wide}


def context_modules(rank: int, world: int) -> list[list[str]]:
    """Which modules the plan serves on a ring, and on one rank of context."""
    return [build(degrees)[0].context_modules for degrees in (Degrees(ring=2), Degrees(dp_shard=2))]


def test_parallel_model_names_the_modules_that_the_plan_serves_on_any_number_of_ranks(pool):
    on_a_ring, alone = pool.run(2, context_modules)[0]
    assert on_a_ring == alone == ["layers.0.attention", "layers.1.attention"]


def collectives_of_a_step(rank: int, world: int) -> set[str]:
    parallel, meshes = build(Degrees(dp_shard=2, tp=2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        loss_of(parallel, meshes).backward()
    return {event.name for event in profiled.events() if event.name.startswith("c10d::")}


def test_parallel_model_on_cpu_gathers_and_scatters_by_messages(pool):
    # What is reduced and not scattered: gradients of norms, and of the loss the softmax.
    assert pool.run(4, collectives_of_a_step) == [{"c10d::send", "c10d::recv_", "c10d::allreduce_"}] * 4
