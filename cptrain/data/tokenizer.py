"""Tokenizers: the interface, the byte tokenizer, and how another one is plugged in."""

from __future__ import annotations

import hashlib
import importlib
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from cptrain.data.settings import TokenizerConfig

# Mixed scripts, digits, runs of spaces and code: what two tokenizers are most likely to cut differently.
_PROBE = "def f(x):\n    return x ** 2  # 3.14159 - naïve Ωmega 漢字 🙂\t\tThe quick brown fox, 1234567890.\r\n"


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    vocab_size: every id is in [0, vocab_size). bos_id and pad_id may be None where the vocabulary has none; then
    documents begin without a BOS. encode adds neither BOS nor EOS: the corpus does.
    Plain attributes will do for the properties.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int | None: ...

    def encode(self, text: str) -> Sequence[int] | np.ndarray: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, then BOS 256, EOS 257 and PAD 258."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes as ids, uint16 [length]. A lone surrogate (only JSON escapes make one) is a ValueError."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; BOS, EOS and PAD are left out, bytes that are no UTF-8 become U+FFFD."""
        array = np.asarray(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer the config names, checked. ValueError if the factory is not there, fails, or breaks the rules."""
    if config.name == "byte":
        return ByteTokenizer()
    where = f"tokenizer.name = {config.name!r}"
    module_name, _, factory_name = config.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}: {error}; install the package or correct the name") from error
    arguments = (config.path,) if config.path else ()
    try:
        tokenizer = factory(*arguments)
    except Exception as error:  # somebody else's code: it may raise anything, and it is the name or path that is wrong
        call = f"{factory_name}({', '.join(map(repr, arguments))})"
        raise ValueError(
            f"{where}: {call} raised {type(error).__name__}: {error}; correct tokenizer.name or tokenizer.path"
        ) from error
    if not isinstance(tokenizer, Tokenizer):
        needed = "vocab_size, bos_id, eos_id, pad_id, encode, decode"
        missing = ", ".join(name for name in needed.split(", ") if not hasattr(tokenizer, name))
        raise ValueError(f"{where}: {type(tokenizer).__name__} lacks {missing}; a tokenizer has {needed}")
    specials = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    for key, value in specials.items():
        if not (value is None and key != "eos_id") and not (
            isinstance(value, int) and 0 <= value < tokenizer.vocab_size
        ):
            raise ValueError(f"{where}: {key} = {value} must be an id below vocab_size = {tokenizer.vocab_size}")
    ids = _probe_ids(tokenizer, where)
    added = {"bos_id", "eos_id"} & {key for key, value in specials.items() if value in ids}
    if added:
        raise ValueError(
            f"{where}: encode must not add {' and '.join(sorted(added))} itself; switch that off in the factory"
        )
    return tokenizer


def _probe_ids(tokenizer: Tokenizer, where: str) -> list[int]:
    """What `encode` makes of the probe. ValueError if it fails, or gives no ids of the vocabulary."""
    try:
        encoded = tokenizer.encode(_PROBE)
    except Exception as error:  # as above
        raise ValueError(
            f"{where}: encode raised {type(error).__name__}: {error}; it has to take any text, this one for a start: "
            f"{_PROBE!r}"
        ) from error
    rule = f"encode must give a list, or an array of one axis, of whole numbers from 0 to {tokenizer.vocab_size - 1}"
    try:
        ids = np.asarray(encoded)
    except ValueError:  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.ndim != 1 or not (ids.dtype.kind in "iu" or not ids.size):
        raise ValueError(f"{where}: {rule} (vocab_size - 1); it gave {reprlib.repr(encoded)}")
    for place, number in enumerate(ids.tolist()):
        if not 0 <= number < tokenizer.vocab_size:
            raise ValueError(f"{where}: {rule} (vocab_size - 1); it gave {number} in place {place}")
    return ids.tolist()


def tokenizer_identity(config: TokenizerConfig, tokenizer: Tokenizer) -> str:
    """A digest that changes when the same text may give other ids: name, file, vocabulary, special ids and a probe."""
    stamp: list[object] = [config.name, config.path]
    if config.path and Path(config.path).exists():
        files = sorted(path for path in [Path(config.path), *Path(config.path).rglob("*")] if path.is_file())
        stamp += [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    stamp += [tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    stamp += [np.asarray(tokenizer.encode(_PROBE)).tolist()]
    return hashlib.blake2b(json.dumps(stamp).encode(), digest_size=16).hexdigest()
