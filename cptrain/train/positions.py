"""Loss by position: how much of what comes before it a model makes use of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SMALLEST = 128  # tokens of the first range, or a 512th of the length
MOST_DOUBLINGS = 9


def ranges(seq_len: int) -> list[tuple[int, int]]:
    """Ranges of positions below `seq_len`, each as long as all before it; the last may be cut short."""
    stop = SMALLEST
    while stop << MOST_DOUBLINGS < seq_len:
        stop *= 2
    found = [(0, min(stop, seq_len))]
    while found[-1][1] < seq_len:
        start = found[-1][1]
        found.append((start, min(2 * start, seq_len)))
    return found


def sums_by_range(losses: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, seq_len: int) -> torch.Tensor:
    """fp64 [2, ranges]: the sum of the losses of tokens, and the number of valid ones, in each of `ranges`.

    Shapes: all [B, T].
    """
    found = ranges(seq_len)
    starts = torch.tensor([start for start, _ in found[1:]], device=positions.device)
    place = torch.bucketize(positions.flatten(), starts, right=True)
    both = torch.stack((losses.flatten().double(), valid.flatten().double()))
    return torch.zeros(2, len(found), dtype=torch.float64, device=losses.device).index_add_(1, place, both)


def curves(sums: Sequence[Sequence[float]], seq_len: int) -> dict[str, float]:
    """The mean loss in each range that has tokens, by tag; nothing where there is but one range."""
    found = ranges(seq_len)
    if len(found) == 1:
        return {}
    return {
        f"long_context/loss_by_position/{start}-{stop}": total / count
        for (start, stop), total, count in zip(found, *sums, strict=True)
        if count
    }
