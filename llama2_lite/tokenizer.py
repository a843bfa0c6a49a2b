"""The tokenizer.

Exported from book/03_tokenizer.md, which explains every part. Edit it there,
then `make export`.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

# What Meta's tokenizer.model says it was trained with (read back in this chapter).
LLAMA2_SETTINGS = dict(
    model_type="bpe",
    character_coverage=0.99995,
    split_digits=True,
    byte_fallback=True,
    allow_whitespace_only_pieces=True,
    max_sentence_length=4192,  # bytes; longer ones would be dropped
    shuffle_input_sentence=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=True,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    unk_surface=" \u2047 ",
)
SENTENCE_CHARACTERS = LLAMA2_SETTINGS["max_sentence_length"] // 4  # 4 bytes at most
SENTENCES = 200_000  # of a larger text, a sample of so many pieces is enough


class Tokenizer:
    """Text to token ids and back, by a SentencePiece model file.

    Reads Meta's ``tokenizer.model`` as well as the files `train_tokenizer` writes,
    and gives the ids of Meta's ``llama/tokenizer.py``.

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
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(f"{self.path} is not a SentencePiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path} lacks the pieces <s> and </s>")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, between <s> and </s> if asked for."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(
        self, texts: list[str], bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """The ids of many texts, with one thread for each core.

        Raises:
            ValueError: if a text holds half of a surrogate pair, which UTF-8 lacks.
        """
        try:
            return self._processor.encode(list(texts), add_bos=bos, add_eos=eos)
        except RuntimeError:
            for number, text in enumerate(texts):
                if re.search("[\ud800-\udfff]", text):
                    raise ValueError(
                        f"text {number} holds half of a surrogate pair"
                    ) from None
            raise

    def decode(self, ids: list[int]) -> str:
        """The text of a list of ids; <s> and </s> vanish.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        ids = list(map(int, ids))
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"id {wrong} is not in the vocabulary of {self.vocab_size}"
            )
        return self._processor.decode(ids)

    def piece(self, id: int) -> str:
        """The piece behind an id, as SentencePiece writes it (a space is U+2581)."""
        return self._processor.id_to_piece(id)


def train_tokenizer(
    texts: Iterable[str], path: str | Path, vocab_size: int
) -> Tokenizer:
    """Learn a vocabulary as Llama 2 did, and write it to a file.

    The same texts give the same file. Of a large text SentencePiece keeps a sample
    of 200,000 pieces of at most 1,048 characters, drawn with a fixed seed, so that
    memory stays under a gigabyte.

    Args:
        texts: documents of any length; an iterator is enough.
        path: where the SentencePiece model goes.
        vocab_size: pieces in all, V; the paper has 32,000.

    Raises:
        ValueError: if there is no text, or ``vocab_size`` is more than it supports
            or less than its characters need.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            input_sentence_size=SENTENCES,
            minloglevel=2,  # it would write hundreds of lines to the terminal
            num_threads=1,
            **LLAMA2_SETTINGS,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(model.getvalue())
    os.replace(beside, path)
    return Tokenizer(path)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at spaces into pieces short enough for SentencePiece."""
    for text in texts:
        # SentencePiece drops every sentence with U+2585, which it uses inside.
        text = text.replace("\u2585", " ")
        start = 0
        while len(text) - start > SENTENCE_CHARACTERS:
            space = text.rfind(" ", start + 1, start + SENTENCE_CHARACTERS)
            end = space if space > 0 else start + SENTENCE_CHARACTERS
            yield text[start:end]
            start = end + (space > 0)  # the next piece gets a space in front anyway
        if start < len(text):
            yield text[start:]


def _explain(error: str, vocab_size: int) -> str:
    """One sentence for SentencePiece's own message."""
    if "sentences_.empty()" in error:
        return "there is no text to train the tokenizer on"
    if most := re.search(r"value <= (\d+)", error):
        return (
            f"a vocabulary of {vocab_size} is more than the text supports: "
            f"at most {most[1]}"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"a vocabulary of {vocab_size} is too small: 3 special pieces, 256 bytes "
            f"and the characters of the text need {least[1]}"
        )
    return error
