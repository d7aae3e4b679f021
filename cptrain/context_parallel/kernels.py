"""One block of attention on one device: forward to (out, lse), backward from the final out and lse.

[Note: blocks of one softmax]
A row's softmax runs over all its blocks. Forward gives each block its own normalised output and log-sum-exp, and
`merge` folds them. Backward gets the *final* out and lse for every block: p = exp(s - lse) is then the true
probability, and delta = rowsum(dout * out) the true correction. Block-local values would give wrong gradients without
any error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

from cptrain.context_parallel import backends, reference
from cptrain.context_parallel.launches import Launch, Segments, segments
from cptrain.context_parallel.schedule import Shape

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]
ForwardPacked = Callable[[Tensor, Tensor, Tensor, Segments, bool, float], tuple[Tensor, Tensor]]
BackwardPacked = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Segments, bool, float], tuple[Tensor, Tensor, Tensor]
]


@dataclass(frozen=True)
class Kernel:
    """One backend and what it can do. Shapes: q, out, dout [B, H, T, D]; k, v [B, Hk, Tk, D]; lse [B, H, T].

    forward(q, k, v, causal, scale) -> out (dtype of q), lse (fp32; fp64 for fp64). H may be a multiple of Hk.
    backward(dout, q, k, v, out, lse, causal, scale) -> dq, dk, dv in the dtype of q.
    forward_packed, backward_packed: the same for several blocks at once, one behind the other along T and Tk, B = 1.
    A causal block is square. Sliding windows need nothing of a kernel: schedules cut them into full and causal blocks.
    """

    name: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    forward: Forward
    backward: Backward
    forward_packed: ForwardPacked | None = None
    backward_packed: BackwardPacked | None = None
    differing_dims: bool = False  # values may be wider or narrower than keys
    most_dim: int | None = None  # of keys and values
    dim_multiple: int = 1  # that the widths of keys and values are
    any_shapes: bool = True  # a new shape of a block costs nothing; otherwise packed documents are not for it
    deterministic: bool = True  # or refuses by itself under torch.use_deterministic_algorithms
    generations: frozenset[int] | None = None  # of CUDA devices (compute capability 9.x is 9) on which "auto" means it
    implementation: str = ""  # that torch.nn.attention.activate_flash_attention_impl puts behind the operators

    def fits(self, key_dim: int, value_dim: int) -> bool:
        """Whether it takes keys and values of these widths."""
        wide = self.most_dim is not None and max(key_dim, value_dim) > self.most_dim
        odd = key_dim % self.dim_multiple or value_dim % self.dim_multiple
        return not (wide or odd) and (key_dim == value_dim or self.differing_dims)


_HALF = frozenset({torch.bfloat16, torch.float16})
_ANY = frozenset({torch.float64, torch.float32, *_HALF})
CPU_FLASH = Kernel("cpu flash", frozenset({"cpu"}), _ANY, backends.cpu_forward, backends.cpu_backward)
# On Hopper 1.7 times as fast as flash, forward and backward, but it builds a plan for every new shape of a block.
CUDNN = Kernel(
    "cudnn",
    frozenset({"cuda"}),
    _HALF,
    backends.cudnn_forward,
    backends.cudnn_backward,
    differing_dims=True,
    most_dim=128,
    dim_multiple=8,
    any_shapes=False,
    deterministic=False,  # its backward pass; torch's own dispatch leaves it out for that
    generations=frozenset({9, 10}),
)
# Whatever is behind torch's operators of flash attention: its own FlashAttention 2, unless something was activated.
CUDA_FLASH = Kernel(
    "cuda flash",
    frozenset({"cuda"}),
    _HALF,
    backends.flash_forward,
    backends.flash_backward,
    forward_packed=backends.flash_forward_packed,
    backward_packed=backends.flash_backward_packed,
    most_dim=256,
    dim_multiple=8,
)
# Packages that torch puts behind the same operators, documents included; by name only, since that is for the process.
FLASH_3 = replace(CUDA_FLASH, name="fa3", generations=frozenset(), implementation="FA3")
FLASH_4 = replace(CUDA_FLASH, name="fa4", generations=frozenset(), implementation="FA4")
EFFICIENT = Kernel(
    "efficient",
    frozenset({"cuda"}),
    frozenset({torch.float32, *_HALF}),
    backends.efficient_forward,
    backends.efficient_backward,
    differing_dims=True,
    dim_multiple=8,
)
REFERENCE = Kernel(
    "reference",  # plain torch; several times slower than a flash kernel
    frozenset({"cpu", "cuda", "meta"}),
    _ANY,
    reference.reference_forward,
    reference.reference_backward,
    forward_packed=reference.reference_forward_packed,
    backward_packed=reference.reference_backward_packed,
    differing_dims=True,
)
KERNELS = (CPU_FLASH, CUDNN, CUDA_FLASH, FLASH_3, FLASH_4, EFFICIENT, REFERENCE)  # "auto" is the first that fits


def choose_kernel(
    device_type: str,
    dtype: torch.dtype,
    *,
    key_dim: int = 64,
    value_dim: int | None = None,
    packed: bool = False,
    name: str = "auto",
    told: bool = True,
) -> Kernel:
    """The kernel of this name, or by "auto" the fastest, for a device, a dtype, and the widths of keys and values.

    packed: of packed documents, whose blocks have ever new shapes. An implementation of flash attention that the kernel
    needs is activated, for this process. Each choice is logged once, on rank 0, with a warning if it is a slow one,
    where it is to be told.
    Raises NotImplementedError that names what would work.
    """
    kernel = _choose(
        device_type,
        _generation() if device_type == "cuda" else 0,
        torch.are_deterministic_algorithms_enabled(),
        dtype,
        key_dim,
        key_dim if value_dim is None else value_dim,
        packed,
        name,
        told,
    )
    if kernel.implementation and kernel.implementation != current_flash_attention_impl():
        try:
            activate_flash_attention_impl(kernel.implementation)
        except (ImportError, RuntimeError) as error:
            raise NotImplementedError(
                f'the attention kernel "{name}" needs a package that is not there: {error}; install it, or take "auto"'
            ) from error
    return kernel


def _generation() -> int:
    """Of the current CUDA device; 0 where cuDNN may not be used, which alone depends on it."""
    usable = torch.cuda.is_available() and torch.backends.cudnn.is_available()
    return torch.cuda.get_device_capability()[0] if usable and torch.backends.cuda.cudnn_sdp_enabled() else 0


@lru_cache(maxsize=256)
def _choose(
    device_type: str,
    generation: int,
    deterministic: bool,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    packed: bool,
    name: str,
    told: bool,
) -> Kernel:
    fitting = [
        kernel
        for kernel in KERNELS
        if device_type in kernel.devices
        and dtype in kernel.dtypes
        and kernel.fits(key_dim, value_dim)
        and (kernel.any_shapes or not packed)
        and (kernel.deterministic or not deterministic)
    ]
    widths = f"{key_dim}" if key_dim == value_dim else f"{key_dim} and values of {value_dim}"
    what = f"{dtype} on {device_type} with keys of {widths}{', packed documents' if packed else ''}"
    what += ", deterministic" if deterministic else ""
    for kernel in fitting:
        by_itself = kernel.generations is None or generation in kernel.generations
        if kernel.name == name or (name == "auto" and by_itself):
            if told and not (dist.is_initialized() and dist.get_rank()):
                logger.info(f"attention kernel {kernel.name} for {what}")
                if kernel is REFERENCE and name == "auto" and device_type != "meta":
                    logger.warning(f"attention is several times slower in plain torch: no other kernel takes {what}")
            return kernel
    wanted = "no attention kernel" if name == "auto" else f'the attention kernel "{name}" is not there'
    offered = (
        ", ".join(kernel.name for kernel in fitting if not kernel.implementation)
        or "none; cast to bfloat16 or float32, or move to cpu or cuda"
    )
    raise NotImplementedError(f"{wanted} for {what}; what works there: {offered}")


def forward_block(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse of one block; an upper triangle is a lower one with queries and keys reversed."""
    if shape is not Shape.UPPER:
        return kernel.forward(q, k, v, shape is Shape.LOWER, scale)
    out, lse = kernel.forward(q.flip(2), k.flip(2), v.flip(2), True, scale)
    return out.flip(2), lse.flip(2)


def backward_block(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: Shape,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block from the final out and lse of its rows."""
    if shape is not Shape.UPPER:
        return kernel.backward(dout, q, k, v, out, lse, shape is Shape.LOWER, scale)
    dout, q, k, v, out, lse = (x.flip(2) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, True, scale)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def packs(kernel: Kernel, q: Tensor) -> bool:
    """Whether several blocks of q [B, H, T, D] may go into one call."""
    return kernel.forward_packed is not None and q.size(0) == 1


def forward_launch(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse of the rows of a launch, given its rows and columns one block behind the other."""
    if len(launch.blocks) == 1 or kernel.forward_packed is None:
        return forward_block(kernel, q, k, v, launch.shape, scale)
    packed, upper = segments(launch, q.device), launch.shape is Shape.UPPER
    if upper:
        q, k, v = (x.flip(2) for x in (q, k, v))
    out, lse = kernel.forward_packed(q, k, v, packed, launch.shape is not Shape.FULL, scale)
    return (out.flip(2), lse.flip(2)) if upper else (out, lse)


def backward_launch(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    launch: Launch,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq of the rows and dk, dv of the columns of a launch, from the final out and lse of its rows."""
    if len(launch.blocks) == 1 or kernel.backward_packed is None:
        return backward_block(kernel, dout, q, k, v, out, lse, launch.shape, scale)
    packed, upper = segments(launch, q.device), launch.shape is Shape.UPPER
    tensors = (dout, q, k, v, out, lse)
    if upper:
        tensors = tuple(x.flip(2) for x in tensors)  # type: ignore[assignment]
    dq, dk, dv = kernel.backward_packed(*tensors, packed, launch.shape is not Shape.FULL, scale)
    return (dq.flip(2), dk.flip(2), dv.flip(2)) if upper else (dq, dk, dv)
