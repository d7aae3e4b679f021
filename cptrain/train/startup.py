"""The check at the start of a run: does this plan compute exact attention on these ranks? A second, and one line."""

from __future__ import annotations

import logging
import math
import time

import torch
import torch.distributed as dist

from cptrain.context_parallel import ContextParallel
from cptrain.context_parallel.finding import agreed, table
from cptrain.context_parallel.layout import length_multiple
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.selfcheck import (
    Sizes,
    check_attention,
    check_flow,
    check_positions,
    cuts_of,
    exact_dtype,
    scaled,
    small_length,
)
from cptrain.models.shape import ModelShape

logger = logging.getLogger("cptrain")

TOKENS = 64  # of the whole sequence, or as few as the mesh can cut


class StartupCheck:
    """Compares every plan once, when it is first used, with attention in one process, at the heads of the model.

    dtype: what blocks compute in. tp: ranks over which the heads are divided.
    """

    def __init__(self, shape: ModelShape, *, tp: int, dtype: torch.dtype, enabled: bool) -> None:
        self._shape, self._tp, self._dtype, self._enabled = shape, tp, dtype, enabled
        self._checked: set[ContextParallel] = set()

    def __call__(self, plan: ContextParallel, seq_len: int) -> None:
        """Log one line, or raise RuntimeError with a table on all ranks. Collective over all ranks.

        Does nothing for a plan that is known. Neither the generators of the training nor its data or groups are
        touched, and nothing stays in memory but schedules.
        """
        masks = [Mask(self._shape.attention_mask == "causal", window) for window in sorted(set(self._shape.windows()))]
        if not self._enabled or plan in self._checked:
            return
        self._checked.add(plan)
        start = time.perf_counter()
        device = torch.device(plan.mesh.device_type)
        multiple = math.lcm(length_multiple(plan.layout, plan.ring_degree), plan.degree)
        sizes = Sizes(
            length=small_length(multiple, at_least=TOKENS),
            heads=self._shape.num_heads // self._tp,
            kv_heads=self._shape.num_kv_heads // self._tp,
            head_dim=self._shape.head_dim,
            dtype=exact_dtype(device, self._dtype, plan.kernel),
        )
        cuts = [
            cut
            for mask in masks
            for cut in cuts_of(plan, scaled(mask, length=seq_len, to=sizes.length), sizes.length, rows=sizes.batch)
        ]
        attention = [finding for cut in cuts for finding in check_attention(cut, sizes)]
        others = [check_positions(cuts[0]), *(finding for cut in cuts for finding in check_flow(cut, sizes))]
        found = agreed([*attention, *others], device)
        if not all(finding.passed for finding in found):
            raise RuntimeError(
                f"startup check: {title(plan)}: attention over these ranks is not what one rank computes:\n"
                f"{table(found)}\n"
                "`python -m cptrain.check`, started like the training, looks further; debug.startup_check = false "
                "trains nevertheless"
            )
        if dist.get_rank() == 0:
            worst = max(found[: len(attention)], key=lambda finding: finding.error / finding.allowed)
            what = f"exact to {worst.error:.1e}"
            if sizes.dtype != torch.float64:
                share = 2 * worst.error / worst.allowed
                what = f"off by {share:.1f} times one device's rounding in {str(sizes.dtype).removeprefix('torch.')}"
            logger.info(f"startup check: {title(plan)}: attention {what} ({time.perf_counter() - start:.1f} s)")


def title(plan: ContextParallel) -> str:
    """Degrees and layout of a plan, as in "ring 2 x ulysses 2, zigzag"."""
    ring = f"{'all-gather' if plan.method == 'all_gather' else 'ring'} {plan.ring_degree}"
    if plan.ring_inner_degree > 1:
        ring += f" (inner {plan.ring_inner_degree})"
    parts = [ring] * (plan.ring_degree > 1) + [f"ulysses {plan.ulysses_degree}"] * (plan.ulysses_degree > 1)
    degrees = " x ".join(parts) or "whole sequences on each rank"
    if plan.layout == "balanced":
        return f"{degrees}, packed documents"
    return f"{degrees}, {plan.layout}" if plan.ring_degree > 1 else degrees
