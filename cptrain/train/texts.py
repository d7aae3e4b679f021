"""The text of a run: its two splits, and windows of them at any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cptrain.data.corpus import open_corpus
from cptrain.data.prepare import prepare_corpus
from cptrain.data.settings import DataConfig, TokenizerConfig
from cptrain.data.split import Split, split_documents
from cptrain.data.windows import Windows, build_windows
from cptrain.distributed.process_group import first_rank_result

Share = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class Texts:
    """The training and the held-out split of a corpus.

    share: gives all ranks what one makes on disk, by default rank 0, whose errors are then raised on all.
    """

    config: DataConfig
    training: Split
    held_out: Split
    share: Share = first_rank_result

    def windows(self, length: int) -> Windows:
        """Windows of the training split."""
        return self.share(lambda: build_windows(self.training, self.config, seq_len=length))

    def held_out_windows(self, length: int) -> Windows:
        """Windows of the held-out split."""
        return self.share(lambda: build_windows(self.held_out, self.config, seq_len=length))


def open_texts(
    config: DataConfig, tokenizer: TokenizerConfig, *, default_seed: int, share: Share = first_rank_result
) -> Texts:
    """Prepare the corpus, or find it prepared, and split it. ValueError for text that does not do."""
    seed = config.resolved_seed(default_seed)
    folder = share(lambda: prepare_corpus(config, tokenizer, seed=seed))
    return Texts(config, *split_documents(open_corpus(folder), fraction=config.validation_fraction, seed=seed), share)
