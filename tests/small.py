"""A small decoder and a batch for it, the same on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel
from cptrain.models.init import initialise
from cptrain.models.llama import Llama
from cptrain.models.settings import ModelConfig, resolve
from cptrain.models.shape import ModelShape

VOCABULARY = 32
SEED = 1


def small_shape(**keys: Any) -> ModelShape:
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "ffn_dim": 24}
    return resolve(ModelConfig(**sizes | {"vocab_size": VOCABULARY, "rope_theta": 100.0} | keys), VOCABULARY)


def small_model(**keys: Any) -> Llama:
    """In fp64."""
    model = Llama(small_shape(**keys)).double()
    initialise(model, SEED)
    return model


def small_batch(length: int, *, size: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and positions [size, length]."""
    tokens = torch.randint(VOCABULARY, (size, length + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:], torch.arange(length).expand(size, -1)


def loss_sum(model: Llama, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Cross entropy from all logits, which needs nothing of cptrain.loss."""
    return F.cross_entropy(model(tokens, positions).flatten(0, 1), labels.flatten(), reduction="sum")


def plan(ring: int, ulysses: int = 1, layout: str = "zigzag") -> ContextParallel:
    """A plan over all ranks of the default group."""
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    return ContextParallel(mesh, layout=layout)  # type: ignore[arg-type]
