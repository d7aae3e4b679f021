"""Windows that ask for a number that was said long before: whether a model finds one thing in a long context.

[Note: a needle]
A window is held-out text, as one document; somewhere in it stands "The pass key is" and five digits, and its end asks
for them. The needle of window i of n lies (i + 1/2) / n of the way to the question. It is found if the likeliest token
is right at every digit: greedy decoding would then have written it. The digits have the same ids in both places,
whatever a tokenizer would make of the sentences as a whole.
Source: passkey retrieval, arXiv:2305.16300 section 4.2.
"""

from __future__ import annotations

import numpy as np
import torch

from cptrain.data.pass_key import AFTER, BEFORE, DIGITS, QUESTION, key_text, same_digits, tokens_needed
from cptrain.data.tokenizer import Tokenizer
from cptrain.data.windows import IGNORE, Windows


class Needles:
    """`count` windows of the length of `text`, whose tokens they are made of; the same ones for a seed.

    Made of text of another window each, as far as there are as many. ValueError if a window has no room for a needle
    and its question, if the tokenizer does not tell digits apart, or if there is no text.
    """

    def __init__(self, text: Windows, tokenizer: Tokenizer, *, count: int, seed: int) -> None:
        self._text, self._count, self._seed = text, count, seed
        self._tokenizer = tokenizer
        self._before, self._after, self._question = (self._encode(part) for part in (BEFORE, AFTER, QUESTION))
        check_needles(tokenizer, count=count, length=text.seq_len)

    def __len__(self) -> int:
        return self._count

    def window(self, number: int) -> dict[str, torch.Tensor]:
        """Window `number`, as `Windows.window` gives it; labels are IGNORE but for the digits that are asked for.

        needle: its number, int64 [].
        """
        length = self._text.seq_len
        empty, num_asked = self._parts(number, np.zeros(0, dtype=np.int64))
        stream, _ = self._parts(number, self._straw(number, length - len(empty)))
        labels = np.full(length, IGNORE)
        labels[length - num_asked - 1 : length - 1] = stream[length - num_asked :]
        parts = {"tokens": stream, "labels": labels, "positions": np.arange(length), "document_ids": np.zeros(length)}
        arrays = {name: torch.from_numpy(values.astype(np.int64)) for name, values in parts.items()}
        return {**arrays, "needle": torch.tensor(number)}

    def _parts(self, number: int, straw: np.ndarray) -> tuple[np.ndarray, int]:
        """The window with this text in it, and how many of its last tokens are the digits asked for."""
        digits = np.random.default_rng([self._seed, number]).integers(10, size=DIGITS)
        key = self._encode(key_text(digits))
        begin = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        place = int((number + 0.5) / self._count * len(straw))
        needle = (self._before, key, self._after)
        window = np.concatenate([begin, straw[:place], *needle, straw[place:], self._question, key])
        return window.astype(np.int64), len(key)

    def _straw(self, number: int, length: int) -> np.ndarray:
        """So many tokens of text without marks of documents, from the window of this number on."""
        marks = [mark for mark in (self._tokenizer.bos_id, self._tokenizer.eos_id) if mark is not None]
        found: list[np.ndarray] = []
        taken = 0
        while taken < length:
            if len(found) == len(self._text) and not taken:
                raise ValueError(f"validation.needles = {self._count}: the held-out text holds no text; set it to 0")
            window = self._text.window((number + len(found)) % len(self._text))
            tokens = window["tokens"][window["document_ids"] >= 0].numpy()
            found.append(tokens[~np.isin(tokens, marks)])
            taken += len(found[-1])
        return np.concatenate(found)[:length]

    def _encode(self, text: str) -> np.ndarray:
        return _ids(self._tokenizer, text)


def check_needles(tokenizer: Tokenizer, *, count: int, length: int, key: str = "training.seq_len") -> None:
    """ValueError unless so many needles can be hidden in windows of this length, which the setting `key` gives."""
    keys = {tuple(_ids(tokenizer, text)) for text in same_digits()}
    if len(keys) < 10 or () in keys:
        raise ValueError(f"validation.needles = {count}: the tokenizer does not tell digits apart; set it to 0")
    needed = tokens_needed(lambda text: len(_ids(tokenizer, text)))
    if length < needed:
        raise ValueError(
            f"{key} = {length}: a window with a needle needs {needed} tokens; set {key} to that or more, or "
            "validation.needles to 0"
        )


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text)).astype(np.int64)
