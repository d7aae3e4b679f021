"""What a check found, the table of all of them, and agreement of the ranks about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: an error, how large it may be, and what to look at if it is larger.

    where: what has this error. seconds: that the check took; 0 in the further rows of one check.
    """

    name: str
    error: float
    allowed: float
    look_at: str
    where: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # not a number is no pass


def agreed(findings: Sequence[Finding], device: torch.device) -> list[Finding]:
    """The findings with the largest error of any rank. Collective over the default process group.

    All ranks must have made the same checks; a row whose largest error is another rank's says so.
    """
    if not findings:
        return []
    # Reductions may lose a nan.
    own = [f.error if math.isfinite(f.error) else math.inf for f in findings]
    numbers = torch.tensor([own, [-f.allowed for f in findings]], dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    errors, limits = numbers.abs().tolist()
    return [
        replace(finding, error=error, allowed=limit, where=finding.where if error == mine else "worse on another rank")
        for finding, error, limit, mine in zip(findings, errors, limits, own, strict=True)
    ]


def table(findings: Sequence[Finding]) -> str:
    """The findings as lines of text; a failing row is followed by what to look at."""
    head = ("check", "largest error", "allowed", "verdict", "seconds", "")
    rows = [
        (
            f.name,
            _number(f.error),
            _number(f.allowed),
            "ok" if f.passed else "FAILED",
            f"{f.seconds:.2f}" if f.seconds else "",
            f.where,
        )
        for f in findings
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row, finding in zip((head, *rows), (None, *findings), strict=True):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:5], widths[1:5], strict=True)), row[5]]
        lines.append("  ".join(cells).rstrip())
        if finding is not None and not finding.passed:
            lines.append(f"    look at: {finding.look_at}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.1e}"
