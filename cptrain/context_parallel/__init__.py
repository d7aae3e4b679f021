"""Exact attention over sequence shards, for any model: the library that other projects may lift out.

Imports torch (with its triton on CUDA), numpy, the standard library and `cptrain.distributed` only.
"""

from cptrain.context_parallel.api import ContextParallel
from cptrain.context_parallel.recompute import KEPT_OPERATORS, keep_attention

__all__ = ["KEPT_OPERATORS", "ContextParallel", "keep_attention"]
