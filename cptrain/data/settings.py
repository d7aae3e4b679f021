"""Settings of the data and of the tokenizer: the sections [data] and [tokenizer]."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cptrain.config import Problem, setting

Packing = Literal["concat", "best_fit"]
LongDocuments = Literal["split", "drop"]

_EXAMPLES = {"text": "folder/**/*.txt", "jsonl": "folder/*.jsonl", "tokens": "folder/*.bin"}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into token ids."""

    name: str = setting("byte", '"byte" (built in, 259 ids), or "package.module:factory" to plug in your own')
    path: str = setting("", "file or folder handed to the factory; empty calls it without arguments")

    def problems(self) -> Iterator[Problem]:
        """Everything wrong in this section."""
        if self.name == "byte":
            if self.path:
                yield Problem(
                    key="path",
                    rule="the byte tokenizer reads no file",
                    fix='leave it "" or name a factory in tokenizer.name',
                )
        elif not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", self.name):
            yield Problem(
                key="name", rule='must be "byte" or an import path "package.module:factory"', fix='set it to "byte"'
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from, how they are split and ordered, and who builds the batches."""

    source: Literal["stdlib", "text", "jsonl", "tokens"] = setting(
        "stdlib",
        '"stdlib": the .py files of the running interpreter; "text": one document a file; "jsonl": one a line; '
        '"tokens": binary files of token ids',
    )
    paths: tuple[str, ...] = setting((), "files and globs (** recurses), relative to the working directory")
    text_field: str = setting("text", "the field of a jsonl line that holds the text")
    token_dtype: Literal["uint8", "uint16", "uint32"] = setting("uint16", "what one token is in the files of tokens")
    on_error: Literal["raise", "skip"] = setting(
        "raise",
        '"raise": stop at a corrupt line or unreadable file; "skip": leave it out, count it and log its name, as the '
        'source "stdlib" always does',
    )
    validation_fraction: float = setting(0.01, "share of the tokens held out for validation, in whole documents")
    seed: int | Literal["auto"] = setting("auto", 'orders and splits the documents; "auto": debug.seed')
    document_mask: bool = setting(
        True, "tokens see only their own document; false: all that comes before in the window"
    )
    reset_positions: bool | Literal["auto"] = setting(
        "auto", 'positions begin at 0 in each document; false: in each window only; "auto": as data.document_mask says'
    )
    packing: Packing = setting(
        "concat",
        '"concat": one stream of documents, cut at window ends; "best_fit": whole documents, windows filled up with '
        "padding",
    )
    long_documents: LongDocuments = setting(
        "split", 'with "best_fit", documents longer than a window are "split": cut into pieces; "drop": left out'
    )
    num_workers: int = setting(0, "processes per rank that build batches ahead of time; 0: a thread of the rank does")
    prefetch_factor: int = setting(2, "batches each worker process builds ahead")
    cache_dir: str = setting(
        "auto", 'folder for tokenized text, seen by every rank; "auto": $XDG_CACHE_HOME/cptrain or ~/.cache/cptrain'
    )

    def problems(self) -> Iterator[Problem]:
        """Everything wrong in this section. Files are looked for when the data is prepared, not here."""
        if self.source == "stdlib" and self.paths:
            yield Problem(
                key="paths", rule='the source "stdlib" finds its own files', fix='set data.source to "text" or "jsonl"'
            )
        if self.source != "stdlib" and not self.paths:
            yield Problem(
                key="paths",
                rule=f'the source "{self.source}" needs at least one file or glob',
                fix=f'set it to ["{_EXAMPLES[self.source]}"]',
            )
        if any(not path.strip() for path in self.paths):
            yield Problem(key="paths", rule="an empty path names no file", fix="remove it")
        if not self.text_field:
            yield Problem(key="text_field", rule="must name a field", fix='set it to "text"')
        if not 0.0 <= self.validation_fraction < 1.0:
            yield Problem(key="validation_fraction", rule="must be at least 0 and below 1", fix="set it to 0.01")
        if self.seed != "auto" and not 0 <= self.seed < 2**63:
            yield Problem(key="seed", rule="must be between 0 and 2**63 - 1", fix='set it to "auto"')
        if self.packing == "concat" and self.long_documents != "split":
            yield Problem(
                key="long_documents",
                rule='with data.packing = "concat" long documents run on through the next windows',
                fix='set it to "split", or data.packing to "best_fit"',
            )
        if self.num_workers < 0:
            yield Problem(key="num_workers", rule="must not be negative", fix="set it to 0")
        if self.prefetch_factor < 1:
            yield Problem(key="prefetch_factor", rule="must be positive", fix="set it to 2")
        if not self.cache_dir:
            yield Problem(key="cache_dir", rule="must name a folder", fix='set it to "auto"')

    def resolved_seed(self, training_seed: int) -> int:
        """The seed that splits and orders the documents."""
        return training_seed if self.seed == "auto" else self.seed

    def resolved_reset_positions(self) -> bool:
        """Whether positions begin at 0 in each document."""
        return self.document_mask if self.reset_positions == "auto" else self.reset_positions
