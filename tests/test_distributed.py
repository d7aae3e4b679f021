"""Degrees from settings: every valid combination resolves, everything else is refused with a way out."""

from __future__ import annotations

import itertools
import math

import pytest

from cptrain.distributed.divide import divisors, valid_ulysses_degrees
from cptrain.distributed.settings import (
    CommConfig,
    Degrees,
    ParallelismConfig,
    choose_degrees,
    resolve_degrees,
    sequence_multiple,
)

# short names of the keys that the tables below set
KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "context": "context_parallel_degree",
    "method": "context_parallel_method",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "inner": "ring_inner_degree",
    "tp": "tensor_parallel_degree",
}


def resolve(world: int, heads: tuple[int, int] = (8, 2), *, windowed: bool = False, **keys):
    config = ParallelismConfig(**{KEYS[name]: value for name, value in keys.items()})
    return resolve_degrees(config, world_size=world, num_heads=heads[0], num_kv_heads=heads[1], windowed=windowed)


@pytest.mark.parametrize(
    ("world", "heads", "keys", "expected"),
    [
        (1, (8, 2), {}, Degrees()),
        (8, (8, 2), {}, Degrees(dp_shard=8)),
        (8, (8, 2), {"shard": 8}, Degrees(dp_shard=8)),
        (8, (8, 2), {"replicate": 2}, Degrees(dp_replicate=2, dp_shard=4)),
        (8, (8, 2), {"ring": 4}, Degrees(dp_shard=2, ring=4)),
        (8, (8, 2), {"ulysses": 4}, Degrees(dp_shard=2, ulysses=4)),
        (8, (8, 2), {"ring": 2, "ulysses": 2, "tp": 2}, Degrees(ring=2, ulysses=2, tp=2)),
        (8, (8, 2), {"replicate": 2, "shard": 1, "ring": 2, "tp": 2}, Degrees(dp_replicate=2, ring=2, tp=2)),
        (8, (8, 2), {"context": 8, "ring": 2}, Degrees(ring=2, ulysses=4)),
        (8, (8, 2), {"context": 8, "ulysses": 2}, Degrees(ring=4, ulysses=2)),
        (8, (8, 2), {"context": 4, "method": "ring"}, Degrees(dp_shard=2, ring=4)),
        (8, (8, 2), {"context": 4, "method": "all_gather"}, Degrees(dp_shard=2, ring=4)),
        (8, (8, 2), {"context": 4, "method": "ulysses"}, Degrees(dp_shard=2, ulysses=4)),
        (8, (8, 2), {"context": 8, "method": "hybrid"}, Degrees(ring=2, ulysses=4)),
        (6, (6, 6), {"context": 6, "method": "hybrid"}, Degrees(ring=2, ulysses=3)),
        (4, (8, 2), {"ring": 4, "inner": 2}, Degrees(ring=4)),
        (4, (8, 2), {"context": 1}, Degrees(dp_shard=4)),
    ],
)
def test_distributed_degrees_follow_from_the_settings(world, heads, keys, expected):
    assert resolve(world, heads, **keys) == (expected, [])


@pytest.mark.parametrize(
    ("total", "heads", "windowed", "ring", "ulysses", "reason"),
    [
        (1, (8, 2), False, 1, 1, "one rank"),
        (4, (8, 1), False, 4, 1, "a ring sends fewer bytes"),
        (3, (8, 2), False, 3, 1, "a ring sends fewer bytes"),
        (4, (8, 8), False, 1, 4, "fewer bytes than a ring"),
        (4, (8, 2), False, 2, 2, "ulysses over 2 ranks"),
        (16, (16, 16), False, 2, 8, "ulysses over 8 ranks"),
        (4, (2, 1), False, 4, 1, "1 kv heads per rank leave only the ring"),
        (4, (8, 8), True, 4, 1, "sliding window"),
    ],
)
def test_distributed_auto_takes_the_method_that_sends_fewest_bytes_and_says_why(
    total, heads, windowed, ring, ulysses, reason
):
    choice = choose_degrees(total, num_heads=heads[0], num_kv_heads=heads[1], tp=1, windowed=windowed)
    assert (choice.ring, choice.ulysses) == (ring, ulysses)
    assert reason in choice.reason
    assert resolve(total, heads, windowed=windowed, context=total) == (Degrees(ring=ring, ulysses=ulysses), [])


@pytest.mark.parametrize(
    ("world", "heads", "keys", "key", "rule", "fix"),
    [
        (3, (8, 2), {"tp": 3}, "tp", "8 heads and 2 kv heads allow 1, 2", ""),
        (8, (8, 2), {"tp": 0}, "tp", "must be at least 1", ""),
        (8, (8, 2), {"replicate": -1}, "replicate", "must be at least 1", ""),
        (8, (8, 2), {"shard": 0}, "shard", "must be at least 1, or -1 for all ranks left over", ""),
        (8, (8, 2), {"ring": 0}, "ring", 'must be at least 1, or "auto"', ""),
        (8, (8, 2), {"ring": 3}, "ring", "ring 3 x ulysses 1 x tensor 1 = 3 does not divide the world size 8", "of 3"),
        (2, (8, 2), {"ring": 4}, "ring", "= 4 does not divide the world size 2", "run on a multiple of 4 ranks"),
        (4, (8, 2), {"replicate": 2, "context": 8}, "context", "= 16 does not divide", "lower one of the degrees"),
        (
            1,
            (8, 2),
            {"tp": 2},
            "tp",
            "= 2 ranks are needed, and this is one",
            "nproc-per-node 2 -m cptrain.train ...` (for --dry-run: add --world-size 2), or",
        ),
        (1, (8, 2), {"context": 16}, "context", "= 16 ranks are needed", "run on a multiple of 16 ranks, or lower"),
        (8, (8, 2), {"shard": 3}, "shard", "= 3, but the world size is 8", "run on 3 ranks, or set it to -1"),
        (8, (8, 2), {"context": 8, "ring": 3}, "context", "must be ring x ulysses = 3 x 2 = 6", "correct ring_degree"),
        (8, (8, 2), {"context": 4, "ring": 2, "ulysses": 4}, "context", "= 2 x 4 = 8", "leave it out"),
        (8, (8, 2), {"context": 2, "ring": 4}, "context", "= 4 x 1 = 4", "leave it out"),
        (8, (8, 2), {"method": "ring"}, "method", "no sequence would be cut", "set context_parallel_degree"),
        (8, (8, 2), {"method": "hybrid"}, "method", "no sequence would be cut", "set context_parallel_degree"),
        (8, (8, 2), {"method": "ring", "ulysses": 2}, "ulysses", 'the method "ring" needs 1', '"hybrid"'),
        (8, (8, 2), {"method": "all_gather", "ulysses": 2}, "ulysses", 'the method "all_gather" needs 1', '"hybrid"'),
        (8, (8, 2), {"method": "ulysses", "ring": 2}, "ring", 'the method "ulysses" needs 1', '"hybrid"'),
        (8, (8, 2), {"method": "hybrid", "ring": 4}, "method", "here 4 x 1", "give ring_degree and ulysses_degree"),
        (8, (8, 1), {"method": "hybrid", "context": 2}, "method", "here 2 x 1", "give ring_degree and ulysses_degree"),
        (16, (8, 2), {"ulysses": 16}, "ulysses", "over tensor degree 1 allow 1, 2, 4, 8", "or give the rest to ring"),
        (8, (12, 4), {"ulysses": 3}, "ulysses", "12 heads and 4 kv heads over tensor degree 1 allow 1, 2, 4", "ring"),
        (
            8,
            (8, 2),
            {"ulysses": 8, "tp": 2},
            "ulysses",
            "over tensor degree 2 allow 1, 2, 4",
            "or give the rest to ring",
        ),
        (8, (8, 2), {"ring": 4, "inner": 3}, "inner", "must divide the ring of 4: 1, 2, 4", "set it to 1"),
        (4, (8, 2), {"context": 4, "method": "all_gather", "inner": 2}, "inner", "all_gather has no ring", '"ring"'),
    ],
)
def test_distributed_settings_that_do_not_fit_are_refused_with_rule_and_way_out(world, heads, keys, key, rule, fix):
    degrees, (problem,) = resolve(world, heads, **keys)
    assert degrees is None or degrees.world != world
    assert problem.key == KEYS[key]
    assert rule in problem.rule
    assert fix in problem.fix
    assert bool(problem.fix) == bool(fix), "a rule that lists what is allowed needs no other way out"


def test_distributed_settings_report_all_that_is_wrong_at_once():
    _, found = resolve(8, tp=0, ring=0, shard=-2)
    assert {problem.key for problem in found} == {KEYS["tp"], KEYS["ring"], KEYS["shard"]}
    _, found = resolve(8, (12, 4), tp=3, ulysses=5)
    assert [problem.key for problem in found] == [KEYS["ulysses"], KEYS["tp"]]


def test_distributed_degrees_always_multiply_to_the_world_and_keep_heads_whole():
    resolved = 0
    methods = ("auto", "ring", "ulysses", "hybrid", "all_gather")
    for world, heads, context, method, tp in itertools.product(
        (1, 2, 6, 8), ((8, 8), (8, 2), (12, 4), (6, 1)), ("auto", 1, 2, 3, 4, 8), methods, (1, 2)
    ):
        degrees, found = resolve(world, heads, context=context, method=method, tp=tp)
        if found or degrees is None:
            assert found
            assert degrees is None or degrees.world != world
            continue
        resolved += 1
        assert degrees.world == world == degrees.data * degrees.context * degrees.tp
        assert degrees.fsdp == degrees.dp_shard * degrees.context
        assert context in ("auto", degrees.context)
        assert degrees.ulysses in valid_ulysses_degrees(*heads, tp)
        assert method != "ulysses" or degrees.ring == 1
        assert method not in ("ring", "all_gather") or degrees.ulysses == 1
    assert resolved > 200


def meets_its_own_kv_heads(heads: int, kv_heads: int, degree: int) -> bool:
    """Whether local grouping of heads on every rank is the global one, dealing them out head by head."""
    repeats = degree // kv_heads if kv_heads < degree else 1
    keys = [k for k in range(kv_heads) for _ in range(repeats)]
    if heads % degree or len(keys) % degree or (heads // degree) % (len(keys) // degree):
        return False
    group = heads // degree // (len(keys) // degree)
    for rank in range(degree):
        here = keys[rank * len(keys) // degree : (rank + 1) * len(keys) // degree]
        for local in range(heads // degree):
            query = rank * heads // degree + local
            if here[local // group] != query // (heads // kv_heads):
                return False
    return True


def test_distributed_ulysses_degrees_are_those_at_which_every_query_meets_its_kv_head():
    for heads in range(1, 33):
        for kv_heads in divisors(heads):
            for tp in divisors(math.gcd(heads, kv_heads)):
                expected = [
                    u for u in range(1, heads // tp + 1) if meets_its_own_kv_heads(heads // tp, kv_heads // tp, u)
                ]
                assert valid_ulysses_degrees(heads, kv_heads, tp) == expected, (heads, kv_heads, tp)


def test_distributed_divisors_are_all_there_are_and_found_at_once_for_large_numbers():
    for number in range(1, 200):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert len(divisors(10**12)) == 13**2


@pytest.mark.parametrize(
    ("degrees", "multiple"),
    [
        (Degrees(ring=4), 8),
        (Degrees(ring=4, dp_shard=2), 8),
        (Degrees(ring=2, tp=2), 4),
        (Degrees(ring=2, ulysses=2, tp=4), 16),
        (Degrees(ring=2, tp=3), 12),
    ],
)
def test_distributed_sequence_multiple_leaves_even_halves_and_tensor_parallel_parts(degrees, multiple):
    assert sequence_multiple(degrees) == multiple
    local = multiple // degrees.context
    assert local % 2 == 0
    assert local % degrees.tp == 0


@pytest.mark.parametrize(("init", "train"), [(0, -1), (10**15, 365 * 24 * 3600 + 1)])
def test_distributed_timeouts_are_positive_and_a_year_at_most(init, train):
    found = [problem.key for problem in CommConfig(init_timeout_seconds=init, train_timeout_seconds=train).problems()]
    assert found == ["init_timeout_seconds", "train_timeout_seconds"]
    assert list(CommConfig().problems()) == []
