"""Reading documents from files, and what files that are none get to hear."""

import codecs
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_lite.runtime import documents
from llama2_lite.runtime.documents import hold_out, read_documents


def read(*patterns: Path | str, text_field: str = "text") -> list[str]:
    return list(read_documents(map(str, patterns), text_field))


def as_jsonl(texts: list[str], field: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, field: text}) for text in texts).encode()


# without the time, which would make the name of a test differ between processes
CUT_SHORT = gzip.compress(as_jsonl(["x" * 999]), mtime=0)[:-9]


def test_every_kind_of_file(tmp_path: Path) -> None:
    texts = ["One.\nTwo.", "naïve 中文 🙂", ""]
    (tmp_path / "a.txt").write_text("A play.\n\nIts end.\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(texts) + b"\n\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(as_jsonl(texts)))
    pq.write_table(pa.table({"n": [1, 2, 3], "text": texts}), tmp_path / "d.parquet")
    assert read(tmp_path / "a.txt") == ["A play.\n\nIts end.\n"]
    for name in ("b.jsonl", "c.jsonl.gz", "d.parquet"):
        assert read(tmp_path / name) == texts
    assert read(tmp_path / "*") == ["A play.\n\nIts end.\n", *texts * 3]


def test_the_mark_that_windows_writes_is_no_text(tmp_path: Path) -> None:
    lines = as_jsonl(["naïve", "\ufeffx"])
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"A play.")
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8 + lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + lines))
    assert read(tmp_path / "*") == ["A play.", *["naïve", "\ufeffx"] * 2]


def test_order_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt", "odd [1].txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "?.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "b.txt", tmp_path / "?.txt") == ["b.txt", "a.txt"]
    assert read(tmp_path / "deep" / "**" / "*.txt") == ["deep/c.txt", "deep/er/d.txt"]
    assert read(tmp_path / "odd [1].txt") == ["odd [1].txt"]
    monkeypatch.chdir(tmp_path / "deep")
    assert read("c.txt", "*/d.txt", "../a*") == ["deep/c.txt", "deep/er/d.txt", "a.txt"]


@given(text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1))
@settings(max_examples=100, deadline=None)
def test_text_files_are_read_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    text = text.removeprefix("\ufeff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_BYTES", 3)
        patch.setattr(documents, "DOCUMENT_CHARACTERS", 5)
        if not text.strip() and len(text) <= 5:
            with pytest.raises(ValueError, match=r"pieces\.txt is empty"):
                read(path)
            return
        parts = read(path)
    together = "".join(parts)
    assert text.startswith(together)
    assert not text[len(together) :].strip()
    assert all(0 < len(part) <= 5 for part in parts)


def test_a_long_text_is_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "DOCUMENT_CHARACTERS", 10)
    (tmp_path / "long.txt").write_text("one two\nthree\nfour five six seven")
    assert read(tmp_path / "long.txt") == [
        "one two\n",
        "three\n",
        "four five ",
        "six seven",
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.txt", b"good\0bad", "a.txt is binary: byte 4 is zero"),
        ("a.txt", "é".encode() + b"\xff..", "a.txt is not UTF-8 at byte 2"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 at byte 3"),  # Latin-1
        ("a.txt", "🙂".encode()[:3], "a.txt is not UTF-8 at byte 0"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]', "a.jsonl, line 3: not a JSON object"),
        ("a.jsonl", b'{"body": "x", "n": 1}', "line 1: no field 'text', only body, n"),
        ("a.jsonl", b'{"text": null}', "line 1: the field 'text' is not a string"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8 at byte 10"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"n": %s}' % (b"1" * 5000), "a.jsonl, line 1: a number has too"),
        ("a.txt", codecs.BOM_UTF8 + b"\n", "a.txt is empty"),
        ("a.txt", codecs.BOM_UTF8 + b"good\xff", "a.txt is not UTF-8 at byte 7"),
        ("a.txt", codecs.BOM_UTF8[:2], "a.txt is not UTF-8 at byte 0"),
        ("a.jsonl.gz", b"plain text", "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", CUT_SHORT, "not a whole gzip"),
        ("a.parquet", b"PAR1 but no more", "a.parquet is not a Parquet file"),
        ("a.parquet", b"", "a.parquet is not a Parquet file"),
        ("a.doc", b"text", "a.doc is none of .txt, .jsonl, .jsonl.gz, .parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_wrong_bytes_far_into_a_file(tmp_path: Path) -> None:
    for wrong, sentence in [(b"\xff", "not UTF-8 at byte"), (b"\0", "binary: byte")]:
        for position in (2**20 - 1, 2**20, 2**20 + 1, 3_000_001):
            content = "é".encode() * 1_600_000
            content = content[: position & ~1] + wrong + content[position & ~1 :]
            (tmp_path / "a.txt").write_bytes(content)
            with pytest.raises(ValueError, match=f"{sentence} {position & ~1}"):
                read(tmp_path / "a.txt")


def test_bad_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(ValueError, match="has no column 'text', only body, n"):
        read(path)
    assert read(path, text_field="body") == ["x"]
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: the field 'n' is not a"):
        read(path, text_field="n")
    pq.write_table(pa.table({"text": ["x"] * 1500 + [None]}), path)
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 1500: the field 'text' is not a string"
    ):
        read(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match=r"a\.parquet is empty"):
        read(path)


def test_damaged_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(1500)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1200)
    whole = path.read_bytes()
    second = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    for first, row in {second: 1024, len(whole) - 100: 0, len(whole) - 4: 0}.items():
        path.write_bytes(whole[:first] + b"\xff" * 4 + whole[first + 4 :])
        sentence = f"{path} is not a Parquet file, or damaged from row {row} on ("
        with pytest.raises(ValueError, match=re.escape(sentence)) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    ends, letters = np.array([0, 1, 5], "int32"), b"xcaf\xe9"
    latin = [None, pa.py_buffer(ends), pa.py_buffer(letters)]
    texts = pa.Array.from_buffers(pa.string(), 2, latin)
    years = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"text": texts, "when": years}), path)
    with pytest.raises(
        ValueError, match=r"row 1: the field 'text' cannot be read: 'ut"
    ):
        read(path)
    with pytest.raises(ValueError, match="row 0: the field 'when' is not a string"):
        read(path, text_field="when")
    (_, first), (_, second) = documents.parquet_rows(path)
    assert first() == {"text": "x"}  # without the date
    with pytest.raises(ValueError, match="the field 'text' cannot be read"):
        second()
    (_, second) = documents.parquet_rows(path, "when")
    with pytest.raises(ValueError, match="the field 'when' cannot be read: date value"):
        second[1]()


@pytest.mark.parametrize("pattern", ["none.txt", "*.txt", "**/*.jsonl", ""])
def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_documents([pattern])
    with pytest.raises(FileNotFoundError, match=r"folder is a folder; .* 'folder/\*"):
        read_documents(["folder"])


@given(texts=st.lists(st.text(max_size=9), max_size=9), fraction=st.floats(0, 1))
def test_hold_out_divides_the_characters(texts: list[str], fraction: float) -> None:
    training, held_out = map(list, hold_out(lambda: texts, fraction))
    whole = "".join(texts)
    assert "".join(training + held_out) == whole
    assert len("".join(training)) == int(len(whole) * (1 - fraction))
    assert "" not in training + held_out


def test_real_files(shared_data: Path) -> None:
    play = (shared_data / "tinyshakespeare.txt").read_text()
    assert read(shared_data / "tinyshakespeare.txt") == [play]
    training, held_out = map(list, hold_out(lambda: [play]))
    assert training + held_out == [
        play[: int(len(play) * 0.9)],
        play[int(len(play) * 0.9) :],
    ]
    assert len(read(shared_data / "gsm8k_500.jsonl", text_field="question")) == 500
    assert len(read(shared_data / "hh_*.jsonl.gz", text_field="chosen")) == 1500
