"""The loss equals F.cross_entropy, one process or many, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tolerance import assert_matches
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from cptrain.loss import IGNORED, correct_each, cross_entropy_each, cross_entropy_sum
from cptrain.models import logits as logits_chunks

BATCH, LENGTH, DIM, VOCABULARY = 2, 12, 6, 20


def problem(
    dtype: torch.dtype = torch.float64, *, scale: float = 1.0, vocabulary: int = VOCABULARY
) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """hidden [B, T, E], output, labels [B, T] of which every fifth is ignored; the same on every rank."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(BATCH, LENGTH, DIM, generator=generator, dtype=torch.float64) * scale
    output = nn.Linear(DIM, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        output.weight.copy_(torch.randn(vocabulary, DIM, generator=generator, dtype=torch.float64))
    labels = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 7 % vocabulary
    labels.view(-1)[::5] = IGNORED
    return hidden.to(dtype).requires_grad_(), output, labels


def expected(hidden: torch.Tensor, output: nn.Linear, labels: torch.Tensor, factor: float = 1.0) -> tuple:
    """Value and gradients in hidden and weight, in fp64 from all logits at once."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, output.weight))
    total = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum")
    return total.detach(), *torch.autograd.grad(total * factor, (hidden, weight))


def actual(hidden: torch.Tensor, output: nn.Linear, labels: torch.Tensor, factor: float = 1.0) -> tuple:
    total = cross_entropy_sum(hidden, output, labels)
    return total.detach(), *torch.autograd.grad(total * factor, (hidden, output.weight))


def assert_all_match(ours: tuple, theirs: tuple) -> None:
    for name, a, e in zip(("loss", "dhidden", "dweight"), ours, theirs, strict=True):
        try:
            assert_matches(a, e.to(a.dtype))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_equals_cross_entropy_of_all_logits(dtype):
    assert_all_match(actual(*problem(dtype)), expected(*problem(dtype)))


def assert_each_matches(ours: torch.Tensor, hidden: torch.Tensor, output: nn.Linear, labels: torch.Tensor) -> None:
    logits = F.linear(hidden.double(), output.weight.double()).flatten(0, 1)
    each = F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)
    assert not ours.requires_grad and bool((ours[labels == IGNORED] == 0).all())
    assert_matches(ours, each.detach().to(ours.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_of_each_token_equals_cross_entropy(monkeypatch, dtype):
    monkeypatch.setattr(logits_chunks, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(logits_chunks, "CHUNK_ELEMENTS", 1)
    with Shapes() as shapes:
        ours = cross_entropy_each(*problem(dtype))
    assert_each_matches(ours, *problem(dtype))
    of_logits = {shape for shape in shapes.seen if len(shape) == 2 and shape[1] == VOCABULARY and shape[0] != DIM}
    assert max(of_logits) == (5, VOCABULARY)


def answers(hidden: torch.Tensor, output: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B, T] that are the likeliest token, the second likeliest or ignored by turns, and which are correct."""
    ranked = F.linear(hidden.detach(), output.weight.detach()).argsort(-1, descending=True)
    turn = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3
    labels = ranked.gather(-1, turn.clamp(max=1).unsqueeze(-1)).squeeze(-1)
    return labels.masked_fill(turn == 2, IGNORED), turn == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_label_is_correct_where_no_other_token_is_likelier(monkeypatch, dtype):
    monkeypatch.setattr(logits_chunks, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(logits_chunks, "CHUNK_ELEMENTS", 1)
    hidden, output, _ = problem(dtype)
    labels, expected = answers(hidden, output)
    found = correct_each(hidden, output, labels)
    assert torch.equal(found, expected) and not found.requires_grad
    with torch.no_grad():
        output.weight.zero_()
    labels = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3
    assert torch.equal(correct_each(hidden, output, labels), labels == 0), "of equals, the first"


@pytest.mark.parametrize("tokens", [1, 5, 12, 23, 24, 25])
def test_loss_is_the_same_for_any_size_of_chunk(monkeypatch, tokens):
    monkeypatch.setattr(logits_chunks, "CHUNK_TOKENS", tokens)
    monkeypatch.setattr(logits_chunks, "CHUNK_ELEMENTS", 1)
    assert_all_match(actual(*problem()), expected(*problem()))


def test_loss_multiplies_its_gradients_by_the_upstream_gradient():
    assert_all_match(actual(*problem(), factor=-0.37), expected(*problem(), factor=-0.37))


def test_loss_of_ignored_tokens_alone_is_zero_with_zero_gradients():
    hidden, output, labels = problem()
    total, *grads = actual(hidden, output, torch.full_like(labels, IGNORED))
    assert total == 0
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


def test_loss_gives_an_ignored_token_no_gradient_whatever_its_neighbours_have():
    hidden, output, labels = problem()
    _, dhidden, _ = actual(hidden, output, labels)
    ignored = labels == IGNORED
    assert torch.equal(dhidden[ignored], torch.zeros_like(dhidden[ignored]))
    assert (dhidden[~ignored].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_loss_of_huge_logits_does_not_overflow(sign):
    hidden, output, labels = problem(torch.float32, scale=sign * 1e4)
    ours = actual(hidden, output, labels)
    assert all(x.isfinite().all() for x in ours)
    assert_all_match(ours, expected(hidden, output, labels))


def test_loss_in_bf16_is_as_exact_as_its_inputs():
    hidden, output, labels = problem(torch.bfloat16)
    ours, exact = actual(hidden, output, labels), expected(hidden, output, labels)
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for a, e, limit in zip(ours, exact, (2e-3, 8e-3, 8e-3), strict=True):
        assert (a.double() - e).norm() < limit * e.norm()


def test_loss_sums_the_gradient_of_the_weight_over_chunks_in_fp32(monkeypatch):
    """In bf16 a sum of 512 equal terms would stop growing at 256 of them."""
    monkeypatch.setattr(logits_chunks, "CHUNK_TOKENS", 1)
    monkeypatch.setattr(logits_chunks, "CHUNK_ELEMENTS", 1)
    hidden = torch.ones(1, 512, 2, dtype=torch.bfloat16, requires_grad=True)
    output = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(output.weight)
    _, _, dweight = actual(hidden, output, torch.zeros(1, 512, dtype=torch.int64))
    assert dweight.tolist() == [[-256, -256], [256, 256]]


def test_loss_refuses_an_output_with_a_bias():
    hidden, _, labels = problem()
    with pytest.raises(NotImplementedError, match="bias=False"):
        cross_entropy_sum(hidden, nn.Linear(DIM, VOCABULARY).double(), labels)


class Shapes(TorchDispatchMode):
    """The shapes of everything that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result


def test_loss_never_holds_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(logits_chunks, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(logits_chunks, "CHUNK_ELEMENTS", 1)
    with Shapes() as shapes:
        actual(*problem())
    of_logits = {shape for shape in shapes.seen if len(shape) == 2 and shape[1] == VOCABULARY and shape[0] != DIM}
    assert of_logits == {(5, VOCABULARY), (BATCH * LENGTH % 5, VOCABULARY)}


class Logits(TorchDispatchMode):
    """The most tensors of a number of elements, of memory of their own, that were there when an operation returned."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self._numel, self._made, self.most = numel, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.numel() == self._numel:
                self._made[x.untyped_storage().data_ptr()] = StorageWeakRef(x.untyped_storage())
        self.most = max(self.most, sum(not made.expired() for made in self._made.values()))
        return result


@pytest.mark.parametrize("of", [cross_entropy_sum, cross_entropy_each, correct_each], ids=lambda of: of.__name__)
def test_loss_drops_the_logits_of_a_chunk_before_it_makes_the_next(monkeypatch, of):
    most = []
    for tokens in (BATCH * LENGTH, BATCH * LENGTH // 3):
        monkeypatch.setattr(logits_chunks, "CHUNK_TOKENS", tokens)
        monkeypatch.setattr(logits_chunks, "CHUNK_ELEMENTS", 1)
        with Logits(tokens * VOCABULARY) as logits:
            of(*problem())
        most.append(logits.most)
    assert most[0] == most[1] > 0


def test_loss_without_gradients_makes_no_buffers_for_them():
    hidden, output, labels = problem()
    with torch.no_grad(), Shapes() as shapes:
        total = cross_entropy_sum(hidden, output, labels)
    assert_matches(total, expected(hidden, output, labels)[0])
    assert (BATCH * LENGTH, VOCABULARY) in shapes.seen, "the logits, so that the mode saw the loss at work"
    assert (VOCABULARY, DIM) not in shapes.seen


def distributed_problem(
    mesh, vocabulary: int = VOCABULARY, *, replicated: bool = False
) -> tuple[DTensor, nn.Linear, torch.Tensor]:
    hidden, output, labels = problem(vocabulary=vocabulary)
    placement = Replicate() if replicated else Shard(0)
    output.weight = nn.Parameter(distribute_tensor(output.weight.detach(), mesh, [placement]))
    return distribute_tensor(hidden.detach(), mesh, [Shard(1)]).requires_grad_(), output, labels


def check_tensor_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    # 18 rows over 4 ranks are 5, 5, 5 and 3.
    for vocabulary, factor in ((VOCABULARY, 1.0), (18, -0.37)):
        ours = actual(*distributed_problem(mesh, vocabulary), factor)
        theirs = expected(*problem(vocabulary=vocabulary), factor)
        labels = set(problem(vocabulary=vocabulary)[2].flatten().tolist()) - {IGNORED}
        rows = -(-vocabulary // world)
        assert {label // rows for label in labels} == set(range(world)), "labels must lie in every slice"
        assert ours[1].placements == (Shard(1),)
        assert ours[2].placements == (Shard(0),)
        assert_all_match((ours[0], ours[1].full_tensor(), ours[2].full_tensor()), theirs)
        each = cross_entropy_each(*distributed_problem(mesh, vocabulary))
        assert_each_matches(each, *problem(vocabulary=vocabulary))
        hidden, output, _ = distributed_problem(mesh, vocabulary)
        labels, correct = answers(*problem(vocabulary=vocabulary)[:2])
        assert torch.equal(correct_each(hidden, output, labels), correct)
        with torch.no_grad():
            output.weight.zero_()
        assert torch.equal(correct_each(hidden, output, labels.clamp(0, 1)), labels.clamp(0, 1) == 0)


@pytest.mark.parametrize("world", [2, 4])
def test_loss_under_tensor_parallel_equals_one_process(pool, world):
    pool.run(world, check_tensor_parallel)


def refusals(rank: int, world: int) -> list[str]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    hidden, output, labels = distributed_problem(mesh)
    texts = []
    for refused in (distributed_problem(mesh, replicated=True), (hidden.to_local(), output, labels)):
        try:
            cross_entropy_sum(*refused)
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_loss_refuses_weights_and_hidden_states_that_are_cut_another_way(pool):
    of_weight, of_hidden = pool.run(2, refusals)[0]
    assert "Replicate()" in of_weight
    assert "must be Shard(0)" in of_weight
    assert "hidden is not" in of_hidden


def reduced_numbers(rank: int, world: int) -> list[int]:
    """How many numbers each reduction of the loss sends."""
    sizes = []
    reduce = dist.all_reduce

    def counted(tensor, *args, **options):
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **options)

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    inputs = distributed_problem(mesh)
    dist.all_reduce = counted
    try:
        cross_entropy_sum(*inputs)
    finally:
        dist.all_reduce = reduce
    return sizes


def test_loss_under_tensor_parallel_reduces_three_numbers_a_token_and_no_logits(pool):
    assert pool.run(2, reduced_numbers) == [[BATCH * LENGTH, 2 * BATCH * LENGTH]] * 2
