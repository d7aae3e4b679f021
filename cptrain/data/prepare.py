"""Turning a source into a corpus on disk, once."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from pathlib import Path

import numpy as np

from cptrain.data.cache import cache_folder, publish
from cptrain.data.corpus import open_corpus
from cptrain.data.settings import DataConfig, TokenizerConfig
from cptrain.data.sources import Faults, find_files, read_documents
from cptrain.data.split import split_documents
from cptrain.data.token_files import scan_token_file
from cptrain.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_identity

logger = logging.getLogger("cptrain")

_FORMAT = 2  # of the files in the folder; another one is another folder
_NAMES_IN_ERROR = 5


def prepare_corpus(config: DataConfig, tokenizer_config: TokenizerConfig, *, seed: int) -> Path:
    """The folder of the corpus, made unless the cache holds it; its split into training and held-out text with it.

    Call it on one rank and send the folder (or the error) to the others, which then `open_corpus` it. It may run in
    several processes at once, with the same result. A document of text becomes BOS + its tokens + EOS; empty ones are
    left out. Files of tokens are used where they lie and as they are.
    Errors: ValueError for a path that matches nothing, for no text at all, and for a faulty file or line unless
    data.on_error = "skip"; RuntimeError if the cache cannot be written.
    """
    tokenizer = build_tokenizer(tokenizer_config)
    files = find_files(config)
    folder = (
        cache_folder(config.cache_dir) / f"{config.source}-{_cache_key(config, tokenizer_config, tokenizer, files)}"
    )
    if config.source == "tokens":
        publish(folder, lambda path: _index_token_files(path, config, tokenizer, files))
    else:
        publish(folder, lambda path: _tokenize(path, config, tokenizer, files))
    corpus = open_corpus(folder)
    about = json.loads((folder / "corpus.json").read_text())
    logger.info(
        f"data: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens from {len(files):,} files of "
        f"{config.source} ({about['empty']:,} empty ones left out), in {folder}"
    )
    if about["skipped"]:
        more = ", ..." if about["skipped"] > len(about["skipped_names"]) else ""
        level = logging.INFO if config.source == "stdlib" else logging.WARNING
        logger.log(level, f"data: skipped {about['skipped']:,}: {', '.join(about['skipped_names'])}{more}")
    split_documents(corpus, fraction=config.validation_fraction, seed=seed)
    return folder


def _cache_key(config: DataConfig, tokenizer_config: TokenizerConfig, tokenizer: Tokenizer, files: list[Path]) -> str:
    stamp: list[object] = [_FORMAT, config.on_error, tokenizer_identity(tokenizer_config, tokenizer)]
    stamp.append({"jsonl": config.text_field, "tokens": config.token_dtype}.get(config.source))
    for file in files:
        for path in (file, file.with_suffix(".idx")) if config.source == "tokens" else (file,):
            try:
                stat = path.stat()
                stamp.append([str(path), stat.st_size, stat.st_mtime_ns])
            except OSError:  # named when it is to be read
                stamp.append([str(path)])
    return hashlib.blake2b(json.dumps(stamp).encode(), digest_size=12).hexdigest()


def _tokenize(folder: Path, config: DataConfig, tokenizer: Tokenizer, files: list[Path]) -> None:
    """Write the documents of a text source into `folder`."""
    # Some of the interpreter's files are no UTF-8 on purpose: they test its own decoder.
    faults = Faults(on_error="skip" if config.source == "stdlib" else config.on_error)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    digest, lengths, empty = hashlib.blake2b(digest_size=16), array("q"), 0
    logger.info(f"data: tokenizing {len(files):,} files")
    with (folder / "tokens.bin").open("wb") as output:
        for name, text in read_documents(config, files, faults):
            if not text:
                empty += 1
                continue
            try:
                ids = np.asarray(tokenizer.encode(text))
            except ValueError as error:
                faults.add(name, f"cannot be tokenized: {error}")
                continue
            if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise ValueError(f"{name}: the tokenizer gave ids outside of its vocab_size = {tokenizer.vocab_size}")
            document = np.concatenate([before, ids, [tokenizer.eos_id]], dtype=dtype, casting="unsafe")
            output.write(document.tobytes())
            digest.update(document.tobytes())
            lengths.append(len(document))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shards = [("tokens.bin", int(offsets[-1]))]
    _write_about(folder, offsets, shards, dtype, tokenizer, digest, faults, empty)


def _index_token_files(folder: Path, config: DataConfig, tokenizer: Tokenizer, files: list[Path]) -> None:
    """Write into `folder` where the documents of token files begin. The tokens stay where they are."""
    faults = Faults(on_error=config.on_error)
    dtype = np.dtype(config.token_dtype)
    digest, shards, empty = hashlib.blake2b(digest_size=16), [], 0
    offsets = [np.zeros(1, dtype=np.int64)]
    for file in files:
        ends = scan_token_file(file, dtype, tokenizer, faults, digest)
        if ends is None:
            continue
        shards.append((str(file), int(ends[-1])))
        offsets.append(ends + offsets[-1][-1])
    _write_about(folder, np.concatenate(offsets), shards, dtype, tokenizer, digest, faults, empty)


def _write_about(
    folder: Path,
    offsets: np.ndarray,
    shards: list[tuple[str, int]],
    dtype: np.dtype,
    tokenizer: Tokenizer,
    digest: hashlib.blake2b,
    faults: Faults,
    empty: int,
) -> None:
    if len(offsets) == 1:
        names = ": " + ", ".join(faults.names[:_NAMES_IN_ERROR]) if faults.names else ""
        raise ValueError(
            f"data.paths: no text in any file ({empty} empty documents, {faults.count} that cannot be read{names}); "
            "name files that hold some"
        )
    digest.update(offsets.astype("<i8").tobytes())
    np.save(folder / "offsets.npy", offsets)
    about = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
        "shards": shards,
        "fingerprint": digest.hexdigest(),
        "empty": empty,
        "skipped": faults.count,
        "skipped_names": faults.names,
    }
    (folder / "corpus.json").write_text(json.dumps(about, indent=1))
