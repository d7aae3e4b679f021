"""The learning rate as a pure function of the step number: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from cptrain.optim.settings import LRSchedulerConfig


def learning_rate(step: int, config: LRSchedulerConfig, *, lr: float, total_steps: int) -> float:
    """The learning rate that optimizer step `step` is taken with; the first step is number 1.

    With W = warmup_steps, T = total_steps (`config.total_steps` unless that is "auto") and D = the first step number
    from which the decay is measured:

    * steps 1 .. W get lr * step / W: step 1 gets lr / W, step W gets lr;
    * steps W .. D get lr (D = W unless `decay_ratio` = r leaves a stable phase: D = max(W, T - round(r * T)));
    * steps D .. T get lr * (m + (1 - m) * shape(x)) with m = min_lr_factor and x = (step - D) / (T - D), so that step T
      gets exactly lr * m; shape is (1 + cos(pi x)) / 2, 1 - x, or 1 - sqrt(x);
    * steps after T keep lr * m; "constant" stays at lr for ever.

    A run that ends within its warm-up (T <= W) only rises. Raises ValueError for step < 1.
    """
    if step < 1:
        raise ValueError(f"step = {step}: optimizer steps are numbered from 1")
    if step <= config.warmup_steps:
        return lr * step / config.warmup_steps
    if config.decay_type == "constant":
        return lr
    end = total_steps if config.total_steps == "auto" else config.total_steps
    start = config.warmup_steps
    if config.decay_ratio != "auto":
        start = max(start, end - round(config.decay_ratio * end))
    if step <= start:
        return lr
    if step >= end:
        return lr * config.min_lr_factor
    progress = (step - start) / (end - start)
    if config.decay_type == "cosine":
        shape = (1 + math.cos(math.pi * progress)) / 2
    elif config.decay_type == "linear":
        shape = 1 - progress
    else:
        shape = 1 - math.sqrt(progress)
    return lr * (config.min_lr_factor + (1 - config.min_lr_factor) * shape)
