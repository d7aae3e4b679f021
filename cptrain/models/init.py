"""Initial weights that do not depend on how the model is sharded: `initialise`.

[Note: counter-based initialisation]
Each weight is a pure function of (seed, parameter name, global index): SplitMix64, a counter-based generator
(doi:10.1145/2660193.2660195), hashes the index, and a table of quantiles turns 36 of the bits into a truncated normal.
So a rank computes its own elements and no others, on any device, and every mesh gets the same bits. A stateful
generator would have to produce whole rows or tensors on every rank. Only integer arithmetic, one table look-up and
single fp32 multiplications and additions are used, which round alike everywhere; erfinv and Box-Muller may differ in
the last bit between the vectorised body and the tail of a loop, hence between shards.
Measured on one CPU core: 8.4 ns a weight; `torch.nn.init.trunc_normal_`: 19 ns.
"""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cptrain.models.llama import Llama

STD = 0.02
CUT = 3.0  # standard deviations at which the normal is truncated
_TABLE_BITS, _FRACTION_BITS = 12, 24


def initialise(model: Llama, seed: int) -> None:
    """Fill every parameter in place: linear and embedding weights truncated normal, norms one, biases zero.

    The standard deviation is 0.02 before truncation at three of them, and 0.02 / sqrt(2 num_layers) for `wo` and `w2`,
    which write into the residual stream. Call it after `to_empty`; parameters may be plain tensors or DTensors sharded
    by FSDP2, tensor parallel or both. Values are computed in fp32 and rounded to the parameter's dtype.
    RuntimeError if a parameter is still on the meta device or tied embeddings have been parted.
    """
    if model.shape.tied_embeddings and model.output.weight is not model.tok_embeddings.weight:
        raise RuntimeError("output.weight is no longer tok_embeddings.weight: call model.tie_weights() after sharding")
    residual_std = STD / (2 * model.shape.num_layers) ** 0.5
    quantiles = _truncated_normal_quantiles()
    with torch.no_grad():
        for wrapped_name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise RuntimeError(f"{wrapped_name} is on the meta device: call model.to_empty(device=...) first")
            # Names in checkpoints and in the unwrapped model; activation checkpointing and compile insert parts.
            name = wrapped_name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
            module, kind = name.split(".")[-2:]
            if kind == "bias":
                parameter.zero_()
            elif module.endswith("norm"):
                parameter.fill_(1.0)
            else:
                std = residual_std if module in ("wo", "w2") else STD
                _fill_normal(parameter, _key(seed, name), std, quantiles)


def _fill_normal(parameter: Tensor, key: int, std: float, quantiles: Tensor) -> None:
    """Write this rank's part of the parameter, a few rows at a time."""
    local, offset = _local_part(parameter)
    if local.numel() == 0:
        return
    quantiles = quantiles.to(local.device)
    strides = [1] * parameter.ndim  # of the row-major global tensor, whatever the memory format of the local one
    for dim in reversed(range(parameter.ndim - 1)):
        strides[dim] = strides[dim + 1] * parameter.shape[dim + 1]
    column = torch.zeros((), dtype=torch.int64, device=local.device)
    for dim in range(1, parameter.ndim):
        index = torch.arange(offset[dim], offset[dim] + local.shape[dim], device=local.device)
        column = column.unsqueeze(-1) + index * strides[dim]
    # In cache on a CPU (larger chunks are 3 to 6 times slower); few launches and bounded memory on an accelerator.
    chunk = 2**14 if local.device.type == "cpu" else 2**24
    rows = max(1, chunk // max(1, column.numel()))
    for start in range(0, local.shape[0], rows):
        part = local[start : start + rows]
        row = torch.arange(offset[0] + start, offset[0] + start + part.shape[0], device=local.device) * strides[0]
        index = row.view(-1, *[1] * column.ndim) + column
        part.copy_(_truncated_normal(index, key, quantiles) * std)


def _local_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The plain tensor this rank holds, and the global index of its first element."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    local = parameter.to_local()
    # Also where FSDP2 and tensor parallel shard one dim (_StridedShard): a rank's rows are neighbours there too.
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(local.shape) == tuple(shape), (tuple(local.shape), shape, parameter.placements)
    return local, offset


def _truncated_normal(index: Tensor, key: int, quantiles: Tensor) -> Tensor:
    """Standard normal values, cut at +-CUT, of global indices (int64, overwritten); fp32."""
    bits = _splitmix64(index, key)
    cell = (bits >> (64 - _TABLE_BITS)) & (2**_TABLE_BITS - 1)
    fraction = ((bits >> (64 - _TABLE_BITS - _FRACTION_BITS)) & (2**_FRACTION_BITS - 1)).to(torch.float32)
    low, width = quantiles[0][cell], quantiles[1][cell]
    return low + width * (fraction * 2.0**-_FRACTION_BITS)


def _splitmix64(index: Tensor, key: int) -> Tensor:
    """64 hashed bits per element, in place. int64 products wrap as unsigned ones; shifts are masked to be logical."""
    x = index.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    x ^= (x >> 30) & (2**34 - 1)
    x *= _signed(0xBF58476D1CE4E5B9)
    x ^= (x >> 27) & (2**37 - 1)
    x *= _signed(0x94D049BB133111EB)
    x ^= (x >> 31) & (2**33 - 1)
    return x


def _key(seed: int, name: str) -> int:
    """Where in the generator's cycle the stream of this parameter starts."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _truncated_normal_quantiles() -> Tensor:
    """[2, cells]: lower edge and width of equally probable cells of the truncated normal; linear inside a cell."""
    normal, cells = NormalDist(), 2**_TABLE_BITS
    outside = normal.cdf(-CUT)
    edges = [normal.inv_cdf(outside + (1 - 2 * outside) * i / cells) for i in range(cells + 1)]
    edges[0], edges[-1] = -CUT, CUT
    table = torch.tensor(edges, dtype=torch.float64)
    return torch.stack((table[:-1], table[1:] - table[:-1])).to(torch.float32)
