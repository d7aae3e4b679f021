"""How attention is computed in each layer of the real model, in words."""

from __future__ import annotations

from cptrain.context_parallel import ContextParallel
from cptrain.context_parallel.description import carried
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.selfcheck import describe_mask
from cptrain.models.shape import ModelShape


def methods_by_layer(plan: ContextParallel, shape: ModelShape, seq_len: int) -> list[str]:
    """One line for each kind of layer: which layers, their mask, and how their keys travel at the real length."""
    by_window: dict[int, list[int]] = {}
    for layer, window in enumerate(shape.windows()):
        by_window.setdefault(window, []).append(layer)
    lines = []
    for window, layers in by_window.items():
        mask = Mask(shape.attention_mask == "causal", window)
        seen = f"{describe_mask(mask)} in documents" if plan.layout == "balanced" else describe_mask(mask)
        lines.append(f"layers {_listed(layers)}: {seen}, {carried(plan, mask, seq_len)}")
    return lines


def _listed(layers: list[int]) -> str:
    """The numbers as runs: "0-3", "0, 2, 4"; the middle of many is left out."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    if len(texts) > 6:
        texts = [*texts[:4], "...", texts[-1]]
    return ", ".join(texts)
