"""The corpus: no token lost or doubled, nothing broken goes unnoticed."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_lite.corpus import (
    TokenDataset,
    clean,
    clean_documents,
    drop_duplicates,
    drop_near_duplicates,
    mix,
    shingles,
    write_shards,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer

DOCUMENTS = [
    "Ann is a baker. She lives in a red house by the old mill.",
    "Ben has 3 cats.\n\nHe is a miller.",
    "",
    "The baker gave the miller bread.",
] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(DOCUMENTS, path, 300)


@pytest.fixture
def shards(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    write_shards(DOCUMENTS, tokenizer, tmp_path / "shards", shard_tokens=50)
    return tmp_path / "shards"


def stream_of(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    return [i for text in documents for i in tokenizer.encode(text, bos=True, eos=True)]


# Documents


def test_clean_takes_what_is_invisible() -> None:
    assert clean("\ufeffa\x00b\x07c\x9f\ud800\r\nd\re \t\n\n\n f\n\n") == (
        "abc\nd\ne\n\n\n f"
    )
    assert clean("naïve 中文 🙂 ½ ﬁ e\u0301") == "naïve 中文 🙂 ½ ﬁ e\u0301"
    assert list(clean_documents(["\n \r\n", "ab ", "abc"], 3)) == ["abc"]
    assert list(clean_documents([" \n", "a"])) == ["a"]


@given(st.text(st.characters() | st.sampled_from("\r\n\t \x00\ud800")))
def test_clean_twice_is_clean_once(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    once.encode()
    assert not any(line.endswith((" ", "\t", "\r")) for line in once.split("\n"))


@given(st.lists(st.sampled_from("abc")))
def test_drop_duplicates_keeps_first_of_each(documents: list[str]) -> None:
    assert list(drop_duplicates(documents)) == list(dict.fromkeys(documents))


def test_shingles_by_hand() -> None:
    assert shingles("The old, old mill", 2) == {b"the old", b"old old", b"old mill"}
    assert shingles("Mill", 2) == {b"mill"}
    assert shingles("?!") == {b"?!"}
    assert shingles("\ud800") == {b"?"}


def random_page(seed: int, n_words: int = 200) -> list[str]:
    return [f"w{i}" for i in np.random.default_rng(seed).integers(10**9, size=n_words)]


def test_near_duplicates() -> None:
    pages = [random_page(seed) for seed in range(20)]
    changed = [[*page[:-1], "other"] for page in pages]  # one shingle of 196 differs
    half = [page[:100] + random_page(99 + i, 100) for i, page in enumerate(pages)]
    texts = [" ".join(page) for page in pages + changed + half]
    kept = list(drop_near_duplicates(texts))
    assert kept == texts[:20] + texts[40:]
    assert kept == list(drop_near_duplicates(texts))  # the same every time
    assert len(list(drop_near_duplicates(["Mill.", "mill", "hill"]))) == 2
    assert list(drop_near_duplicates(["?!", "+ = +", "?!"])) == ["?!", "+ = +"]


def test_near_duplicates_of_a_very_long_document() -> None:
    long = " ".join(random_page(0, 30_000))
    assert len(list(drop_near_duplicates([long, long + " end", "short"]))) == 2


@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    n_characters=st.integers(1, 3000),
)
def test_mix_keeps_shares(
    lengths: list[list[int]], weights: list[float], n_characters: int
) -> None:
    sources = {str(i): [str(i) * n for n in own] for i, own in enumerate(lengths)}
    shares = dict(zip(sources, weights, strict=False))
    mixed = list(mix(sources, shares, n_characters))
    written = Counter()
    for name, documents in sources.items():
        own = [text for text in mixed if text[0] == name]
        again = documents * (len(own) // len(documents) + 1)
        assert own == again[: len(own)]  # in order, from the start when used up
        written[name] = sum(map(len, own))
    total = sum(written.values())
    assert n_characters <= total < n_characters + 30
    for name in sources:
        fair = total * shares[name] / sum(shares.values())
        assert written[name] <= fair + 30


def test_mix_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"shares of \['a'\] for sources \['b'\]"):
        list(mix({"b": ["x"]}, {"a": 1}, 5))
    with pytest.raises(ValueError, match="'a' is an iterator"):
        list(mix({"a": iter(["x"])}, {"a": 1}, 5))
    with pytest.raises(ValueError, match="share of 'a' is 0, not positive"):
        list(mix({"a": ["x"]}, {"a": 0}, 5))
    for empty in ([], ["", ""]):
        with pytest.raises(ValueError, match="'a' has no text"):
            list(mix({"a": empty}, {"a": 1}, 5))


# Shards


@given(
    documents=st.lists(st.text(max_size=30), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 60),
    length=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_and_doubles_nothing(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[str],
    shard_tokens: int,
    length: int,
) -> None:
    folder = tmp_path_factory.mktemp("packing") / "shards"
    write_shards(iter(documents), tokenizer, folder, shard_tokens=shard_tokens)
    stream = stream_of(tokenizer, documents)
    index = json.loads((folder / "index.json").read_text())
    sizes = [shard["tokens"] for shard in index["shards"]]
    assert sum(sizes) == index["tokens"] == len(stream)
    assert all(size == shard_tokens for size in sizes[:-1])
    assert index["documents"] == len(documents)
    assert index["characters"] == sum(map(len, documents))

    if len(stream) <= length:
        with pytest.raises(ValueError, match=f"has {len(stream)} tokens; a window"):
            TokenDataset(folder, length)
        return
    dataset = TokenDataset(folder, length)
    assert dataset.read(0, len(stream)).tolist() == stream
    targets = [token for w in range(len(dataset)) for token in dataset[w][1:].tolist()]
    assert targets == stream[1 : 1 + len(dataset) * length]
    assert len(stream) - 1 - len(targets) < length


@given(
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 3),
    length=st.sampled_from([3, 10, 31]),
)
@settings(max_examples=60, deadline=None)
def test_each_epoch_sees_each_window_once(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    world_size: int,
    batch_size: int,
    seed: int,
    length: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "epochs"
    if not folder.exists():
        write_shards(DOCUMENTS, tokenizer, folder, shard_tokens=64)
    dataset = TokenDataset(folder, length, seed=seed)
    n_windows = len(dataset)
    n_steps = -(-2 * n_windows // (world_size * batch_size))
    seen = [
        tuple(window)
        for step in range(n_steps)
        for rank in range(world_size)
        for window in dataset.batch(step, batch_size, rank, world_size).tolist()
    ]
    all_windows = Counter(tuple(dataset[w].tolist()) for w in range(n_windows))
    first, second = seen[:n_windows], seen[n_windows : 2 * n_windows]
    assert Counter(first) == Counter(second) == all_windows
    if n_windows > 20:
        assert first != second
    # One process sees the same, and so does one that starts at any step.
    alone = TokenDataset(folder, length, seed=seed)
    for step in reversed(range(n_steps)):
        together = alone.batch(step, world_size * batch_size).tolist()
        size = world_size * batch_size
        assert [tuple(w) for w in together] == seen[step * size : (step + 1) * size]


def test_the_seed_changes_the_order(shards: Path) -> None:
    a, b, c = (TokenDataset(shards, 10, seed=seed).batch(0, 8) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.dtype == torch.int64
    assert a.shape == (8, 11)


def test_windows_are_where_they_should_be(shards: Path) -> None:
    dataset = TokenDataset(shards, 10)
    for window in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"window {window} of {len(dataset)}"):
            dataset[window]
    assert len(list(iter(dataset))) == len(dataset)  # it ends where it should


def test_the_index_says_what_is_there(shards: Path, tokenizer: Tokenizer) -> None:
    index = json.loads((shards / "index.json").read_text())
    assert index["dtype"] == "uint16"
    assert index["vocab_size"] == 300
    model = tokenizer.path.read_bytes()
    assert index["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    dataset = TokenDataset(shards, 10)
    assert dataset.n_characters == sum(map(len, DOCUMENTS))
    assert dataset.vocab_size == 300
    for shard in index["shards"]:
        data = (shards / shard["file"]).read_bytes()
        assert len(data) == 2 * shard["tokens"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]


class LargeVocabulary(Tokenizer):
    """A tokenizer with ids that need more than two bytes."""

    def __init__(self, path: Path, vocab_size: int):
        super().__init__(path)
        self.shift = vocab_size - self.vocab_size
        self.vocab_size = vocab_size

    def encode_batch(self, texts, bos=False, eos=False):
        rows = super().encode_batch(texts, bos, eos)
        return [[i + self.shift for i in row] for row in rows]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")]
)
def test_ids_take_the_bytes_they_need(
    tokenizer: Tokenizer, tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    large = LargeVocabulary(tokenizer.path, vocab_size)
    write_shards(DOCUMENTS, large, tmp_path / "large")
    index = json.loads((tmp_path / "large" / "index.json").read_text())
    assert index["dtype"] == dtype
    dataset = TokenDataset(tmp_path / "large", 8)
    stream = [i + large.shift for i in stream_of(tokenizer, DOCUMENTS)]
    assert dataset.read(0, len(stream)).tolist() == stream


# What is broken is found


def test_no_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no documents"):
        write_shards([], tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_shards_are_not_overwritten(shards: Path, tokenizer: Tokenizer) -> None:
    before = {path: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        write_shards(DOCUMENTS, tokenizer, shards)
    assert before == {path: path.read_bytes() for path in shards.iterdir()}


def test_what_stops_in_between_leaves_no_folder(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def documents():
        yield from ["A long document. " * 50_000] * 3
        raise KeyboardInterrupt

    folder = tmp_path / "shards"
    with pytest.raises(KeyboardInterrupt):
        write_shards(documents(), tokenizer, folder, shard_tokens=1000)
    assert list((tmp_path / "shards.partial").glob("shard-*"))
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="no folder of shards"):
        TokenDataset(folder, 8)
    write_shards(DOCUMENTS, tokenizer, folder)  # and can be written afterwards
    assert TokenDataset(folder, 8).n_characters == sum(map(len, DOCUMENTS))
    assert not (tmp_path / "shards.partial").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_shard(shards: Path, verify: bool) -> None:
    path = shards / "shard-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        ValueError, match=r"shard-00001\.bin has 98 bytes instead of 100"
    ):
        TokenDataset(shards, 8, verify=verify)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.bin is missing"):
        TokenDataset(shards, 8, verify=verify)


def test_a_changed_shard(shards: Path) -> None:
    path = shards / "shard-00002.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"shard-00002\.bin does not match its checksum"
    ):
        TokenDataset(shards, 8)
    TokenDataset(shards, 8, verify=False)


def test_ids_beyond_the_vocabulary(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    highest = int(TokenDataset(shards, 8).read(0, index["tokens"]).max())
    index["vocab_size"] = highest
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"id {highest}, beyond the vocabulary"):
        TokenDataset(shards, 8)


def test_a_broken_index(shards: Path) -> None:
    path = shards / "index.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        TokenDataset(shards, 8)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no folder of shards"):
        TokenDataset(shards, 8)


# Memory

WRITE_MUCH = """
import sys
from pathlib import Path
from llama2_lite.corpus import TokenDataset, write_shards
from llama2_lite.tokenizer import Tokenizer

def own_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def documents():
    for number in range(N_DOCUMENTS):
        if number % 100 == 0:
            peaks.append(own_mib())
        yield f"{number:010} 中文" * 100

tokenizer = Tokenizer(sys.argv[1])
start, peaks = own_mib(), []
write_shards(documents(), tokenizer, sys.argv[2], shard_tokens=2**19)
dataset = TokenDataset(sys.argv[2], 256)
for step in range(len(dataset) // 64):
    dataset.batch(step, 64)
    peaks.append(own_mib())
print(max(peaks) - start, dataset.n_tokens * 2 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_corpus(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    code = WRITE_MUCH.replace("N_DOCUMENTS", "20000")
    arguments = [
        sys.executable,
        "-c",
        code,
        str(tokenizer.path),
        str(tmp_path / "much"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    growth, size = map(float, done.stdout.split())
    assert size > 60
    assert growth < size / 2  # 20 MiB, whatever the size
