"""Settings of the mesh: how many ranks go to which axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from cptrain.config import Problem, setting
from cptrain.distributed.divide import divisors, valid_ulysses_degrees

MOST_OF_A_NODE = 8  # ranks that one torchrun starts
MOST_SECONDS = 365 * 24 * 3600  # of a timeout: a year
Order = Literal["head_first", "context_first"]
Method = Literal["auto", "ring", "ulysses", "hybrid", "all_gather"]


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """How the ranks are divided: world = replicate x shard x context (ring x ulysses) x tensor."""

    data_parallel_replicate_degree: int = setting(1, "copies of the sharded model (HSDP), in groups of ranks")
    data_parallel_shard_degree: int = setting(-1, "FSDP2 ranks that read different data; -1 = all ranks left over")
    context_parallel_degree: int | Literal["auto"] = setting(
        "auto", "ranks that share one sequence; auto = ring_degree x ulysses_degree"
    )
    context_parallel_method: Method = setting(
        "auto", "ring (P2P), ulysses (all-to-all), hybrid (both), all_gather, or auto by the bytes each would send"
    )
    ring_degree: int | Literal["auto"] = setting("auto", "ranks in the ring; auto = what the method leaves to it")
    ulysses_degree: int | Literal["auto"] = setting("auto", "ranks that exchange heads for sequence (all-to-all)")
    context_parallel_layout: Literal["auto", "zigzag", "contiguous", "balanced"] = setting(
        "auto",
        "which tokens a rank holds: zigzag is even work under a causal mask; balanced deals chunks for every batch, so "
        "that data.document_mask is even work; auto = what the mask needs",
    )
    chunk_size: int | Literal["auto"] = setting(
        "auto", "tokens of a chunk that the balanced layout deals; auto = about a sixteenth of a ring rank's tokens"
    )
    ring_inner_degree: int = setting(1, "ranks of an inner ring on the fast link (double ring); 1 = a single ring")
    context_parallel_order: Order = setting(
        "head_first", "which ranks are neighbours: head_first puts ulysses inside the ring, context_first the ring"
    )
    attention_kernel: Literal["auto", "cpu flash", "cuda flash", "cudnn", "fa3", "fa4", "efficient", "reference"] = (
        setting(
            "auto",
            "what computes one block of attention; auto = the fastest for device and dtype; fa3 and fa4 are "
            "FlashAttention's own packages",
        )
    )
    context_parallel_overlap: bool = setting(True, "compute while keys travel; false measures what that is worth")
    tensor_parallel_degree: int = setting(1, "ranks that share each weight matrix (Megatron TP + sequence parallel)")
    fsdp_reduce_each_microbatch: bool = setting(
        False, "accumulate sharded gradients (one reduction per micro-batch) instead of whole ones (one per step)"
    )
    fsdp_reshard_after_forward: bool = setting(
        True, "free a block's gathered parameters after its forward; false gathers once a step and keeps them"
    )

    def problems(self) -> Iterator[Problem]:
        """Everything wrong that can be seen without the world size or the model."""
        for key in ("data_parallel_replicate_degree", "tensor_parallel_degree", "ring_inner_degree"):
            if getattr(self, key) < 1:
                yield Problem(key=key, rule="must be at least 1")
        if self.data_parallel_shard_degree < 1 and self.data_parallel_shard_degree != -1:
            yield Problem(key="data_parallel_shard_degree", rule="must be at least 1, or -1 for all ranks left over")
        for key in ("context_parallel_degree", "ring_degree", "ulysses_degree", "chunk_size"):
            value = getattr(self, key)
            if value != "auto" and value < 1:
                yield Problem(key=key, rule='must be at least 1, or "auto"')


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """The resolved size of every mesh axis, outermost first; `tp` is innermost, on the fastest link."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def context(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP2 shards each parameter."""
        return self.dp_shard * self.context

    @property
    def world(self) -> int:
        return self.data * self.context * self.tp


def resolve_degrees(
    config: ParallelismConfig, *, world_size: int, num_heads: int, num_kv_heads: int, windowed: bool = False
) -> tuple[Degrees | None, list[Problem]]:
    """The size of every axis for a world and a model, and everything that stands against it.

    Where only the number of ranks is wrong, the degrees come with that: what they cut can be checked nevertheless.
    num_heads, num_kv_heads: both 0 where they are not known; a context degree that they would divide is then all ring.
    windowed: whether the model has sliding windows, which weighs in what "auto" chooses.
    """
    found = [problem for problem in config.problems() if problem.key != "chunk_size"]  # which divides no ranks
    if found:
        return None, found
    tp, replicate = config.tensor_parallel_degree, config.data_parallel_replicate_degree
    split = _split_context(config, num_heads=num_heads, num_kv_heads=num_kv_heads, windowed=windowed, problems=found)
    if num_heads % tp or num_kv_heads % tp:
        both = divisors(math.gcd(num_heads, num_kv_heads))
        found.append(
            Problem(
                key="tensor_parallel_degree",
                rule=f"{num_heads} heads and {num_kv_heads} kv heads allow {_listed(both)}",
            )
        )
    if split is None or found:
        return None, found
    ring, ulysses = split
    degrees = Degrees(dp_replicate=replicate, ring=ring, ulysses=ulysses, tp=tp)
    fixed, terms = degrees.world, f"replicate {replicate} x ring {ring} x ulysses {ulysses} x tensor {tp}"
    shard = config.data_parallel_shard_degree
    if shard == -1:
        if world_size % fixed:
            found.append(_too_large(config, degrees, f"{terms} = {fixed}", world_size))
        shard = max(1, world_size // fixed)
    elif shard * fixed != world_size:
        found.append(
            Problem(
                key="data_parallel_shard_degree",
                rule=f"shard {shard} x {terms} = {shard * fixed}, but the world size is {world_size}",
                fix=f"run on {shard * fixed} ranks, or set it to -1",
            )
        )
    return replace(degrees, dp_shard=shard), found


def _too_large(config: ParallelismConfig, degrees: Degrees, product: str, world_size: int) -> Problem:
    """What to say of degrees that do not divide the world; the largest one is blamed, by the key that gives it."""
    ring_key, ulysses_key = (
        "context_parallel_degree" if getattr(config, key) == "auto" else key
        for key in ("ring_degree", "ulysses_degree")
    )
    given = [
        (degrees.dp_replicate, "data_parallel_replicate_degree"),
        (degrees.ring, ring_key),
        (degrees.ulysses, ulysses_key),
        (degrees.tp, "tensor_parallel_degree"),
    ]
    fixed, above_1 = degrees.world, {key for degree, key in given if degree > 1}
    lower = f"lower {max(given)[1] if len(above_1) == 1 else 'one of the degrees'}"
    rule, fix = f"{product} does not divide the world size {world_size}", f"run on a multiple of {fixed} ranks"
    if world_size == 1:  # most likely nobody thought of a launcher
        rule = f"{product} ranks are needed, and this is one"
        if fixed <= MOST_OF_A_NODE:
            fix = f"start {fixed} with `torchrun --nproc-per-node {fixed} -m cptrain.train ...`"
            fix += f" (for --dry-run: add --world-size {fixed})"
    return Problem(key=max(given)[1], rule=rule, fix=f"{fix}, or {lower}")


def _listed(values: list[int]) -> str:
    return ", ".join(str(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """What `context_parallel_method = "auto"` makes of a number of ranks, and why."""

    ring: int
    ulysses: int
    reason: str


def choose_degrees(total: int, *, num_heads: int, num_kv_heads: int, tp: int, windowed: bool) -> AutoChoice:
    """How `total` ranks share a sequence best, by the bytes that each method sends per rank, token and layer.

    With k bytes of keys and values per token and r of queries, a ring sends (N-1) k and Ulysses (N-1)/N (2 r + k), in
    units of a rank's tokens: the ring is cheaper iff N < 2/3 (1 + G) for G query heads per kv head. Between the two,
    Ulysses over as many ranks as there are kv heads (at most 8, a node) divides the ring's hops by its degree.
    """
    valid = [u for u in valid_ulysses_degrees(num_heads, num_kv_heads, tp) if total % u == 0]
    whole_groups = [u for u in valid if u <= min(8, max(1, num_kv_heads // tp))]
    group = num_heads // num_kv_heads
    if total == 1:
        return AutoChoice(ring=1, ulysses=1, reason="one rank")
    if windowed:
        return AutoChoice(ring=total, ulysses=1, reason="a ring sends only the keys that the sliding window reaches")
    if total < 2 / 3 * (1 + group):
        return AutoChoice(
            ring=total, ulysses=1, reason=f"{total} ranks and {group} query heads per kv head: a ring sends fewer bytes"
        )
    inner = max(whole_groups, default=1)
    if inner == total:
        return AutoChoice(ring=1, ulysses=total, reason="an all-to-all of whole kv heads sends fewer bytes than a ring")
    if inner > 1:
        return AutoChoice(
            ring=total // inner,
            ulysses=inner,
            reason=f"ulysses over {inner} ranks of whole kv heads inside a ring of {total // inner}",
        )
    return AutoChoice(ring=total, ulysses=1, reason=f"{num_kv_heads // tp} kv heads per rank leave only the ring")


def heads_decide(config: ParallelismConfig) -> bool:
    """Whether the heads have a say in how many of the ranks of a context degree are a ring."""
    given = config.context_parallel_degree != "auto" and config.context_parallel_method in ("auto", "hybrid")
    return given and config.ring_degree == config.ulysses_degree == "auto"


def _split_context(
    config: ParallelismConfig, *, num_heads: int, num_kv_heads: int, windowed: bool, problems: list[Problem]
) -> tuple[int, int] | None:
    """(ring, ulysses) degrees from the method and whichever of the three degrees are given."""
    method, total = config.context_parallel_method, config.context_parallel_degree
    ring, ulysses = config.ring_degree, config.ulysses_degree
    tp = config.tensor_parallel_degree
    valid = valid_ulysses_degrees(num_heads, num_kv_heads, tp)
    if method != "auto" and total == ring == ulysses == "auto":
        problems.append(
            Problem(
                key="context_parallel_method",
                rule="nothing says over how many ranks, so no sequence would be cut",
                fix='set context_parallel_degree, or leave the method at "auto"',
            )
        )
        return None
    if method in ("ring", "all_gather") and ulysses == "auto":
        ulysses = 1
    if method == "ulysses" and ring == "auto":
        ring = 1
    if total == "auto":
        # Nothing says how many ranks: a degree that is not given is 1.
        ring, ulysses = (1 if degree == "auto" else degree for degree in (ring, ulysses))
        total = ring * ulysses
    elif ring == "auto" and ulysses == "auto":
        if not num_heads:
            ring, ulysses = total, 1
        elif method == "auto":
            choice = choose_degrees(total, num_heads=num_heads, num_kv_heads=num_kv_heads, tp=tp, windowed=windowed)
            ring, ulysses = choice.ring, choice.ulysses
        else:
            inner = max([u for u in valid if total % u == 0 and u < total], default=1)
            ring, ulysses = total // inner, inner
    elif ring == "auto":
        ring = max(1, int(total) // int(ulysses))
    elif ulysses == "auto":
        ulysses = max(1, int(total) // int(ring))
    ring, ulysses = int(ring), int(ulysses)
    before, known = len(problems), num_heads > 0 or not heads_decide(config)
    if ring * ulysses != total:
        problems.append(
            Problem(
                key="context_parallel_degree",
                rule=f"must be ring x ulysses = {ring} x {ulysses} = {ring * ulysses}",
                fix="leave it out, or correct ring_degree or ulysses_degree",
            )
        )
    if method in ("ring", "all_gather") and ulysses != 1:
        problems.append(
            Problem(
                key="ulysses_degree",
                rule=f'the method "{method}" needs 1',
                fix='set context_parallel_method = "hybrid"',
            )
        )
    if method == "ulysses" and ring != 1:
        problems.append(
            Problem(
                key="ring_degree", rule='the method "ulysses" needs 1', fix='set context_parallel_method = "hybrid"'
            )
        )
    if method == "hybrid" and total > 1 and (ring == 1 or ulysses == 1) and known:
        problems.append(
            Problem(
                key="context_parallel_method",
                rule=f"hybrid needs a ring and a ulysses degree above 1, here {ring} x {ulysses}",
                fix="give ring_degree and ulysses_degree, or use auto",
            )
        )
    if ulysses > 1 and valid and ulysses not in valid:  # without any, the tensor degree is at fault
        problems.append(
            Problem(
                key="ulysses_degree",
                rule=f"{num_heads} heads and {num_kv_heads} kv heads over tensor degree {tp} allow {_listed(valid)}",
                fix="or give the rest to ring_degree",
            )
        )
    if ring % config.ring_inner_degree and known:
        problems.append(
            Problem(
                key="ring_inner_degree",
                rule=f"must divide the ring of {ring}: {_listed(divisors(ring))}",
                fix="set it to 1 for a single ring",
            )
        )
    if config.ring_inner_degree > 1 and method == "all_gather":
        problems.append(
            Problem(key="ring_inner_degree", rule="all_gather has no ring", fix='set context_parallel_method = "ring"')
        )
    return (ring, ulysses) if len(problems) == before else None


def sequence_multiple(degrees: Degrees) -> int:
    """What divides the global sequence length: zigzag halves each shard, sequence parallel cuts it by tp."""
    return degrees.context * math.lcm(2 if degrees.context > 1 else 1, degrees.tp)


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """Process groups: how long a collective may take before the run is given up."""

    init_timeout_seconds: int = setting(600, "seconds for collectives during start, loading and the first step")
    train_timeout_seconds: int = setting(600, "seconds for collectives in later steps; must exceed one whole step")

    def problems(self) -> Iterator[Problem]:
        for key in ("init_timeout_seconds", "train_timeout_seconds"):
            if not 1 <= getattr(self, key) <= MOST_SECONDS:
                yield Problem(key=key, rule=f"must be a number of seconds from 1 to {MOST_SECONDS}, a year")
