"""What bench_attention measures: problems, methods, how each would cut the ranks, and what each should send."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from kernel_calls import Place, exchange_pieces, ring_pieces
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel
from cptrain.context_parallel.attention import sends_needed_only
from cptrain.context_parallel.kernels import choose_kernel
from cptrain.context_parallel.layout import make_layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import shard_blocks, whole_blocks
from cptrain.context_parallel.traffic import Call, attention_traffic, num_bytes
from cptrain.distributed.divide import divisors, valid_ulysses_degrees

METHODS = ("ring", "ulysses", "hybrid", "all_gather", "double_ring")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
PASSES = ("fwd", "fwd+bwd")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One global attention problem. mask: "causal", "full" or "window:W"."""

    seq_len: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    mask: str
    batch: int = 1

    @property
    def description(self) -> Mask:
        kind, _, window = self.mask.partition(":")
        return Mask(causal=kind != "full", window=int(window or 0))

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.dim)

    def title(self) -> str:
        return f"S {self.seq_len:,}, {self.heads}:{self.kv_heads} heads of {self.dim}, {self.dtype}, {self.mask}"

    def tensors(self, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Random q, k, v and the gradient of the output for so many tokens, stored [B, T, H, D] as models do."""
        generator = torch.Generator(device).manual_seed(tokens)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, tokens, count, self.dim) for count in heads]
        return tuple(
            torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype]).transpose(1, 2)
            for shape in shapes
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One method on so many ranks. Degrees of 0 are the largest proper divisor that fits."""

    method: str
    ranks: int
    layout: str = "zigzag"
    overlap: bool = True
    ulysses_degree: int = 0
    inner_degree: int = 0

    def title(self) -> str:
        return self.method if self.overlap else f"{self.method}, no overlap"

    def degrees(self, problem: Problem) -> tuple[int, int, int]:
        """(ring, ulysses, inner ring). Raises ValueError where the ranks or the heads do not allow the method."""
        heads, kv_heads, ranks = problem.heads, problem.kv_heads, self.ranks
        fitting = valid_ulysses_degrees(heads, kv_heads)
        if self.method == "ulysses":
            if ranks not in fitting:
                raise ValueError(f"{heads}:{kv_heads} heads allow degrees {fitting}")
            return 1, ranks, 1
        if self.method == "hybrid":
            ulysses = _proper(self.ulysses_degree, [d for d in divisors(ranks) if d in fitting], ranks)
            return ranks // ulysses, ulysses, 1
        if self.method == "double_ring":
            return ranks, 1, _proper(self.inner_degree, divisors(ranks), ranks)
        return ranks, 1, 1

    def check(self, problem: Problem) -> None:
        """Raises ValueError where the ranks, the heads or the length do not allow the method."""
        ring, ulysses, _ = self.degrees(problem)
        if make_layout(self.layout, ring, problem.seq_len).shard_length % ulysses:
            raise ValueError(f"{problem.seq_len} tokens do not divide over ring {ring} x ulysses {ulysses}")

    def plan(self, problem: Problem, device: torch.device, kernel: str = "auto") -> ContextParallel:
        """The plan over the ranks of the default process group. Collective."""
        ring, ulysses, inner = self.degrees(problem)
        mesh = init_device_mesh(device.type, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
        return ContextParallel(
            mesh,
            method="all_gather" if self.method == "all_gather" else "auto",
            layout=self.layout,  # type: ignore[arg-type]
            ring_inner_degree=inner,
            overlap=self.overlap,
            kernel=kernel,
        )

    def work(self, problem: Problem, rank: int) -> int:
        """(query, key) pairs that the rank computes, over all of its heads."""
        ring, ulysses, _ = self.degrees(problem)
        layout = make_layout(self.layout, ring, problem.seq_len)
        pairs = sum(
            block.num_pairs
            for source in range(ring)
            for block in shard_blocks(layout, problem.description, rank // ulysses, source)
        )
        return pairs * problem.heads // ulysses

    def num_calls(self, problem: Problem, rank: int, place: Place) -> int:
        """Kernel calls that the rank makes forward, for each piece of its heads that keys come in."""
        ring, ulysses, inner = self.degrees(problem)
        layout, mask = make_layout(self.layout, ring, problem.seq_len), problem.description
        if ring == 1 or self.method == "all_gather":
            pieces = [whole_blocks(layout, mask, rank // ulysses)]
        elif sends_needed_only(layout, mask):
            pieces = exchange_pieces(layout, mask, rank // ulysses, place)
        else:
            pieces = ring_pieces(layout, mask, rank // ulysses, place, inner)
        return place.num_calls(pieces)

    def slowest_rank(self, problem: Problem, device_type: str, kernel: str = "auto") -> int:
        """The rank with the most work; of several the one with the most kernel calls, and of these the last.

        The last one has the most hops that compute.
        """
        chosen = choose_kernel(device_type, DTYPES[problem.dtype], key_dim=problem.dim, name=kernel)
        _, ulysses, _ = self.degrees(problem)
        place = Place(
            device=device_type,
            kernel=chosen,
            dtype=DTYPES[problem.dtype],
            heads_per_key=problem.heads // max(problem.kv_heads, ulysses),
            batch=problem.batch,
        )

        def key(rank: int) -> tuple[int, int, int]:
            return self.work(problem, rank), self.num_calls(problem, rank, place), rank

        return max(range(self.ranks), key=key)


def _proper(wanted: int, allowed: list[int], ranks: int) -> int:
    """The wanted divisor, or the largest that is neither 1 nor all."""
    proper = [d for d in allowed if 1 < d < ranks]
    if not proper or (wanted and wanted not in proper):
        raise ValueError(f"{ranks} ranks allow degrees {proper or 'none'}")
    return wanted or proper[-1]


def sent_bytes(problem: Problem, variant: Variant, rank: int) -> dict[str, int]:
    """What the formulas say that this rank sends, by pass."""
    ring, ulysses, _ = variant.degrees(problem)
    forward, backward = attention_traffic(
        Call(
            batch=problem.batch,
            heads=problem.heads,
            kv_heads=problem.kv_heads,
            key_dim=problem.dim,
            value_dim=problem.dim,
            itemsize=DTYPES[problem.dtype].itemsize,
        ),
        problem.description,
        make_layout(variant.layout, ring, problem.seq_len),
        ring_rank=rank // ulysses,
        gathers=variant.method == "all_gather",
        ulysses_degree=ulysses,
    )
    return dict(zip(PASSES, (num_bytes(forward), num_bytes(forward + backward)), strict=True))
