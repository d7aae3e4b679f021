"""Settings of the optimizer and of the learning-rate schedule. Torch is never imported here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from cptrain.config import Problem, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, its rates and which kernel runs it."""

    name: Literal["AdamW"] = setting("AdamW", "optimizer; AdamW decays weights apart from the gradient")
    lr: float = setting(8e-4, "peak learning rate, reached at the end of the warm-up")
    beta1: float = setting(0.9, "decay rate of the mean of the gradient")
    beta2: float = setting(0.95, "decay rate of the mean of the squared gradient")
    eps: float = setting(1e-8, "added to the root of the squared mean before dividing by it")
    weight_decay: float = setting(0.1, "decay of matrices and embeddings; norms and biases have none")
    implementation: Literal["auto", "fused", "foreach", "for-loop"] = setting(
        "auto", "one kernel for all weights, one per operation, or a Python loop; auto = fused where the device has it"
    )

    def problems(self) -> Iterator[Problem]:
        """Everything wrong with the values of this section."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            yield Problem(key="lr", rule="must be positive and finite", fix="set it to 3e-4")
        for key, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                yield Problem(key=key, rule="must be at least 0 and below 1", fix="set it to 0.9")
        if not (math.isfinite(self.eps) and self.eps > 0):
            yield Problem(key="eps", rule="must be positive and finite", fix="set it to 1e-8")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            yield Problem(key="weight_decay", rule="must be finite and not negative", fix="set it to 0.1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """The learning rate as a function of the step: warm-up, then a curve down to its end."""

    warmup_steps: int = setting(200, "steps over which the learning rate rises from 0 to optimizer.lr")
    total_steps: int | Literal["auto"] = setting(
        "auto", "step at which the decay ends; auto = training.steps (fix it to stop early and go on later unchanged)"
    )
    decay_type: Literal["cosine", "linear", "sqrt", "constant"] = setting(
        "cosine", "shape of the decay; constant = none; for warmup-stable-decay (WSD) set decay_ratio too"
    )
    decay_ratio: float | Literal["auto"] = setting(
        "auto",
        "share of total_steps that decays, at the end, after a stable phase; auto = all after the warm-up",
    )
    min_lr_factor: float = setting(0.1, "learning rate of the last step as a share of optimizer.lr")

    def problems(self) -> Iterator[Problem]:
        """Everything wrong with the values of this section."""
        if self.warmup_steps < 0:
            yield Problem(key="warmup_steps", rule="must not be negative", fix="set it to 0 for no warm-up")
        if self.total_steps != "auto" and self.total_steps < 1:
            yield Problem(key="total_steps", rule="must be at least 1", fix='set it to "auto" for training.steps')
        if self.decay_ratio != "auto" and not 0 < self.decay_ratio <= 1:
            yield Problem(
                key="decay_ratio",
                rule="must be above 0 and at most 1",
                fix='set it to 0.1 for a tail of a tenth, or decay_type to "constant" for no decay',
            )
        if self.decay_ratio != "auto" and self.decay_type == "constant":
            yield Problem(
                key="decay_ratio",
                rule='has nothing to act on while decay_type = "constant"',
                fix='set decay_type to "linear"',
            )
        if not 0 <= self.min_lr_factor <= 1:
            yield Problem(key="min_lr_factor", rule="must lie between 0 and 1", fix="set it to 0.1")
