from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cptrain.data.settings import TokenizerConfig
from cptrain.data.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer, tokenizer_identity

PLUGIN = """
class Words:
    vocab_size, bos_id, eos_id, pad_id = 10, {bos}, {eos}, None
    def __init__(self, path=None): self.path = path
    def encode(self, text): return {encode}
    def decode(self, ids): return ""
NUMBER = 3
def fail(text): return text
class NoEos:
    vocab_size, bos_id, pad_id = 10, None, None
    def encode(self, text): return []
    def decode(self, ids): return ""
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The module name of a plug-in, written with the values the test gives."""
    values = {"bos": "None", "eos": "9", "encode": "[1] * len(text)", **getattr(request, "param", {})}
    module = f"plugin_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{module}.py").write_text(PLUGIN.format(**values))
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


@pytest.mark.parametrize("text", ["", "abc\n", "naïve 漢字 🙂", "\x00\x7f"])
def test_data_tokenizer_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_data_tokenizer_bytes_are_utf8_and_specials_lie_above() -> None:
    tokenizer = build_tokenizer(TokenizerConfig())
    assert np.asarray(tokenizer.encode("é")).tolist() == [0xC3, 0xA9]
    assert sorted({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == [256, 257, 258]
    assert tokenizer.vocab_size == 259


def test_data_tokenizer_bytes_decode_leaves_specials_out() -> None:
    assert ByteTokenizer().decode([256, 104, 105, 257, 258]) == "hi"


def test_data_tokenizer_plugin_is_built_from_its_import_path(plugin: str) -> None:
    tokenizer: Tokenizer = build_tokenizer(TokenizerConfig(name=f"{plugin}:Words", path="some/file"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.path) == (10, None, "some/file")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("plugin", "factory", "message"),
    [
        ({}, "Missing", "has no attribute 'Missing'"),
        ({}, "NoEos", "lacks eos_id"),
        ({}, "fail", r"fail\(\) raised TypeError: .* 1 required positional argument: 'text'"),
        ({}, "NUMBER", "raised TypeError: 'int' object is not callable"),
        ({"eos": "10"}, "Words", "eos_id = 10 must be an id below vocab_size = 10"),
        ({"eos": "None"}, "Words", "eos_id = None must be"),
        ({"bos": "8", "encode": "[8, 1]"}, "Words", "encode must not add bos_id itself"),
        ({"encode": "text.encode('ascii')"}, "Words", "encode raised UnicodeEncodeError: .*any text"),
        ({"encode": "['x']"}, "Words", r"encode must give a list, .* it gave \['x'\]"),
        ({"encode": "[0.5]"}, "Words", r"it gave \[0.5\]"),
        ({"encode": "[[1, 2]]"}, "Words", r"it gave \[\[1, 2\]\]"),
        ({"encode": "[[1, 2], [3]]"}, "Words", r"it gave \[\[1, 2\], \[3\]\]"),
        ({"encode": "[1] * 30 + [10]"}, "Words", r"from 0 to 9 \(vocab_size - 1\); it gave 10 in place 30"),
        ({"encode": "[-1]"}, "Words", "it gave -1 in place 0"),
    ],
    indirect=["plugin"],
)
def test_data_tokenizer_bad_plugin_is_refused_by_name(plugin: str, factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer.name = '{plugin}:{factory}'.*{message}"):
        build_tokenizer(TokenizerConfig(name=f"{plugin}:{factory}"))


@pytest.mark.parametrize("plugin", [{"encode": "[]"}, {"encode": "(1, 2)"}], indirect=True)
def test_data_tokenizer_may_give_a_tuple_or_nothing(plugin: str) -> None:
    assert build_tokenizer(TokenizerConfig(name=f"{plugin}:Words")).vocab_size == 10


def test_data_tokenizer_missing_package_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no_such_package"):
        build_tokenizer(TokenizerConfig(name="no_such_package:make"))


def test_data_tokenizer_identity_follows_the_file(plugin: str, tmp_path: Path) -> None:
    file = tmp_path / "vocabulary"
    file.write_text("a")
    config = TokenizerConfig(name=f"{plugin}:Words", path=str(file))
    tokenizer = build_tokenizer(config)
    before = tokenizer_identity(config, tokenizer)
    assert tokenizer_identity(config, tokenizer) == before
    os.utime(file, (1, 1))
    assert tokenizer_identity(config, tokenizer) != before


def test_data_tokenizer_identity_follows_the_ids() -> None:
    class Shifted(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            return (super().encode(text) + 1) % 256

    config = TokenizerConfig()
    assert tokenizer_identity(config, ByteTokenizer()) != tokenizer_identity(config, Shifted())
