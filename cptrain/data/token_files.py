"""Binary files of token ids, and where the documents in them begin."""

from __future__ import annotations

import hashlib
import logging
import zlib
from pathlib import Path

import numpy as np

from cptrain.data.sources import Faults
from cptrain.data.tokenizer import Tokenizer

logger = logging.getLogger("cptrain")

_CHUNK = 2**24  # tokens looked at together: bounds the memory


def scan_token_file(
    file: Path, dtype: np.dtype, tokenizer: Tokenizer, faults: Faults, digest: hashlib.blake2b
) -> np.ndarray | None:
    """Where each document of the file ends, int64 [documents], or None if the file went to `faults`.

    The file is nothing but tokens, little-endian. If NAME.idx lies beside NAME.bin, it holds the documents' offsets:
    int64, little-endian, from 0 up to the number of tokens. Otherwise a document ends after each EOS. Nothing is added:
    a BOS is there if whoever made the file put it there. ValueError, whatever `faults` does, if an id lies outside of
    the vocabulary: then it is the settings that are wrong.
    """
    index = file.with_suffix(".idx")
    try:
        num_bytes = file.stat().st_size
        if num_bytes == 0 or num_bytes % dtype.itemsize:
            faults.add(str(file), f"{num_bytes} bytes are no whole number of {dtype} tokens (data.token_dtype)")
            return None
        tokens = np.asarray(np.memmap(file, dtype=dtype, mode="r"))
        ends = None
        if index.exists():
            offsets = np.fromfile(index, dtype="<i8") if index.stat().st_size % 8 == 0 else np.empty(0)
            if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
                rule = f"must be int64 offsets of documents, rising from 0 to {len(tokens)}"
                faults.add(str(index), f"{rule} (remove it to cut the file at EOS)")
                return None
            ends = np.unique(offsets[1:]).astype(np.int64)
            ends = ends[ends > 0]
    except OSError as error:
        faults.add(str(file), f"cannot be read: {error.strerror}")
        return None
    found = []
    for begin in range(0, len(tokens), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        if chunk.max() >= tokenizer.vocab_size:
            worst = int(chunk.argmax())
            raise ValueError(
                f"{file}: token {begin + worst} is {chunk[worst]}, the tokenizer has {tokenizer.vocab_size} ids; set "
                "tokenizer.name to the one that made the file and data.token_dtype to how it was written"
            )
        digest.update(zlib.crc32(chunk.tobytes()).to_bytes(4, "little"))  # a third of the time of hashing it all
        if ends is None:
            found.append(begin + 1 + np.flatnonzero(chunk == tokenizer.eos_id))
    if ends is not None:
        return ends
    ends = np.concatenate(found).astype(np.int64)
    if len(ends) == 0:
        logger.warning(f"{file}: no EOS (id {tokenizer.eos_id}) and no {index.name}: all of it is one document")
    if len(ends) == 0 or ends[-1] != len(tokens):
        ends = np.append(ends, len(tokens))
    return ends
