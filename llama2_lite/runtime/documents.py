"""Documents from files of text, JSON lines and Parquet."""

import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Place = tuple[str, Callable[[], Record]]  # where a record is, and how to read it

BLOCK_BYTES = 2**20
DOCUMENT_CHARACTERS = 2**21  # a longer text file becomes several documents
# what Python still refuses where the text is JSON
LONG_NUMBER = "a number has too many digits; write it as a string"


def read_documents(patterns: Iterable[str], text_field: str = "text") -> Iterator[str]:
    """Documents from .txt, .jsonl, .jsonl.gz and .parquet files, as a stream.

    A text file is one document, or several cut at line ends if it has more than two
    million characters. Files come in the order of the patterns, those of one pattern
    sorted by name, and each file once.

    Args:
        patterns: paths, or globs with ``*``, ``?`` and ``**``.
        text_field: the JSON key or Parquet column with the text.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        ValueError: if a file is empty, of an unknown kind, binary, not UTF-8, or lacks
            the field; the sentence names the file and the byte, line or row.
    """
    readers = {
        ".txt": _read_text,
        ".jsonl": _read_jsonl,
        ".jsonl.gz": _read_jsonl,
        ".parquet": _read_parquet,
    }
    chosen: dict[Path, Callable[[Path, str], Iterator[str]]] = {}
    for path in chain.from_iterable(map(matching_files, patterns)):
        kinds = [suffix for suffix in readers if path.name.endswith(suffix)]
        if not kinds:
            raise ValueError(f"{path} is none of {', '.join(readers)}")
        chosen[path] = readers[kinds[0]]
    return chain.from_iterable(read(path, text_field) for path, read in chosen.items())


def matching_files(pattern: str) -> list[Path]:
    """The files that a path or glob names."""
    path = Path(pattern)
    if path.is_file():  # its name may hold a bracket
        return [path]
    inside = path.relative_to(path.anchor)
    if inside.parts and path.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder; name its files, as in '{path}/*.txt'"
        )
    found = Path(path.anchor).glob(str(inside)) if inside.parts else ()
    if files := sorted(file for file in found if file.is_file()):
        return files
    raise FileNotFoundError(f"no file matches {pattern}")


def file_stamps(paths: Iterable[Path]) -> list[list[str | int]]:
    """Path, size and time of each of some files, which change when they change."""
    stamps = [(path, path.stat()) for path in sorted({p.resolve() for p in paths})]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stamps]


def _read_text(path: Path, _: str) -> Iterator[str]:
    """A text file in documents of at most ``DOCUMENT_CHARACTERS``."""
    rest, is_empty = "", True
    for block in _decode(path):
        rest += block
        while len(rest) > DOCUMENT_CHARACTERS:
            end = rest.rfind("\n", 0, DOCUMENT_CHARACTERS) + 1 or DOCUMENT_CHARACTERS
            yield rest[:end]
            rest, is_empty = rest[end:], False
    if rest.strip():
        yield rest
    elif is_empty:
        raise ValueError(f"{path} is empty; leave it out")


def _decode(path: Path) -> Iterator[str]:
    """The text of a file block by block, or where it is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:  # Windows writes it
            file.seek(0)
        while True:
            undecoded = decoder.getstate()[0]  # the start of a character cut in two
            start = file.tell() - len(undecoded)
            block = file.read(BLOCK_BYTES)
            if (zero := (undecoded + block).find(0)) >= 0:
                raise ValueError(
                    f"{path} is binary: byte {start + zero} is zero; text is wanted"
                )
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                wrong = start + error.start
                raise ValueError(
                    f"{path} is not UTF-8 at byte {wrong}; convert it, for example by "
                    "iconv -f latin1 -t utf-8"
                ) from None
            if not block:
                return


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    """The field of every line that is not blank."""
    for where, line in json_lines(path):
        yield _field(partial(json_object, line), text_field, where)


def json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where it stands, and what it is, of every line that is not blank."""
    is_empty = True
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix, Path.open)(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{path}, line {number}:", line
                    is_empty = False
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError):
            kind = "xz" if path.suffix == ".xz" else "gzip"
            raise ValueError(f"{path} is not a whole {kind} file") from None
    if is_empty:
        raise ValueError(f"{path} is empty; leave it out")


def json_object(line: bytes) -> Record:
    """The object in one line of JSON."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("not JSON; each line must be one object") from None
    except ValueError:
        raise ValueError(LONG_NUMBER) from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _field(load: Callable[[], Record], text_field: str, where: str) -> str:
    """The text in one record."""
    try:
        record = load()
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    if text_field not in record:
        there = ", ".join(record) or "nothing"
        raise ValueError(
            f"{where} no field {text_field!r}, only {there}; name one by "
            "--data.text_field"
        )
    if not isinstance(record[text_field], str):
        raise ValueError(f"{where} the field {text_field!r} is not a string")
    return record[text_field]


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    """The rows of a column of strings."""
    for where, load in parquet_rows(path, text_field):
        yield _field(load, text_field, where)


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Place]:
    """Every row, of one column or of all but dates.

    No layout has dates, and not every one of them has a place in Python.
    """
    import pyarrow as pa  # takes a third of a second to import
    import pyarrow.parquet as pq

    number = 0
    with path.open("rb") as source:
        try:
            file = pq.ParquetFile(source)
            _check_table(path, file, column)
            dates = pa.types.is_temporal
            names = [each.name for each in file.schema_arrow if not dates(each.type)]
            for batch in file.iter_batches(1024, columns=[column] if column else names):
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                for row in range(len(batch)):
                    yield f"{path}, row {number}:", partial(_row, columns, row)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(re.findall("[!-~]+", str(error))).rstrip(".")
            raise ValueError(
                f"{path} is not a Parquet file, or damaged from row {number} on "
                f"({reason}); fetch it again"
            ) from None


def _check_table(path: Path, file: Any, column: str | None) -> None:
    """Refuse a Parquet file without rows, or without a column."""
    if column is not None and column not in file.schema_arrow.names:
        there = ", ".join(file.schema_arrow.names)
        raise ValueError(
            f"{path} has no column {column!r}, only {there}; name one by "
            "--data.text_field"
        )
    if not file.metadata.num_rows:
        raise ValueError(f"{path} is empty; leave it out")


def _row(columns: dict[str, Any], row: int) -> Record:
    """One row of some columns."""
    record = {}
    for name, column in columns.items():
        try:
            record[name] = column[row].as_py()
        except (ValueError, OverflowError) as error:
            why = f"the field {name!r} cannot be read: {error}"
            raise ValueError(why) from None
    return record


def hold_out(
    read: Callable[[], Iterable[str]], fraction: float = 0.1
) -> tuple[Iterator[str], Iterator[str]]:
    """Split documents, by characters, into a part to train on and a last part.

    Args:
        read: gives the same documents each time; it is called three times.
        fraction: of the characters to hold out. The document at the border is cut.
    """
    border = int(sum(map(len, read())) * (1 - fraction))
    return _between(read(), 0, border), _between(read(), border, None)


def _between(documents: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """The characters of a stream from ``start`` up to ``stop``, in documents."""
    position = 0
    for document in documents:
        if stop is not None and position >= stop:
            return
        part = document[
            max(start - position, 0) : None if stop is None else stop - position
        ]
        if part:
            yield part
        position += len(document)
