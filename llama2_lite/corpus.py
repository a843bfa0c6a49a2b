"""The corpus.

Exported from book/04_corpus.md, which explains every part. Edit it there,
then `make export`.
"""

import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2_lite.tokenizer import Tokenizer

# Everything Unicode calls a control character but tab and line feed, the byte order
# mark, and halves of surrogate pairs, which JSON can spell and UTF-8 cannot hold.
UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    """One document without control characters, trailing spaces and outer blank lines.

    Lines end in a line feed afterwards. Everything else, letters, accents and emoji,
    stays as it is: no Unicode normalisation, as in the tokenizer.
    """
    text = UNWANTED.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n")


def clean_documents(documents: Iterable[str], min_characters: int = 1) -> Iterator[str]:
    """Clean every document and drop those shorter than ``min_characters``."""
    for document in documents:
        document = clean(document)
        if len(document) >= min_characters:
            yield document


def drop_duplicates(documents: Iterable[str]) -> Iterator[str]:
    """Drop every document that came before, character for character.

    Remembers 16 bytes of a hash for each document, not its text.
    """
    seen = set()
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def shingles(document: str, n_words: int = 5) -> list[bytes]:
    """The distinct runs of ``n_words`` words, in lower case; all words if fewer."""
    words = re.findall(r"\w+", document.lower())
    n_runs = max(1, len(words) - n_words + 1)
    runs = {" ".join(words[i : i + n_words]).encode() for i in range(n_runs)}
    return sorted(runs)


def drop_near_duplicates(
    documents: Iterable[str],
    threshold: float = 0.8,
    n_words: int = 5,
    n_hashes: int = 128,
    seed: int = 1,
) -> Iterator[str]:
    """Drop documents that share most of their word runs with one kept before.

    Locality-sensitive hashing finds candidates; a candidate counts if the share of
    equal minimum hashes, which estimates the Jaccard similarity, reaches
    ``threshold``. Sources: Broder, 1997; the library is datasketch.
    """
    from datasketch import MinHash, MinHashLSH  # takes half a second to import

    index = MinHashLSH(threshold=threshold, num_perm=n_hashes)
    kept: dict[int, Any] = {}
    empty = MinHash(num_perm=n_hashes, seed=seed)
    for number, document in enumerate(documents):
        signature = empty.copy()
        runs = shingles(document, n_words)
        for start in range(0, len(runs), 4096):  # bounds the memory of one update
            signature.update_batch(runs[start : start + 4096])
        likely = (kept[key] for key in index.query(signature))
        if not any(signature.jaccard(other) >= threshold for other in likely):
            index.insert(number, signature)
            kept[number] = signature
            yield document


def mix(
    sources: Mapping[str, Iterable[str]],
    shares: Mapping[str, float],
    n_characters: int,
) -> Iterator[str]:
    """Documents of several sources, in given shares of the characters.

    The next document is taken from the source furthest behind its share. A source
    that is used up starts again, which is what up-sampling means, so sources must be
    things one can iterate over twice: lists, not generators.

    Args:
        sources: the documents by source.
        shares: any positive numbers, one for each source; 2 means twice as much as 1.
        n_characters: stop with the document that reaches so many.

    Raises:
        ValueError: if sources and shares differ, a source is empty or an iterator,
            or a share is not positive.
    """
    if set(sources) != set(shares):
        raise ValueError(f"{sorted(shares)=} does not match {sorted(sources)=}")
    for name, documents in sources.items():
        if iter(documents) is documents:
            raise ValueError(
                f"source {name!r} is an iterator; it can be read only once"
            )
        if not shares[name] > 0:
            raise ValueError(f"the share of {name!r} is {shares[name]}, not positive")
    readers = {name: _endless(name, documents) for name, documents in sources.items()}
    written = dict.fromkeys(sources, 0)
    while sum(written.values()) < n_characters:
        name = min(written, key=lambda name: written[name] / shares[name])
        document = next(readers[name])
        written[name] += len(document)
        yield document


def _endless(name: str, documents: Iterable[str]) -> Iterator[str]:
    """The documents of a source again and again."""
    while True:
        n_characters = 0
        for document in documents:
            n_characters += len(document)
            yield document
        if not n_characters:
            raise ValueError(f"source {name!r} has no text")


BLOCK_BYTES = 2**20
DOCUMENT_CHARACTERS = 2**22  # a longer text file becomes several documents


def read_documents(patterns: list[str], text_field: str = "text") -> Iterator[str]:
    """Documents from .txt, .jsonl, .jsonl.gz and .parquet files, as a stream.

    A text file is one document; one of more than 4 million characters is cut at line
    ends into several, so that no file has to fit into memory. A JSONL line and a
    Parquet row are one document each. Files come in the order of the patterns, those
    of one pattern sorted by name, each once.

    Args:
        patterns: paths, or globs with ``*``, ``?`` and ``**``.
        text_field: the JSON key or Parquet column that holds the text.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        ValueError: if a file is empty, of another kind, binary, not UTF-8, or lacks
            the field; it names the file and the byte, line or row.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        found = [
            path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()
        ]
        if not found:
            raise FileNotFoundError(f"no file matches {pattern}")
        paths.update(dict.fromkeys(sorted(found)))
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl}
    readers[".parquet"] = _read_parquet
    for path in paths:
        if not any(path.endswith(suffix) for suffix in readers):
            raise ValueError(f"{path} is none of {', '.join(readers)}")
    return chain.from_iterable(
        reader(path, text_field)
        for path in paths
        for suffix, reader in readers.items()
        if path.endswith(suffix)
    )


def _read_text(path: str, _: str) -> Iterator[str]:
    """A text file, in documents of at most ``DOCUMENT_CHARACTERS``."""
    rest, n_documents = "", 0
    for block in _decode_blocks(path):
        rest += block
        while len(rest) > DOCUMENT_CHARACTERS:
            end = rest.rfind("\n", 0, DOCUMENT_CHARACTERS) + 1 or DOCUMENT_CHARACTERS
            yield rest[:end]
            rest = rest[end:]
            n_documents += 1
    if rest.strip():
        yield rest
    elif not n_documents:
        raise ValueError(f"{path} is empty")


def _decode_blocks(path: str) -> Iterator[str]:
    """The text of a file, block by block, or the offset of the first wrong byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while True:
            start = file.tell() - len(decoder.getstate()[0])
            block = file.read(BLOCK_BYTES)
            if b"\0" in block:
                zero = file.tell() - len(block) + block.index(0)
                raise ValueError(f"{path} is binary: byte {zero} is zero")
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                wrong = start + error.start
                raise ValueError(f"{path} is not UTF-8: see byte {wrong}") from None
            if not block:
                return


def _read_jsonl(path: str, text_field: str) -> Iterator[str]:
    """The field of every line; blank lines are skipped."""
    n_documents = 0
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, text_field, f"{path}, line {number}:")
                    n_documents += 1
        except (gzip.BadGzipFile, EOFError):
            raise ValueError(f"{path} is not a whole gzip file") from None
    if not n_documents:
        raise ValueError(f"{path} is empty")


def _text_of(line: bytes, text_field: str, where: str) -> str:
    """The field of one JSON line."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} byte {error.start} is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{where} this is not JSON") from None
    if not isinstance(record, dict) or text_field not in record:
        names = ", ".join(record) if isinstance(record, dict) else "no object"
        raise ValueError(f"{where} no field {text_field!r} (there is {names})")
    if not isinstance(record[text_field], str):
        raise ValueError(f"{where} the field {text_field!r} is not a string")
    return record[text_field]


def _read_parquet(path: str, text_field: str) -> Iterator[str]:
    """The rows of a column of strings."""
    import pyarrow as pa  # takes a third of a second to import
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a Parquet file") from None
    names = file.schema_arrow.names
    if text_field not in names:
        raise ValueError(
            f"{path} has no column {text_field!r}, only {', '.join(names)}"
        )
    if not file.metadata.num_rows:
        raise ValueError(f"{path} is empty")
    row = 0
    for batch in file.iter_batches(columns=[text_field], batch_size=1024):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise ValueError(f"{path}, row {row}: {text_field!r} is not a string")
            yield text
            row += 1


def hold_out(
    read: Callable[[], Iterable[str]], fraction: float = 0.1
) -> tuple[Iterator[str], Iterator[str]]:
    """Split documents, by characters, into training and a held-out last part.

    Args:
        read: gives the same documents each time it is called; it is called three times.
        fraction: of the characters that are held out; a document may be cut.
    """
    boundary = int(sum(map(len, read())) * (1 - fraction))
    return _between(read(), 0, boundary), _between(read(), boundary, None)


def _between(documents: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """Characters ``start`` to ``stop`` of a stream of documents."""
    position = 0
    for document in documents:
        end = None if stop is None else max(stop - position, 0)
        part = document[max(start - position, 0) : end]
        if part:
            yield part
        position += len(document)


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    shard_tokens: int = 2**24,
) -> None:
    """Encode documents and write their ids into files that can be memory-mapped.

    Each document becomes <s>, its ids, </s>; documents follow each other without
    padding, across shards too. Holds one shard and one batch of documents in memory.
    Writes ``folder.partial`` and renames it when all is on disk, so that a folder of
    the right name is always whole.

    Args:
        documents: an iterator is enough.
        tokenizer: its size decides between 2 and 4 bytes for each token.
        folder: must not exist yet.
        shard_tokens: tokens in each file but the last.

    Raises:
        FileExistsError: if there is such a folder.
        ValueError: if there are no documents.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    totals = {"documents": 0, "characters": 0}
    ids = _encode(documents, tokenizer, dtype, totals)
    shards = [
        _write_shard(beside / f"shard-{number:05}.bin", tokens)
        for number, tokens in enumerate(_rechunk(ids, shard_tokens))
    ]
    if not shards:
        raise ValueError("there are no documents to write")
    index = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        **totals,
        "tokens": sum(shard["tokens"] for shard in shards),
        "shards": shards,
    }
    _write_bytes(beside / "index.json", json.dumps(index, indent=1).encode())
    beside.rename(folder)


def _encode(
    documents: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype, totals: dict
) -> Iterator[np.ndarray]:
    """The ids of batches of about a million characters; counts into ``totals``."""
    batch: list[str] = []
    n_characters = 0
    for document in chain(documents, [None]):
        if document is not None:
            batch.append(document)
            n_characters += len(document)
        if batch and (document is None or n_characters >= 2**20):
            rows = tokenizer.encode_batch(batch, bos=True, eos=True)
            totals["documents"] += len(batch)
            totals["characters"] += n_characters
            yield np.fromiter(chain.from_iterable(rows), dtype)
            batch, n_characters = [], 0


def _rechunk(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same numbers in arrays of exactly ``size``, but for the last."""
    pending: list[np.ndarray] = []
    n_pending = 0
    for array in arrays:
        pending.append(array)
        n_pending += len(array)
        while n_pending >= size:
            whole = np.concatenate(pending)
            yield whole[:size]
            pending, n_pending = [whole[size:]], n_pending - size
    if n_pending:
        yield np.concatenate(pending)


def _write_shard(path: Path, tokens: np.ndarray) -> dict[str, Any]:
    """Write one file and return its entry in the index."""
    data = tokens.tobytes()
    _write_bytes(path, data)
    digest = hashlib.sha256(data).hexdigest()
    return {"file": path.name, "tokens": len(tokens), "sha256": digest}


def _write_bytes(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class TokenDataset:
    """Windows of T + 1 tokens over a folder that `write_shards` made.

    Window w holds tokens w T to (w + 1) T, both included: T inputs and, one further,
    their T targets. So every token but the first is a target once, up to fewer than T
    at the end, which make no window. The shards are memory-mapped: the operating
    system reads what is asked for and forgets it when memory is needed.

    Args:
        folder: the shards and their index.
        sequence_length: T.
        seed: of the order of the windows.
        verify: whether to read everything once and compare the checksums.

    Raises:
        FileNotFoundError: if there is no index or a shard is missing.
        ValueError: if a shard has the wrong size or checksum, holds an id outside the
            vocabulary, or the whole is shorter than one window.
    """

    def __init__(
        self,
        folder: str | Path,
        sequence_length: int,
        *,
        seed: int = 0,
        verify: bool = True,
    ):
        self.folder = Path(folder)
        self.sequence_length = sequence_length
        self.seed = seed
        self.index = _read_index(self.folder)
        self.vocab_size: int = self.index["vocab_size"]
        self.n_tokens: int = self.index["tokens"]
        self.n_characters: int = self.index["characters"]
        self._shards = [self._open(shard, verify) for shard in self.index["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self._orders: dict[int, np.ndarray] = {}
        if self.n_tokens <= sequence_length:
            raise ValueError(
                f"{self.folder} has {self.n_tokens} tokens, but a window of length "
                f"{sequence_length} needs {sequence_length + 1}"
            )

    def _open(self, shard: dict[str, Any], verify: bool) -> np.ndarray:
        """Memory-map one shard."""
        path = self.folder / shard["file"]
        dtype = np.dtype(self.index["dtype"])
        if not path.is_file():
            raise FileNotFoundError(f"the shard {path} is missing")
        expected, size = shard["tokens"] * dtype.itemsize, path.stat().st_size
        if size != expected:
            raise ValueError(f"the shard {path} has {size} bytes instead of {expected}")
        tokens = np.memmap(path, dtype, mode="r")
        if verify and hashlib.sha256(tokens).hexdigest() != shard["sha256"]:
            raise ValueError(f"the shard {path} does not match its checksum")
        if verify and int(tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"the shard {path} holds the id {tokens.max()}, beyond the vocabulary "
                f"of {self.vocab_size}"
            )
        return tokens

    def __len__(self) -> int:
        """Windows in an epoch."""
        return (self.n_tokens - 1) // self.sequence_length

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` of the whole corpus, int64."""
        parts = []
        while start < stop:
            shard = bisect_right(self._ends, start)
            end = self._ends[shard]
            first = end - len(self._shards[shard])
            parts.append(self._shards[shard][start - first : min(stop, end) - first])
            start = end
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def __getitem__(self, window: int) -> Tensor:
        """Window ``window`` in the order of the corpus: (T + 1,)."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        start = window * self.sequence_length
        return self.read(start, start + self.sequence_length + 1)

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """The windows of one process at one step, shuffled anew in each epoch.

        A pure function of its arguments and the seed. The ranks of a step share
        ``world_size * batch_size`` windows that follow each other, so how many
        processes share them does not change what a step sees.

        Returns:
            (batch_size, T + 1), int64.
        """
        first = (step * world_size + rank) * batch_size
        windows = [self[self._window(first + i)] for i in range(batch_size)]
        return torch.stack(windows)

    def _window(self, position: int) -> int:
        """Which window comes at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, len(self))
        if epoch not in self._orders:
            random = np.random.default_rng([self.seed, epoch])
            order = np.arange(len(self), dtype=np.uint32)
            random.shuffle(order)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return int(self._orders[epoch][place])


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of shards."""
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of shards: no index.json in it")
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None


class TokenLoader:
    """Batches of a dataset without end, from a position that can be saved.

    Args:
        dataset: what to read.
        batch_size: windows for each process and step, B.
        rank, world_size: which of how many processes this is.
    """

    def __init__(
        self, dataset: TokenDataset, batch_size: int, rank: int = 0, world_size: int = 1
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.step = 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (B, T + 1) tensors, int64."""
        while True:
            step, self.step = self.step, self.step + 1
            yield self.dataset.batch(step, self.batch_size, self.rank, self.world_size)

    def state_dict(self) -> dict[str, int]:
        """How many windows all processes have seen, and what fixes their order."""
        windows = self.step * self.batch_size * self.world_size
        return {
            "windows": windows,
            "seed": self.dataset.seed,
            "sequence_length": self.dataset.sequence_length,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the windows seen, possibly with other numbers of processes.

        Raises:
            ValueError: if seed or length differ, or the windows are no whole steps.
        """
        for name in ("seed", "sequence_length"):
            if state[name] != getattr(self.dataset, name):
                raise ValueError(
                    f"the saved position belongs to {name} {state[name]}, "
                    f"not {getattr(self.dataset, name)}"
                )
        step, rest = divmod(state["windows"], self.batch_size * self.world_size)
        if rest:
            raise ValueError(
                f"{state['windows']} windows are no whole number of steps of "
                f"{self.world_size} x {self.batch_size}"
            )
        self.step = step
