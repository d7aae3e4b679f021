from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cptrain.data.cache import cache_folder, publish
from cptrain.data.corpus import Corpus, open_corpus
from cptrain.data.placement import BestFit
from cptrain.data.prepare import prepare_corpus
from cptrain.data.settings import DataConfig, TokenizerConfig
from cptrain.data.sources import find_files
from cptrain.data.split import split_documents
from cptrain.data.tokenizer import ByteTokenizer

BOS, EOS = 256, 257


def corpus_of(tmp_path: Path, texts: list[str]) -> Corpus:
    """A corpus of these documents, one jsonl line each."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepared(tmp_path, source="jsonl", paths=(str(path),))


def prepared(tmp_path: Path, **values: Any) -> Corpus:
    config = DataConfig(cache_dir=str(tmp_path / "cache"), **values)
    return open_corpus(prepare_corpus(config, TokenizerConfig(), seed=0))


def documents_of(corpus: Corpus) -> list[list[int]]:
    bounds = zip(corpus.offsets[:-1], np.diff(corpus.offsets), strict=True)
    return [corpus.read(np.array([begin]), np.array([length])).tolist() for begin, length in bounds]


def as_document(text: str) -> list[int]:
    return [BOS, *text.encode(), EOS]


def write_tokens(path: Path, tokens: list[int], *, dtype: str = "uint16", ends: list[int] | None = None) -> Path:
    np.array(tokens, dtype=dtype).tofile(path)
    if ends is not None:
        np.array([0, *ends], dtype="<i8").tofile(path.with_suffix(".idx"))
    return path


# Sources


def test_data_corpus_text_file_is_one_document_between_bos_and_eos(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second", "a.txt": "first é", "c/d.txt": "third"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    corpus = prepared(tmp_path, source="text", paths=(str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")))
    assert documents_of(corpus) == [as_document(text) for text in ("first é", "second", "third")]


def test_data_corpus_jsonl_line_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": "no"}\n\n{"body": "two\\nlines"}')
    corpus = prepared(tmp_path, source="jsonl", paths=(str(tmp_path / "a.jsonl"),), text_field="body")
    assert documents_of(corpus) == [as_document("one"), as_document("two\nlines")]


def test_data_corpus_stdlib_is_millions_of_tokens(tmp_path: Path) -> None:
    """It holds files that are no UTF-8: these are left out even though data.on_error is "raise"."""
    corpus = prepared(tmp_path)
    assert corpus.num_documents > 300
    assert corpus.num_tokens > 3_000_000


def test_data_corpus_stdlib_leaves_installed_packages_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.py", "a/z.py", "a.py", "site-packages/p.py", "a/dist-packages/q.py", "c.txt"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    assert documents_of(prepared(tmp_path)) == [as_document(name) for name in ("a.py", "a/z.py", "b.py")]


def test_data_corpus_empty_documents_are_left_out(tmp_path: Path) -> None:
    assert documents_of(corpus_of(tmp_path, ["a", "", "b"])) == [as_document("a"), as_document("b")]


def test_data_corpus_token_file_is_cut_after_each_eos(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", [1, 2, EOS, 3, EOS, 4])
    corpus = prepared(tmp_path, source="tokens", paths=(str(path),))
    assert documents_of(corpus) == [[1, 2, EOS], [3, EOS], [4]]


def test_data_corpus_token_file_is_cut_at_eos_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptrain.data.token_files._CHUNK", 2)
    path = write_tokens(tmp_path / "a.bin", [1, 2, EOS, 3, 4, 5, EOS])
    corpus = prepared(tmp_path, source="tokens", paths=(str(path),))
    assert documents_of(corpus) == [[1, 2, EOS], [3, 4, 5, EOS]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_data_corpus_token_file_is_cut_at_its_offsets(tmp_path: Path, dtype: str) -> None:
    path = write_tokens(tmp_path / "a.bin", [1, 2, 3, 4, 5], dtype=dtype, ends=[2, 2, 5])
    corpus = prepared(tmp_path, source="tokens", paths=(str(path),), token_dtype=dtype)
    assert documents_of(corpus) == [[1, 2], [3, 4, 5]]


def test_data_corpus_joins_token_files(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [1, 2], ends=[1, 2])
    write_tokens(tmp_path / "b.bin", [3, 4, 5], ends=[3])
    corpus = prepared(tmp_path, source="tokens", paths=(str(tmp_path / "*"),))  # the .idx are no tokens
    assert documents_of(corpus) == [[1], [2], [3, 4, 5]]


def test_data_corpus_pieces_may_lie_in_several_token_files(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [1, 2, 3], ends=[3])
    write_tokens(tmp_path / "b.bin", [4, 5, 6], ends=[3])
    corpus = prepared(tmp_path, source="tokens", paths=(str(tmp_path / "*.bin"),))
    assert corpus.read(np.array([4, 0, 3]), np.array([2, 2, 1])).tolist() == [5, 6, 1, 2, 4]


# Faults


def bad_text(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    return {"source": "text", "paths": (str(tmp_path / "*.txt"),)}


def dangling_link(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").symlink_to(tmp_path / "nowhere")
    return {"source": "text", "paths": (str(tmp_path / "*.txt"),)}


def bad_line(line: bytes) -> Any:
    def write(tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
        return {"source": "jsonl", "paths": (str(tmp_path / "*.jsonl"),)}

    return write


def bad_tokens(size: int, ends: list[int] | None) -> Any:
    def write(tmp_path: Path) -> dict[str, Any]:
        write_tokens(tmp_path / "good.bin", [1, 2, EOS])
        write_tokens(tmp_path / "bad.bin", [1, 2, 3], ends=ends)
        with (tmp_path / "bad.bin").open("r+b") as file:
            file.truncate(size)
        return {"source": "tokens", "paths": (str(tmp_path / "*.bin"),)}

    return write


FAULTS = {
    "no utf-8": (bad_text, "bad.txt", "no UTF-8 at byte 2"),
    "dangling link": (dangling_link, "bad.txt", "cannot be read: No such file"),
    "torn line": (bad_line(b'{"text": "go'), "bad.jsonl:2", "no JSON"),
    "line of latin-1": (bad_line(b'{"text": "\xff"}'), "bad.jsonl:2", "no JSON: 'utf-8' codec"),
    "other field": (bad_line(b'{"body": "x"}'), "bad.jsonl:2", "no text in the field 'text'"),
    "not a string": (bad_line(b'{"text": 3}'), "bad.jsonl:2", "no text in the field 'text'"),
    "not an object": (bad_line(b"[1]"), "bad.jsonl:2", "no text in the field 'text'"),
    "lone surrogate": (bad_line(rb'{"text": "\ud800"}'), "bad.jsonl:2", "cannot be tokenized"),
    "torn token": (bad_tokens(5, None), "bad.bin", "5 bytes are no whole number of uint16 tokens"),
    "empty token file": (bad_tokens(0, None), "bad.bin", "0 bytes"),
    "offsets too short": (bad_tokens(6, [2]), "bad.idx", "rising from 0 to 3"),
    "offsets fall": (bad_tokens(6, [2, 1, 3]), "bad.idx", "rising from 0 to 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_corpus_fault_raises_with_its_place(tmp_path: Path, fault: str) -> None:
    write, where, why = FAULTS[fault]
    with pytest.raises(ValueError, match=f"{where}: .*{why}.*data.on_error"):
        prepared(tmp_path, **write(tmp_path))


@pytest.mark.parametrize("fault", FAULTS)
def test_data_corpus_fault_is_skipped_counted_and_named(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    write, where, why = FAULTS[fault]
    corpus = prepared(tmp_path, **write(tmp_path), on_error="skip")
    assert corpus.num_documents == 1
    [message] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "skipped 1:" in message
    assert where in message
    assert why in message


def test_data_corpus_skipped_is_named_when_the_cache_serves_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = bad_text(tmp_path)
    prepared(tmp_path, **values, on_error="skip")
    caplog.clear()
    prepared(tmp_path, **values, on_error="skip")
    assert "bad.txt" in caplog.text


def test_data_corpus_skipped_lines_are_all_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 100)
    prepared(tmp_path, source="jsonl", paths=(str(tmp_path / "bad.jsonl"),), on_error="skip")
    assert all(f"bad.jsonl:{line} " in caplog.text for line in range(2, 102))


def test_data_corpus_skipping_cached_does_not_hide_a_later_raise(tmp_path: Path) -> None:
    values = bad_text(tmp_path)
    prepared(tmp_path, **values, on_error="skip")
    with pytest.raises(ValueError, match=r"bad\.txt"):
        prepared(tmp_path, **values, on_error="raise")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_data_corpus_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, on_error: str) -> None:
    path = write_tokens(tmp_path / "a.bin", [1, 259, 2], ends=[3])
    with pytest.raises(ValueError, match=r"a\.bin: token 1 is 259, the tokenizer has 259 ids"):
        prepared(tmp_path, source="tokens", paths=(str(path),), on_error=on_error)


def test_data_corpus_tokens_without_any_boundary_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tokens(tmp_path / "a.bin", [1, 2, 3])
    assert prepared(tmp_path, source="tokens", paths=(str(path),)).num_documents == 1
    assert "a.bin: no EOS (id 257)" in caplog.text


@pytest.mark.parametrize("pattern", ["*.nothing", "missing.txt"])
def test_data_corpus_path_that_matches_nothing_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=rf"data\.paths: .*{pattern.replace('*', '.')}.* matches no file"):
        prepared(tmp_path, source="text", paths=(str(tmp_path / "a.txt"), str(tmp_path / pattern)))


def test_data_corpus_reads_a_file_once_by_whatever_links_it_is_matched(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(name)
    (tmp_path / "texts" / "c.txt").symlink_to("a.txt")
    (tmp_path / "linked").symlink_to("texts")
    found = find_files(DataConfig(source="text", paths=(f"{tmp_path}/linked/*", f"{tmp_path}/texts/*")))
    assert found == [tmp_path / "linked" / name for name in ("a.txt", "b.txt")]


def test_data_corpus_folder_as_path_is_told_how_to_glob(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; write .*/\*\*/\*"):
        prepared(tmp_path, source="text", paths=(str(tmp_path),))


def test_data_corpus_without_any_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text in any file \(1 empty"):
        prepared(tmp_path, source="text", paths=(str(tmp_path / "a.txt"),))


# Cache


def test_data_corpus_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    first = prepared(tmp_path, source="text", paths=(str(tmp_path / "a.txt"),))
    monkeypatch.setattr("cptrain.data.prepare._tokenize", None)  # may not be called
    assert prepared(tmp_path, source="text", paths=(str(tmp_path / "a.txt"),)).folder == first.folder


def test_data_corpus_is_made_again_when_a_file_changes(tmp_path: Path) -> None:
    assert documents_of(corpus_of(tmp_path, ["old"])) == [as_document("old")]
    assert documents_of(corpus_of(tmp_path, ["newer"])) == [as_document("newer")]


def test_data_corpus_is_cut_again_when_offsets_appear(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", [1, 2, EOS])
    assert documents_of(prepared(tmp_path, source="tokens", paths=(str(path),))) == [[1, 2, EOS]]
    write_tokens(path, [1, 2, EOS], ends=[1, 3])
    os.utime(path, (1, 1))
    first = prepared(tmp_path, source="tokens", paths=(str(path),))
    write_tokens(path, [1, 2, EOS], ends=[2, 3])
    os.utime(path, (1, 1))
    os.utime(path.with_suffix(".idx"), (2, 2))
    second = prepared(tmp_path, source="tokens", paths=(str(path),))
    assert [documents_of(first), documents_of(second)] == [[[1], [2, EOS]], [[1, 2], [EOS]]]


def test_data_corpus_is_made_again_for_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"one": "a", "two": "b"}')
    made = [prepared(tmp_path, source="jsonl", paths=(str(path),), text_field=field) for field in ("one", "two")]
    assert [documents_of(corpus) for corpus in made] == [[as_document("a")], [as_document("b")]]


def test_data_corpus_is_made_again_for_another_token_dtype(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", [1, 2])
    made = [prepared(tmp_path, source="tokens", paths=(str(path),), token_dtype=f"uint{bits}") for bits in (16, 8)]
    assert [corpus.num_tokens for corpus in made] == [2, 4]


def test_data_corpus_is_made_again_for_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("ab")
    before = prepared(tmp_path, source="text", paths=(str(tmp_path / "a.txt"),))
    monkeypatch.setattr(ByteTokenizer, "encode", lambda _, text: [7] * len(text))
    after = prepared(tmp_path, source="text", paths=(str(tmp_path / "a.txt"),))
    assert [documents_of(before), documents_of(after)] == [[as_document("ab")], [[BOS, 7, 7, EOS]]]


def test_data_corpus_without_a_bos_in_the_vocabulary_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "bos_id", None)
    assert documents_of(corpus_of(tmp_path, ["a"])) == [[ord("a"), EOS]]


@pytest.mark.parametrize("wrong", [-1, 259])
def test_data_corpus_tokenizer_that_leaves_its_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode", lambda _, text: [1, wrong])
    with pytest.raises(ValueError, match=r"texts\.jsonl:1: the tokenizer gave ids outside of its vocab_size = 259"):
        corpus_of(tmp_path, ["a"])


def test_data_corpus_fingerprint_follows_content_and_not_place_or_time(tmp_path: Path) -> None:
    prints = []
    for name, texts in {"one": ["a", "b"], "two": ["a", "b"], "three": ["a", "c"], "four": ["ab"]}.items():
        (tmp_path / name).mkdir()
        prints.append(corpus_of(tmp_path / name, texts).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_data_corpus_fingerprint_of_token_files_follows_ids_and_boundaries(tmp_path: Path) -> None:
    prints = []
    for name, tokens, ends in (("a", [1, 2], [1, 2]), ("b", [1, 2], [2]), ("c", [1, 3], [1, 2]), ("d", [1, 2], [1, 2])):
        path = write_tokens(tmp_path / f"{name}.bin", tokens, ends=ends)
        prints.append(prepared(tmp_path, source="tokens", paths=(str(path),)).fingerprint)
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3


def test_data_corpus_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, ["some text"])
    with (corpus.folder / "tokens.bin").open("r+b") as file:
        file.truncate(4)
    with pytest.raises(RuntimeError, match=r"tokens\.bin: missing, or no longer 11 tokens"):
        open_corpus(corpus.folder)


@pytest.mark.parametrize("damage", ["cut", "removed"])
@pytest.mark.parametrize("name", ["corpus.json", "offsets.npy"])
def test_data_corpus_with_a_damaged_file_says_what_to_remove(tmp_path: Path, name: str, damage: str) -> None:
    folder = corpus_of(tmp_path, ["some text"]).folder
    if damage == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    else:
        (folder / name).unlink()
    with pytest.raises(RuntimeError, match=f"^{folder}: a file in it is missing or damaged .*; remove {folder}, and"):
        open_corpus(folder)


@pytest.mark.parametrize("damage", ["cut", "removed"])
@pytest.mark.parametrize("name", ["training-documents.npy", "training-best_fit-4-split/about.json"])
def test_data_corpus_whose_split_or_placement_is_damaged_says_what_to_remove(
    tmp_path: Path, name: str, damage: str
) -> None:
    corpus = corpus_of(tmp_path, ["some text"] * 9)

    def open_all() -> Path:
        split = split_documents(corpus, fraction=0.1, seed=0)[0]
        BestFit(split, seq_len=4, long_documents="split")
        return split.folder

    file = open_all() / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:9])
    else:
        file.unlink()
    with pytest.raises(RuntimeError, match=f"^{file.parent}: a file in it is missing or damaged"):
        open_all()


def test_data_corpus_that_was_removed_while_it_was_in_use_is_not_made_of_a_part(tmp_path: Path) -> None:
    split = split_documents(corpus_of(tmp_path, ["some text"] * 9), fraction=0.1, seed=0)[0]
    shutil.rmtree(split.corpus.folder)
    with pytest.raises(RuntimeError, match="removed while it was in use; start again"):
        BestFit(split, seq_len=4, long_documents="split")
    with pytest.raises(RuntimeError, match="removed while it was in use; start again"):
        split_documents(split.corpus, fraction=0.1, seed=1)
    assert not split.corpus.folder.exists()


def test_data_corpus_needs_a_home_or_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(RuntimeError, match=r'data\.cache_dir = "auto": Could not determine home directory\. Set data'):
        cache_folder("auto")


def test_data_corpus_that_this_rank_cannot_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"data\.cache_dir must lie on a file system that every rank sees"):
        open_corpus(tmp_path)


def test_data_corpus_pickles_without_its_tokens(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, ["x" * 100_000])
    data = pickle.dumps(corpus)
    assert len(data) < 1000
    assert documents_of(pickle.loads(data)) == documents_of(corpus)


def test_data_cache_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "made", fill)
    assert list(tmp_path.iterdir()) == []


def test_data_cache_folder_is_whole_before_it_has_its_name(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("x")
        assert not (tmp_path / "made").exists()

    publish(tmp_path / "made", fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "a"]


def test_data_cache_two_builders_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    both_inside = threading.Barrier(2, timeout=10)
    faults: list[BaseException] = []

    def build(name: str) -> None:
        def fill(folder: Path) -> None:
            (folder / "a").write_text(name)
            both_inside.wait()
            (folder / "b").write_text(name)

        try:
            publish(tmp_path / "made", fill)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=build, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "a").read_text() == (tmp_path / "made" / "b").read_text()


@pytest.mark.parametrize(("age_s", "kept"), [(60, True), (90_000, False)])
def test_data_cache_removes_what_a_killed_builder_left_long_ago(tmp_path: Path, age_s: float, kept: bool) -> None:
    left = tmp_path / "made.tmp-killed"
    left.mkdir()
    (left / "a").write_text("half")
    for path in (left / "a", left):
        os.utime(path, (time.time() - age_s,) * 2)
    publish(tmp_path / "made", lambda folder: None)
    assert left.exists() == kept


def test_data_cache_that_cannot_be_written_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"file: .*; set data\.cache_dir to a folder"):
        publish(tmp_path / "file" / "made", lambda folder: None)


def test_data_cache_full_disk_names_its_setting_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RuntimeError, match=r"No space left on device; set data\.cache_dir"):
        publish(tmp_path / "made", fill)
    assert list(tmp_path.iterdir()) == []


def test_data_cache_auto_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "cptrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "cptrain"
