"""cptrain: exact context-parallel training of long-sequence language models."""

__version__ = "0.1.0"
