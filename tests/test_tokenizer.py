"""The tokenizer: Meta's ids, text that comes back, training that repeats itself."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from llama2_lite.tokenizer import LLAMA2_SETTINGS, Tokenizer, train_tokenizer
from llama2_lite.town import build_town

TEXTS = [
    "Ann is a baker. She lives in a red house by the old mill.",
    "Ben is a miller.\n\nHe has 3 cats, 12 hens and 144 eggs.",
    "Question: what is 17 + 28?\nAnswer: 45",
    "The baker gave the miller bread, and the miller gave the baker flour.",
] * 3

NORMALIZER = ("remove_extra_whitespaces", "add_dummy_prefix")
anything = st.text().filter(lambda text: "\u2581" not in text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(iter(TEXTS), path, 340)


@pytest.fixture(scope="module")
def meta(shared_data: Path) -> Tokenizer:
    return Tokenizer(shared_data / "llama2_tokenizer.model")


def model_proto(path: Path) -> sentencepiece_model_pb2.ModelProto:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


@given(text=anything)
@settings(max_examples=500, deadline=None)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@given(text=anything)
@settings(max_examples=500, deadline=None)
def test_text_comes_back_from_metas_ids(meta: Tokenizer, text: str) -> None:
    assert meta.decode(meta.encode(text)) == text


@given(texts=st.lists(anything, max_size=5), bos=st.booleans(), eos=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_batch_is_its_texts(
    tokenizer: Tokenizer, texts: list[str], bos: bool, eos: bool
) -> None:
    one_by_one = [tokenizer.encode(text, bos, eos) for text in texts]
    assert tokenizer.encode_batch(texts, bos, eos) == one_by_one


def test_the_separator_becomes_a_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_special_ids(tokenizer: Tokenizer, meta: Tokenizer) -> None:
    for each in (tokenizer, meta):
        assert (each.unk_id, each.bos_id, each.eos_id) == (0, 1, 2)
        assert [each.piece(i) for i in (0, 1, 2, 3)] == [
            "<unk>",
            "<s>",
            "</s>",
            "<0x00>",
        ]
        ids = each.encode("Hello", bos=True, eos=True)
        assert ids == [1, *each.encode("Hello"), 2]
        assert each.eos_id not in each.encode("</s>")
        assert each.encode("") == []
    assert (tokenizer.vocab_size, meta.vocab_size) == (340, 32_000)


def test_metas_ids(meta: Tokenizer) -> None:
    # What Meta's llama/tokenizer.py gives, as published in many places.
    assert meta.encode("Hello world", bos=True) == [1, 15043, 3186]
    assert meta.encode("[INST]") == [518, 25580, 29962]
    assert meta.encode("2024") == [29871, 29906, 29900, 29906, 29946]  # digits split
    assert meta.encode("\n") == [29871, 13]
    assert meta.encode("😀") == [29871, 243, 162, 155, 131]  # bytes


def test_metas_ids_are_those_of_the_library(meta: Tokenizer, shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text()[:200_000]
    reference = SentencePieceProcessor(model_file=str(meta.path))
    assert meta.encode(text) == reference.encode(text)
    assert meta.decode(meta.encode(text)) == text


def test_what_the_chapter_says_of_metas_tokenizer(meta: Tokenizer) -> None:
    path = Path(__file__).parents[1] / "book" / "results" / "meta_compression.json"
    stored = json.loads(path.read_text())["results"]["characters_per_token"]
    town = build_town()
    seen = {document.text for document in town.documents(20_000)}
    unseen = {document.text for document in town.documents(2_000, seed=1)} - seen
    n_characters = sum(map(len, unseen))
    n_tokens = sum(map(len, meta.encode_batch(unseen)))
    assert stored == pytest.approx(n_characters / n_tokens)


def test_our_settings_are_metas(tokenizer: Tokenizer, meta: Tokenizer) -> None:
    ours, theirs = model_proto(tokenizer.path), model_proto(meta.path)
    assert ours.normalizer_spec.name == theirs.normalizer_spec.name == "identity"
    left_to_the_library = {
        *("max_sentencepiece_length", "split_by_unicode_script", "split_by_number"),
        *("split_by_whitespace", "treat_whitespace_as_suffix", "user_defined_symbols"),
        *("control_symbols", "hard_vocab_limit", "vocabulary_output_piece_score"),
    }
    for name in (LLAMA2_SETTINGS.keys() - {"normalization_rule_name"}) | (
        left_to_the_library
    ):
        spec = "normalizer_spec" if name in NORMALIZER else "trainer_spec"
        our_value = getattr(getattr(ours, spec), name)
        assert our_value == getattr(getattr(theirs, spec), name), name
    types = [piece.type for piece in ours.pieces]
    assert types[:259] == [piece.type for piece in theirs.pieces[:259]]
    assert set(types[259:]) == {piece.type for piece in theirs.pieces[259:]}


def test_training_repeats_itself(tmp_path: Path) -> None:
    a, b = (train_tokenizer(TEXTS, tmp_path / name, 320) for name in "ab")
    assert a.sha256 == b.sha256
    assert a.path.read_bytes() == b.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_sample_of_a_large_text_repeats_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_tokenizer(TEXTS * 50, tmp_path / "whole", 320)
    monkeypatch.setattr("llama2_lite.tokenizer.SENTENCES", 120)
    text = [f"{text} {number}" for number, text in enumerate(TEXTS * 50)]
    a, b = (train_tokenizer(text, tmp_path / name, 320) for name in "ab")
    assert a.sha256 == b.sha256 != whole.sha256


def test_digits_are_split(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(i) for i in range(259, tokenizer.vocab_size)]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 or p == "▁1"]
    ids = tokenizer.encode("144")
    assert [tokenizer.piece(i) for i in ids] == ["▁", "1", "4", "4"]


def test_long_documents_are_not_dropped(tmp_path: Path) -> None:
    # Without spaces, with spaces, and with the character SentencePiece reserves: of
    # each only the long or reserved document holds the word.
    words = random.Random(0).choices(["oak", "elm", "ash"], k=20_000)
    for number, text in enumerate(
        ["".join(words), " ".join(words), "oak ash elm \u2585"]
    ):
        tokenizer = train_tokenizer(["b c d", text], tmp_path / str(number), 273)
        learned = "".join(tokenizer.piece(i) for i in range(259, 273))
        assert set("oakelmsh") <= set(learned)
        assert 0 not in tokenizer.encode(text)
        assert len(tokenizer.encode("oakelmash")) < 9


def test_cutting_at_spaces_changes_no_count(tmp_path: Path) -> None:
    words = ["the", "old", "miller", "gave", "bread", "to", "Ben"]
    words = random.Random(0).choices(words, k=9000)
    cut = train_tokenizer([" ".join(words)], tmp_path / "cut", 290)
    single = train_tokenizer(words, tmp_path / "single", 290)
    pieces = [[t.piece(i) for i in range(290)] for t in (cut, single)]
    assert pieces[0] == pieces[1]


def test_training_says_nothing(tmp_path: Path) -> None:
    code = (
        "from llama2_lite.tokenizer import train_tokenizer\n"
        f"train_tokenizer(['some text here ' * 900], {str(tmp_path / 't')!r}, 275)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_vocabulary_larger_than_the_text_supports(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with pytest.raises(
        ValueError, match=r"of 5000 is more than .* (\d+) at most"
    ) as error:
        train_tokenizer(["some text here"], path, 5000)
    assert not path.exists()
    most = int(str(error.value).split()[-3])
    assert train_tokenizer(["some text here"], path, most).vocab_size == most
    with pytest.raises(ValueError, match=f"of {most + 1} is more than"):
        train_tokenizer(["some text here"], path, most + 1)


def test_vocabulary_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of 200 is too small: .* need 263"):
        train_tokenizer(["a b c"], tmp_path / "t", 200)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="there is no text"):
        train_tokenizer(texts, tmp_path / "t", 300)


def test_half_a_surrogate_pair(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for place, call in (
        (2, lambda: tokenizer.encode("ab\ud800")),
        (1, lambda: tokenizer.encode_batch(["a", "b\ud800"])),
        (2, lambda: train_tokenizer(["ab\ud800"], tmp_path / "t", 300)),
    ):
        # the place is that in its own text
        with pytest.raises(ValueError, match=f"character {place} of .* surrogate"):
            call()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*nothing\.model"):
        Tokenizer(tmp_path / "nothing.model")


@pytest.mark.parametrize("content", [b"", b"plain text, not a model", b"\x80" * 100])
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"wrong\.model is not a SentencePiece model"):
        Tokenizer(path)


def test_ids_beyond_the_vocabulary(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="id 340 is beyond the 340 known"):
        tokenizer.decode([5, 340])
    with pytest.raises(ValueError, match="id -1"):
        tokenizer.decode([-1])
