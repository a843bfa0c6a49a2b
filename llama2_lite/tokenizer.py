"""The tokenizer.

Exported from book/03_tokenizer.md, which explains every part. Edit it there,
then `make export`.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

# What Meta's tokenizer.model records about its training.
LLAMA2_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.99995,  # the rarest characters become bytes
    "split_digits": True,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 4192,  # in bytes
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,  # a space before the text, so that words look alike
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,  # there is none
    "unk_surface": " \u2047 ",
}


class Tokenizer:
    """Text to token ids and back, by a SentencePiece model file.

    Reads Meta's ``tokenizer.model`` as well as what `train_tokenizer` writes, and
    gives the ids of Meta's ``llama/tokenizer.py``. The text comes back unchanged,
    but for U+2581, which SentencePiece takes for a space.

    Args:
        path: the SentencePiece model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a SentencePiece model with both <s> and </s>.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no tokenizer file {self.path}")
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except RuntimeError:
            raise ValueError(f"{self.path} is not a SentencePiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path} lacks the pieces <s> and </s>")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, with <s> before and </s> behind it if asked for.

        Raises:
            ValueError: if the text holds half of a surrogate pair, as UTF-8 cannot.
        """
        _check_encodable(text)
        return self._processor.encode(text, add_bos=bos, add_eos=eos)

    def encode_batch(
        self, texts: Iterable[str], bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """The ids of each of many texts, on all cores."""
        texts = list(texts)
        for text in texts:
            _check_encodable(text)
        return self._processor.encode(texts, add_bos=bos, add_eos=eos)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; <s> and </s> vanish, half a character becomes U+FFFD.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(
                f"id {wrong[0]} is beyond the {self.vocab_size} known, which are 0 to "
                f"{self.vocab_size - 1}; decode with the tokenizer that it came from"
            )
        return self._processor.decode(ids)

    def piece(self, id: int) -> str:
        """The piece behind an id, as SentencePiece writes it: ``▁`` is a space."""
        return self._processor.id_to_piece(id)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text, {text[error.start]!r}, is half of a "
            "surrogate pair, which no UTF-8 text can hold"
        ) from None


SENTENCE_CHARACTERS = LLAMA2_SETTINGS["max_sentence_length"] // 4  # 4 bytes at most
SENTENCES = 200_000  # of a larger text, a sample of so many


def train_tokenizer(
    texts: Iterable[str], path: str | Path, vocab_size: int
) -> Tokenizer:
    """Learn a vocabulary as Llama 2 did and write it to a file.

    The same texts give the same file. Of a text of more than 200,000 sentences (a
    document counts as one for each 1,048 characters) SentencePiece takes a sample,
    with a fixed seed, so that memory does not grow with the text.

    Args:
        texts: documents of any length; an iterator is enough.
        path: where the SentencePiece model goes.
        vocab_size: V, all pieces together: 3 special ones, 256 bytes, merges, letters.

    Raises:
        ValueError: if there is no text, or ``vocab_size`` is more than it supports
            or less than its letters need.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            input_sentence_size=SENTENCES,
            shuffle_input_sentence=True,
            minloglevel=2,
            num_threads=1,
            **LLAMA2_SETTINGS,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(model.getvalue())
    beside.replace(path)
    return Tokenizer(path)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at spaces into sentences that SentencePiece does not drop."""
    for text in texts:
        _check_encodable(text)
        text = text.replace("\u2585", " ")
        start = 0
        while len(text) - start > SENTENCE_CHARACTERS:
            space = text.rfind(" ", start + 1, start + SENTENCE_CHARACTERS)
            end = space if space > 0 else start + SENTENCE_CHARACTERS
            yield text[start:end]
            start = end + (space > 0)  # the dummy prefix stands for this space
        yield text[start:]


def _explain(error: str, vocab_size: int) -> str:
    """One sentence for a message of SentencePiece."""
    if "sentences_.empty()" in error:
        return "there is no text to train a tokenizer on"
    if most := re.search(r"value <= (\d+)", error):
        return (
            f"a vocabulary of {vocab_size} is more than the text supports, "
            f"which is {most[1]} at most"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"a vocabulary of {vocab_size} is too small: special pieces, bytes and the "
            f"letters of the text need {least[1]}"
        )
    return error
