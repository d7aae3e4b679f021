"""How many messages, bytes and kernel calls a step costs, and that selective checkpointing repeats none of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import loss_sum, plan, small_batch, small_model
from tolerance import assert_matches
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from cptrain.context_parallel import ContextParallel, keep_attention, ulysses
from cptrain.context_parallel import attention as operator
from cptrain.parallel.activation_checkpoint import apply_activation_checkpoint

LAYERS = 2


class Log(list):
    """What happened, in order: ("send", bytes, group), ("all to all", bytes, group), ("forward",), ("backward",)."""

    def take(self) -> Counter:
        """Number of events of each kind so far; starts anew."""
        counts = Counter(event[0] for event in self)
        self.clear()
        return counts


@contextmanager
def logged() -> Iterator[Log]:
    """Logs all point-to-point and all-to-all messages of this process, and the kernel calls of the ring operator."""
    log = Log()
    send, exchange, choose = dist.batch_isend_irecv, ulysses.all_to_all, operator.choose_kernel

    def counted_send(operations):
        sent = [op for op in operations if op.op is dist.isend]
        log.extend(("send", op.tensor.nbytes, op.group.group_name) for op in sent)
        return send(operations)

    def counted_exchange(group, pairs):
        before = len(log)
        works = exchange(group, pairs)
        log[before:] = [("all to all", sum(event[1] for event in log[before:]), group)]
        return works

    def counted_kernel(*args, **options):
        kernel = choose(*args, **options)
        return dataclasses.replace(
            kernel,
            forward=lambda *a: (log.append(("forward",)), kernel.forward(*a))[1],
            backward=lambda *a: (log.append(("backward",)), kernel.backward(*a))[1],
        )

    with (
        mock.patch.object(dist, "batch_isend_irecv", counted_send),
        mock.patch.object(ulysses, "all_to_all", counted_exchange),
        mock.patch.object(operator, "choose_kernel", counted_kernel),
    ):
        yield log


def step_of_a_model(ring_degree: int, ulysses_degree: int, mode: str) -> tuple[Counter, Counter]:
    """Events of forward and backward on this rank; loss and gradients are checked against one process."""
    inputs = small_batch(8 * ring_degree * ulysses_degree)
    reference = small_model(num_layers=LAYERS)
    expected = loss_sum(reference, *inputs)
    expected.backward()

    model, cp = small_model(num_layers=LAYERS), plan(ring_degree, ulysses_degree)
    cp.apply(model, modules="layers.*.attention")
    apply_activation_checkpoint(model, mode)  # type: ignore[arg-type]
    with logged() as log:
        loss = loss_sum(model, *cp.shard(*inputs))
        forward = log.take()
        loss.backward()
        backward = log.take()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert_matches(total, expected.detach())
    for parameter, whole in zip(model.parameters(), reference.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        assert_matches(parameter.grad, whole.grad)
    return forward, backward


def attention_of_a_shard(layout: str, causal: bool, dtype: torch.dtype) -> tuple[Log, Log, int]:
    """Logs of one attention's forward and backward on a ring of all ranks, and the bytes of its keys and values."""
    cp = plan(dist.get_world_size(), layout=layout)
    q, k, v = (torch.randn(2, heads, 6, 4, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    with logged() as log:
        out = cp.attention(q, k, v, is_causal=causal)
        forward = Log(log)
        out.sum().backward()
    return forward, Log(log[len(forward) :]), k.nbytes + v.nbytes


PLANS = {2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(4, 1), (2, 2)]}
CASES = [(world, degrees) for world, plans in PLANS.items() for degrees in plans]
each_plan = pytest.mark.parametrize(("world", "degrees"), CASES, ids=[f"ring {r} x ulysses {u}" for _, (r, u) in CASES])
MODES = ("none", "selective", "full")
LAYOUTS = [("contiguous", True), ("zigzag", True), ("contiguous", False)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def steps_on_all_plans(rank: int, world: int) -> dict:
    return {(degrees, mode): step_of_a_model(*degrees, mode) for degrees in PLANS[world] for mode in MODES}


def attention_in_all_ways(rank: int, world: int) -> dict:
    return {(*way, dtype): attention_of_a_shard(*way, dtype) for way in LAYOUTS for dtype in DTYPES}


@pytest.fixture(scope="module")
def steps(pool) -> dict[int, list[dict]]:
    """World size -> of each rank, ((ring, ulysses), mode) -> events of a step of a model."""
    return {world: pool.run(world, steps_on_all_plans) for world in PLANS}


@pytest.fixture(scope="module")
def attentions(pool) -> dict[int, list[dict]]:
    """World size -> of each rank, (layout, causal, dtype) -> events of one attention."""
    return {world: pool.run(world, attention_in_all_ways) for world in (1, 2, 3, 4)}


def once(ring_degree: int, ulysses_degree: int) -> tuple[Counter, Counter]:
    """Events of a model's forward and backward where nothing is repeated; Ulysses exchanges q, k, v as one, and out."""
    n, exchanges = ring_degree, 2 if ulysses_degree > 1 else 0
    forward = {"forward": n, "send": n - 1, "all to all": exchanges}
    backward = {"backward": n, "send": (n - 2) + (n - 1) if n > 1 else 0, "all to all": exchanges}
    return tuple(Counter({key: LAYERS * value for key, value in side.items()}) for side in (forward, backward))


@pytest.mark.parametrize("mode", ["none", "selective"])
@each_plan
def test_messages_and_kernels_are_not_repeated_without_and_with_selective_checkpointing(steps, world, degrees, mode):
    for of_rank in steps[world]:
        assert of_rank[degrees, mode] == once(*degrees)


@each_plan
def test_messages_and_kernels_of_forward_are_repeated_by_full_checkpointing(steps, world, degrees):
    forward, backward = once(*degrees)
    for of_rank in steps[world]:
        assert of_rank[degrees, "full"] == (forward, backward + forward)


class Foreign(nn.Module):
    """A module of somebody else that attends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.weight
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) * self.weight


def checkpointed_steps(rank: int, world: int) -> dict:
    """(ring, ulysses), what checkpointing of a foreign model is told -> events of a step of it."""
    found = {}
    for degrees in PLANS[world]:
        for keeps, options in (("attention", {"context_fn": keep_attention}), ("nothing", {})):
            model, cp = nn.Sequential(*(Foreign() for _ in range(LAYERS))), plan(*degrees)
            cp.apply(model, modules="?")
            x = torch.ones(1, 4, 6, 4, requires_grad=True)
            with logged() as log:
                for layer in model:
                    x = checkpoint(layer, x, use_reentrant=False, **options)
                forward = log.take()
                x.sum().backward()
                found[degrees, keeps] = forward, log.take()
    return found


@pytest.mark.parametrize("world", PLANS)
def test_messages_of_a_foreign_module_are_not_repeated_if_checkpointing_keeps_attention(pool, world):
    for of_rank in pool.run(world, checkpointed_steps):
        for degrees in PLANS[world]:
            forward, backward = once(*degrees)
            assert of_rank[degrees, "attention"] == (forward, backward)
            assert of_rank[degrees, "nothing"] == (forward, backward + forward)


def sent(log: Log) -> list[int]:
    return [event[1] for event in log if event[0] == "send"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_messages_of_the_ring_have_the_bytes_of_the_formula(attentions, world, dtype):
    widening = 2 if dtype == torch.bfloat16 else 1
    for of_rank in attentions[world]:
        forward, backward, m = of_rank["zigzag", True, dtype]
        assert sum(sent(forward)) == (world - 1) * m
        assert sum(sent(backward)) == (world - 2) * m + (world - 1) * widening * m


@pytest.mark.parametrize(("layout", "causal"), LAYOUTS)
def test_messages_are_posted_by_all_ranks_before_the_blocks_they_hide_behind(attentions, layout, causal):
    for rank, of_rank in enumerate(attentions[3]):
        forward, backward, _ = of_rank[layout, causal, torch.float64]
        # Under a contiguous causal layout rank 0 sees no key of another rank, yet passes on what it holds.
        blocks = [1 if not causal or layout == "zigzag" or hop <= rank else 0 for hop in range(3)]
        expected = ["send"] + ["forward"] * blocks[0] + ["send"] + ["forward"] * (blocks[1] + blocks[2])
        assert [event[0] for event in forward] == expected
        assert len(sent(backward)) == 3
        assert backward[0][0] == "send"


def test_messages_of_gradients_have_a_communicator_of_their_own(attentions):
    for of_rank in attentions[4]:
        forward, backward, _ = of_rank["zigzag", True, torch.float64]
        (of_keys,) = {event[2] for event in forward if event[0] == "send"}
        groups = Counter(event[2] for event in backward if event[0] == "send")
        assert groups.pop(of_keys) == 2, "N - 2 hops of keys"
        assert list(groups.values()) == [3], "N - 1 of gradients, beside them"


def exchange_of_a_window(rank: int, world: int) -> tuple[Counter, Counter]:
    """Messages by communicator, forward and backward, where only keys that a window reaches travel."""
    cp = plan(world)
    q, k, v = (torch.randn(1, heads, 16, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    with logged() as log:
        out = cp.attention(q, k, v, is_causal=True, window_size=3)
        forward = Counter(event[2] for event in log if event[0] == "send")
        log.clear()
        out.sum().backward()
    return forward, Counter(event[2] for event in log if event[0] == "send")


def test_messages_of_gradients_of_an_exchange_have_a_communicator_of_their_own(pool):
    for forward, backward in pool.run(4, exchange_of_a_window):
        ((of_keys, sent),) = forward.items()
        assert backward.pop(of_keys) == sent, "keys once more"
        assert list(backward.values()) == [sent], "and the gradients of as many, beside them"


def test_messages_of_one_rank_are_none(attentions):
    forward, backward, _ = attentions[1][0]["zigzag", True, torch.float64]
    assert (forward, backward) == ([("forward",)], [("backward",)])


class _Waited:
    """A message that is in flight until it is waited for."""

    def __init__(self, work: dist.Work, in_flight: set[int]) -> None:
        self._work, self._in_flight = work, in_flight
        in_flight.add(id(self))

    def wait(self) -> None:
        self._work.wait()
        self._in_flight.discard(id(self))


def in_flight_at_blocks(rank: int, world: int, options: dict) -> tuple[list[bool], list[bool]]:
    """Whether a message was in flight at each kernel call of one attention, forward and backward."""
    packed = options.get("layout") == "balanced"
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ring", "ulysses"))
    cp, log, in_flight = ContextParallel(mesh, **options), [], set()
    q, k, v = (torch.randn(1, heads, 8, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    names = [
        "batch_isend_irecv",
        "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor",
    ]
    originals = {name: getattr(dist, name) for name in names}

    def posted(name: str):
        def call(*args, **options):
            work = originals[name](*args, **options)
            return [_Waited(w, in_flight) for w in work] if isinstance(work, list) else _Waited(work, in_flight)

        return call

    def watched(call):
        return lambda *args: (log.append(bool(in_flight)), call(*args))[1]

    choose = operator.choose_kernel

    def kernel(*args, **options):
        found = choose(*args, **options)
        return dataclasses.replace(found, forward=watched(found.forward), backward=watched(found.backward))

    batch = cp.pack(torch.zeros(1, 8 * world, dtype=torch.int64)) if packed else nullcontext()
    with (
        mock.patch.multiple(dist, **{name: posted(name) for name in names}),
        mock.patch.object(operator, "choose_kernel", kernel),
        batch,
    ):
        out = cp.attention(q, k, v, is_causal=True)
        forward = list(log)
        out.sum().backward()
    assert not in_flight
    return forward, log[len(forward) :]


CARRIED = {
    "ring": {},
    "double ring": {"ring_inner_degree": 2},
    "all_gather": {"method": "all_gather"},
    "documents": {"layout": "balanced"},
}


@pytest.mark.parametrize("name", CARRIED)
def test_messages_travel_while_blocks_are_computed_unless_that_is_switched_off(pool, name):
    for overlap in (True, False):
        for forward, backward in pool.run(4, in_flight_at_blocks, {**CARRIED[name], "overlap": overlap}):
            # The last piece has nothing behind it forward; backward, gradients follow.
            assert any(forward) == any(backward) == overlap
            assert forward[0] == overlap and not forward[-1]
            if name == "double ring":  # the message between groups has a whole revolution to arrive
                assert all(forward[:-1]) == overlap
