"""The same toy model on one rank: no mesh, no sharding, no fused loss, attention written out densely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from cptrain.check.toy import Batch, ToyTrainer, widen
from cptrain.context_parallel import dispatch
from cptrain.context_parallel.mask import Documents, Mask
from cptrain.context_parallel.selfcheck import dense_attention, single_device_attention
from cptrain.loss import IGNORED
from cptrain.models.init import initialise
from cptrain.models.llama import Llama

ROWS_AT_A_TIME = 16

WholeAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask, float | None], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """Mean loss over valid tokens, 2-norm of the gradient, and the gradient of every parameter by plain name."""

    loss: float
    grad_norm: float
    gradients: dict[str, torch.Tensor]


def exact_step(trainer: ToyTrainer, batch: Batch) -> Step:
    """The step of the whole batch in fp64."""
    return _step(trainer, batch, torch.float64, dense_attention)


def single_device_step(trainer: ToyTrainer, batch: Batch) -> Step:
    """The same in the dtype that blocks compute in: the rounding error that the ranks are measured by."""
    return _step(trainer, batch, trainer.precision.param, single_device_attention)


def plain_name(name: str) -> str:
    """The name of a parameter without what checkpointing and compilation add."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def norm(gradients: dict[str, torch.Tensor]) -> float:
    """Of all gradients as one vector."""
    return torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()


def _step(trainer: ToyTrainer, batch: Batch, dtype: torch.dtype, attention: WholeAttention) -> Step:
    with torch.device(trainer.device):
        model = Llama(trainer.shape).to(trainer.precision.dtype)
    initialise(model, trainer.settings.debug.seed)
    widen(model)
    model.to(dtype)
    tokens, labels, positions = (batch[key].to(trainer.device) for key in ("tokens", "labels", "positions"))
    valid = (labels != IGNORED).sum().item()
    total = 0.0
    for start in range(0, len(tokens), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        for layer, mask in enumerate(trainer.masks_of(batch["document_ids"][rows])):
            dispatch.apply(
                model,
                modules=f"layers.{layer}.attention",
                attention=partial(_attention, attention, mask.documents),
                window_size=mask.window or None,
            )
        logits = model(tokens[rows], positions[rows])
        wide = logits.flatten(0, 1).to(torch.promote_types(dtype, torch.float32))
        loss = F.cross_entropy(wide, labels[rows].flatten(), ignore_index=IGNORED, reduction="sum") / valid
        loss.backward()
        total += loss.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Step(total, norm(gradients), gradients)


def _attention(
    attention: WholeAttention,
    documents: Documents | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool,
    window_size: int | None,
    scale: float | None,
) -> torch.Tensor:
    return attention(q, k, v, Mask(is_causal, window_size or 0, documents), scale)
