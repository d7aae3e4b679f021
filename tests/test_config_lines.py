"""The line of each key, checked against tomli's parse."""

from __future__ import annotations

import random

import pytest
import tomli

from cptrain.config.keypath import flatten, key_path, key_text
from cptrain.config.lines import key_lines

TRICKY = r'''# [not.a.section]
title = "a # b = c"
"quoted.key" = 1
'single' = '[x]'
a.b . "c" = 3  # dotted

[training]   # comment
steps = 20
text = """
steps = 99
[parallelism]
"""
raw = """\"""" # odd
literal = \'\'\'
seq_len = 1
\'\'\'
list = [
  "one",  # ] no end
  "[two]",

  "three = 3",
]
nested = [[1, 2],
          [3, 4]]
table = { x = 1, y = { z = "}" } }
seq_len = 2048

[[training.stages]]
steps = 1
[training.stages.inner]
deep = 1
[[training.stages]]

steps = 2
  [training.stages.inner]
  deep = 2

["odd section".'x']
key = 1
[empty]

[arrays]
inline = [ {a = 1}, {a = 2} ]
spread = [
  # comment
  {a = 1, b = [1,
               2]},

  {a = 3}, {a = 4},
  {a = 5} ]
after = true
[[arrays.more]]
[[arrays.more]]
last = 1'''.replace(r"\'", "'")


def test_config_lines_finds_exactly_the_keys_of_tomli() -> None:
    found = key_lines(TRICKY)
    expected = dict(flatten(tomli.loads(TRICKY)))
    assert expected.keys() <= found.keys()
    # Beyond the leaves only section headers are found.
    assert all(any(leaf[: len(path)] == path for leaf in expected) for path in found.keys() - expected.keys())


@pytest.mark.parametrize(
    ("key", "start"),
    [
        ("title", "title ="),
        ("single", "'single'"),
        ("a.b.c", "a.b"),
        ("training", "[training]"),
        ("training.steps", "steps = 20"),
        ("training.text", 'text = """'),
        ("training.raw", "raw ="),
        ("training.literal", "literal"),
        ("training.list", "list = ["),
        ("training.nested", "nested ="),
        ("training.table.y.z", "table ="),
        ("training.seq_len", "seq_len = 2048"),
        ("training.stages[0].steps", "steps = 1"),
        ("training.stages[0].inner.deep", "deep = 1"),
        ("training.stages[1].steps", "steps = 2"),
        ("training.stages[1].inner.deep", "  deep = 2"),
        ("empty", "[empty]"),
        ("arrays.inline[1].a", "inline"),
        ("arrays.spread[1].a", "  {a = 3}"),
        ("arrays.spread[2].a", "  {a = 3}"),
        ("arrays.spread[3].a", "  {a = 5} ]"),
        ("arrays.after", "after"),
        ("arrays.more[1].last", "last"),
    ],
)
def test_config_lines_names_the_line_a_key_is_written_on(key: str, start: str) -> None:
    lines = TRICKY.split("\n")
    matching = [i for i, line in enumerate(lines, 1) if line.startswith(start)]
    # Some starts also occur inside a string or as the start of a longer line: the last is the key where they do.
    assert key_lines(TRICKY)[key_path(key)] in matching
    assert lines[key_lines(TRICKY)[key_path(key)] - 1].startswith(start)


def test_config_lines_takes_windows_line_ends() -> None:
    assert key_lines("a = 1\r\n[b]\r\nc = [\r\n1]\r\nd = 2\r\n") == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 5}


@pytest.mark.parametrize("seed", range(20))
def test_config_lines_survives_random_documents(seed: int) -> None:
    """Statements of known length in random order: each key's line is the one it was written on."""
    rng = random.Random(seed)
    values = [
        "1",
        '"x # ["',
        "[1,\n 2,\n]",
        "'''\n[a]\nb = 1'''",
        '"""\n\n"""',
        "{q = 1}",
        "[\n# ]\n]",
        "-1.5e3",
        "true",
    ]
    text, expected, section = "", {}, ()
    for number in range(40):
        text += rng.choice(["", "", "\n", "# k = 1\n"])
        line = text.count("\n") + 1
        if rng.random() < 0.2:
            section = (f"s{number}", "t")
            text += f"[s{number}.t]\n"
            expected[section] = line
        else:
            value = rng.choice(values)
            text += f"k{number} = {value}\n"
            expected[(*section, f"k{number}", *(["q"] if "q" in value else []))] = line
    assert key_lines(text) == expected


@pytest.mark.parametrize("text", ["a", "a.b", "a.b[0].c", "a[12]"])
def test_config_lines_paths_are_written_and_read(text: str) -> None:
    assert key_text(key_path(text)) == text


def test_config_lines_quotes_names_that_would_look_like_paths() -> None:
    assert key_text(("training.steps",)) == '"training.steps"'
