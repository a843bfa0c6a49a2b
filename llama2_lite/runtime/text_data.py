"""The town, or files of one's own, as a data module for pretraining."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from llama2_lite.corpus import clean_documents, drop_duplicates, write_shards
from llama2_lite.pretraining import TokenDataModule
from llama2_lite.runtime.artifacts import PACKAGE, artifact, file_hash
from llama2_lite.runtime.documents import (
    file_stamps,
    hold_out,
    matching_files,
    read_documents,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import DEFAULT_DOCUMENTS, build_town


class TextDataModule(TokenDataModule):
    """Documents of the town or of files, with a tokenizer, as shards.

    Args:
        folder: where tokenizer and shards go.
        files: one or several paths or globs of .txt, .jsonl, .jsonl.gz and .parquet
            files; the built-in town if left out.
        text_field: the JSON key or Parquet column with the text.
        town_documents: how many, if there are no files.
        tokenizer: a SentencePiece model to use; one is trained if left out.
        vocab_size: of the tokenizer that is trained.
        validation_fraction: of the text, at its end, that is held out.
        lengths: (share of the batches, sequence length, windows of a batch over all
            processes), in order.
        validation_windows: at most so many for the losses while training; the final
            figures use all.
        seed: of the order of the windows.
    """

    def __init__(
        self,
        folder: Path,
        files: list[str] | str | None = None,
        text_field: str = "text",
        town_documents: int = DEFAULT_DOCUMENTS,
        tokenizer: str | None = None,
        vocab_size: int = 1024,
        validation_fraction: float = 0.1,
        lengths: list[tuple[float, int, int]] = [(1.0, 256, 16)],  # noqa: B006
        validation_windows: int = 64,
        seed: int = 0,
    ):
        corpus = Path(folder) / "corpus"
        super().__init__(
            corpus / "train", corpus / "validation", lengths, validation_windows, seed
        )
        if not 0 < validation_fraction < 1:
            raise ValueError(f"{validation_fraction=} must be between 0 and 1")
        self.folder = Path(folder)
        self.files = [files] if isinstance(files, str) else files
        self.text_field = text_field
        self.town_documents = town_documents
        self.given_tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.validation_fraction = validation_fraction

    def source(self) -> dict[str, Any]:
        """What the text depends on, as JSON values."""
        if self.files is None:
            return {"town_documents": self.town_documents, "lists": town_lists()}
        files = (path for pattern in self.files for path in matching_files(pattern))
        return {
            "files": file_stamps(files),
            "text_field": self.text_field,
            "validation_fraction": self.validation_fraction,
        }

    def documents(self) -> Iterator[str]:
        """All documents of the files, cleaned, each once."""
        documents = read_documents(self.files or [], self.text_field)
        return drop_duplicates(clean_documents(documents))

    def split(self) -> tuple[Iterable[str], Iterable[str]]:
        """Documents for training and for validation."""
        if self.files is not None:
            return hold_out(self.documents, self.validation_fraction)
        town = build_town()
        held_out = max(1, round(self.town_documents * self.validation_fraction))
        return (
            (document.text for document in town.documents(self.town_documents)),
            (document.text for document in town.documents(held_out, seed=1)),
        )

    def prepare_data(self) -> None:
        """Make tokenizer and shards, unless they are there; one process does it."""
        given = self.given_tokenizer and Tokenizer(self.given_tokenizer)
        config = {
            "source": self.source(),
            "tokenizer": given.sha256 if given else self.vocab_size,
        }
        modules = ["corpus", "tokenizer"]
        modules += ["town"] if self.files is None else ["runtime.documents"]
        artifact(self.folder, "corpus", config, [], modules, self._write)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards; each process has to.

        Raises:
            ValueError: if one is missing or damaged.
        """
        try:
            super().setup(stage)
        except (FileNotFoundError, ValueError) as error:
            if not str(error).startswith("the shard"):
                raise
            corpus = self.folder / "corpus"
            remedy = f"delete {corpus}, and the same command makes it anew"
            raise ValueError(f"{error}; {remedy}") from None

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The windows for validation, no more at a time than in training."""
        windows = super().val_dataloader()
        n_parts = self.trainer.accumulate_grad_batches
        return DataLoader(windows.dataset, max(1, windows.batch_size // n_parts))

    def _write(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        if self.given_tokenizer:
            shutil.copy(self.given_tokenizer, path)
        else:
            train_tokenizer(self.split()[0], path, self.vocab_size)
        tokenizer = Tokenizer(path)
        for name, documents in zip(("train", "validation"), self.split(), strict=True):
            shutil.rmtree(folder / name, ignore_errors=True)
            write_shards(documents, tokenizer, folder / name)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, once `prepare_data` has run."""
        return Tokenizer(self.folder / "corpus" / "tokenizer.model")


def choose_vocab_size(tokenizer: str | None, vocab_size: int) -> int:
    """The vocabulary of the given tokenizer, else of the one to be trained."""
    return Tokenizer(tokenizer).vocab_size if tokenizer else vocab_size


def town_lists() -> dict[str, str]:
    """The hashes of the lists that the town is made of."""
    folder = PACKAGE.parent / "data"
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.yaml"))}
