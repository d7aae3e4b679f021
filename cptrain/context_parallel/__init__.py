"""Exact attention over sequence shards, for any model: the library that other projects may lift out.

Imports torch, the standard library and `cptrain.distributed` only.
"""

from cptrain.context_parallel.api import ContextParallel

__all__ = ["ContextParallel"]
