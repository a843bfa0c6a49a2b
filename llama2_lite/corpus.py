"""The corpus.

Exported from book/04_corpus.md, which explains every part. Edit it there,
then `make export`.
"""

import hashlib
import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2_lite.tokenizer import Tokenizer

# Control characters but tab and line feed, the byte order mark, and halves of
# surrogate pairs, which JSON can spell and UTF-8 cannot.
UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    """A document without control characters, trailing spaces and outer blank lines.

    All lines end in a line feed. Letters, accents and emoji stay as they are: there is
    no Unicode normalisation, as there is none in the tokenizer.
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

    Remembers 16 bytes of hash for each document that it keeps.
    """
    seen = set()
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def shingles(document: str, n_words: int = 5) -> set[bytes]:
    """All runs of ``n_words`` words of a document in lower case, as a set.

    A shorter document is one run, and so is one without words, as it stands.
    """
    words = re.findall(r"\w+", document.lower()) or [document]
    n_runs = max(1, len(words) - n_words + 1)
    runs = (" ".join(words[i : i + n_words]) for i in range(n_runs))
    return {run.encode(errors="replace") for run in runs}


def drop_near_duplicates(
    documents: Iterable[str],
    threshold: float = 0.8,
    n_words: int = 5,
    n_hashes: int = 128,
    seed: int = 1,
) -> Iterator[str]:
    """Drop documents whose shingles are nearly those of one kept before.

    Locality-sensitive hashing finds candidates, and a candidate counts if the share
    of equal minimum hashes, which estimates the Jaccard similarity, reaches
    ``threshold``. Remembers a few kilobytes for each document that it keeps.
    Source: Broder, 1997, by the library datasketch.
    """
    from datasketch import MinHash, MinHashLSH  # takes half a second to import

    # Too many candidates cost time, a missed one is lost: avoid the latter.
    weights = (0.1, 0.9)
    index = MinHashLSH(threshold=threshold, num_perm=n_hashes, weights=weights)
    kept: list[MinHash] = []
    empty = MinHash(num_perm=n_hashes, seed=seed)
    for document in documents:
        signature, runs = empty.copy(), list(shingles(document, n_words))
        for start in range(0, len(runs), 4096):  # bounds the memory of one update
            signature.update_batch(runs[start : start + 4096])
        candidates = (kept[number] for number in index.query(signature))
        if all(signature.jaccard(other) < threshold for other in candidates):
            index.insert(len(kept), signature)
            kept.append(signature)
            yield document


def mix(
    sources: Mapping[str, Iterable[str]],
    shares: Mapping[str, float],
    n_characters: int,
) -> Iterator[str]:
    """Documents of several sources, in given shares of the characters.

    The next document is the next one of the source furthest behind its share. A
    source that is used up starts again, which is what up-sampling means.

    Args:
        sources: documents by source; lists or other things that can be read again.
        shares: a positive number for each source; 2 is twice as much text as 1.
        n_characters: stop with the document that reaches so many.

    Raises:
        ValueError: if sources and shares have different names, a source is empty or
            an iterator, or a share is not positive.
    """
    if set(sources) != set(shares):
        raise ValueError(
            f"shares of {sorted(shares)} for sources {sorted(sources)}; "
            "give each source one share"
        )
    for name, documents in sources.items():
        if iter(documents) is documents:
            raise ValueError(f"source {name!r} is an iterator, not a list")
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
    """The documents of a source, again and again."""
    while True:
        n_characters = 0
        for document in documents:
            n_characters += len(document)
            yield document
        if not n_characters:
            raise ValueError(f"source {name!r} has no text")


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    shard_tokens: int = 2**24,
) -> None:
    """Encode documents and write their ids into files that can be memory-mapped.

    Each document becomes <s>, its ids, </s>; they follow each other without a gap,
    across shards too. Memory holds one shard and a few documents. Everything goes to
    ``folder.partial``, which is renamed when it is on disk: a folder with the right
    name is whole.

    Args:
        documents: an iterator is enough.
        tokenizer: up to 65,536 pieces make ids of 2 bytes, more make 4.
        folder: must not exist yet.
        shard_tokens: tokens in each file but the last.

    Raises:
        FileExistsError: if there is such a folder.
        ValueError: if there are no documents.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; shards need a new folder")
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    counts = {"documents": 0, "characters": 0, "tokens": 0}
    shards = []
    ids = _encode(documents, tokenizer, dtype, counts)
    for number, tokens in enumerate(_regroup(ids, shard_tokens)):
        name, data = f"shard-{number:05}.bin", tokens.tobytes()
        _write(beside / name, data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append({"file": name, "tokens": len(tokens), "sha256": digest})
    if not shards:
        raise ValueError(f"there are no documents to write to {folder}")
    index = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        **counts,
        "shards": shards,
    }
    _write(beside / "index.json", json.dumps(index, indent=1).encode())
    beside.rename(folder)


def _encode(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    counts: dict[str, int],
) -> Iterator[np.ndarray]:
    """The ids of a few documents at a time, which are counted."""
    for batch in _batches(documents, n_characters=2**18):
        rows = tokenizer.encode_batch(batch, bos=True, eos=True)
        ids = np.fromiter(chain.from_iterable(rows), dtype)
        counts["documents"] += len(batch)
        counts["characters"] += sum(map(len, batch))
        counts["tokens"] += len(ids)
        yield ids


def _batches(documents: Iterable[str], n_characters: int) -> Iterator[list[str]]:
    """Lists of documents with at least so many characters, but for the last."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= n_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _regroup(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
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


def _write(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class TokenDataset:
    """Windows of T + 1 tokens over a folder that `write_shards` made.

    The shards are memory-mapped: the operating system reads what is asked for and
    may forget it again, so the corpus can be larger than memory.

    Args:
        folder: the shards and their index.
        sequence_length: T.
        seed: of the order of the windows.
        verify: read everything once and compare the checksums; sizes are always
            compared.

    Attributes:
        n_tokens, n_characters, vocab_size, tokenizer_sha256: as the index says.

    Raises:
        FileNotFoundError: if the index or a shard is missing.
        ValueError: if a shard has the wrong size or checksum or an id beyond the
            vocabulary, or all of them together do not fill one window.
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
        index = _read_index(self.folder)
        self.vocab_size: int = index["vocab_size"]
        self.n_tokens: int = index["tokens"]
        self.n_characters: int = index["characters"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        dtype = np.dtype(index["dtype"])
        self._shards = [self._open(shard, dtype, verify) for shard in index["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self._orders: dict[int, np.ndarray] = {}
        if sequence_length < 1 or len(self) < 1:
            raise ValueError(
                f"{self.folder} has {self.n_tokens} tokens; a window of length "
                f"{sequence_length} needs {sequence_length + 1}"
            )

    def _open(self, shard: dict[str, Any], dtype: np.dtype, verify: bool) -> np.ndarray:
        """Memory-map one shard."""
        path = self.folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(
                f"the shard {path} is missing; write the shards again"
            )
        size, expected = path.stat().st_size, shard["tokens"] * dtype.itemsize
        if size != expected:
            raise ValueError(
                f"the shard {path} has {size} bytes instead of {expected}; "
                "write the shards again"
            )
        tokens = np.memmap(path, dtype, mode="r")
        if verify:
            if hashlib.sha256(tokens.data).hexdigest() != shard["sha256"]:
                raise ValueError(
                    f"the shard {path} does not match its checksum; "
                    "write the shards again"
                )
            if tokens.max() >= self.vocab_size:
                raise ValueError(
                    f"the shard {path} holds the id {tokens.max()}, beyond the "
                    f"vocabulary of {self.vocab_size}; write the shards again"
                )
        return tokens

    def __len__(self) -> int:
        """Windows in an epoch."""
        return (self.n_tokens - 1) // self.sequence_length

    def __getitem__(self, window: int) -> Tensor:
        """A window, by its place in the corpus: (T + 1,), int64."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        start = window * self.sequence_length
        return self.read(start, start + self.sequence_length + 1)

    def read(self, start: int, stop: int) -> Tensor:
        """The tokens of the corpus from ``start`` up to ``stop``, int64."""
        parts = []
        while start < stop:
            shard = bisect_right(self._ends, start)
            end = self._ends[shard]
            first = end - len(self._shards[shard])
            parts.append(self._shards[shard][start - first : min(stop, end) - first])
            start = end
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """The windows of one process at one step, in a new order in each epoch.

        What a step sees in all processes together depends on the product of their
        number and ``batch_size`` only.

        Returns:
            (B, T + 1), int64.
        """
        first = (step * world_size + rank) * batch_size
        windows = [self[self._window(first + i)] for i in range(batch_size)]
        return torch.stack(windows)

    def _window(self, position: int) -> int:
        """Which window comes at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, len(self))
        if epoch not in self._orders:
            order = np.arange(len(self), dtype=np.uint32)
            np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._orders = {epoch: order}
        return int(self._orders[epoch][place])


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of shards."""
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of shards: no index.json in it")
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is not JSON; write the shards again") from None
