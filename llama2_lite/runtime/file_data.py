"""Files of dialogues, pairs and prompts as data modules for training."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from llama2_lite.chat import Dialog, encode_dialog
from llama2_lite.model import LlamaConfig, read_config
from llama2_lite.ppo import PromptDataModule, PromptDataset
from llama2_lite.pretraining import processes
from llama2_lite.reward import (
    PairBatch,
    PreferenceDataModule,
    PreferenceDataset,
    mix_pairs,
)
from llama2_lite.runtime.configs import Epochs
from llama2_lite.runtime.dialogs import (
    AXES,
    context_limit,
    dialog_key,
    read_dialogs,
    read_preferences,
    read_prompts,
    split_by_prompt,
)
from llama2_lite.runtime.documents import file_stamps, matching_files
from llama2_lite.runtime.talk import check_model_folder, check_vocabulary
from llama2_lite.sft import DialogDataModule
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Preference

Files = list[str] | str


def as_patterns(files: Files | None) -> list[str]:
    """Paths and globs, from one or several or none."""
    return [files] if isinstance(files, str) else list(files or [])


class FileData(LightningDataModule):
    """What all data modules here have: a model to start from, and files.

    Args:
        start: folder of the model, whose tokenizer and context count.
        sequence_length: longest dialogue in tokens; the model's context if left out.

    Attributes:
        batch_size: samples of a batch over all processes.
        bad: one sentence for each sample that was dropped.
        counts: how much there is, by name.

    Raises:
        FileNotFoundError: if there is no model in the folder.
        ValueError: if a dialogue may not be so long.
    """

    batch_size: int

    def open_start(self, start: str, sequence_length: int | None) -> None:
        """Note tokenizer and lengths; called by the constructors."""
        self.start = Path(start)
        config = read_start(self.start)
        context = config.max_seq_len
        self.opened = Tokenizer(self.start / "tokenizer.model")
        check_vocabulary(self.start, self.opened, config)
        self.sequence_length = sequence_length or context
        if not 1 < self.sequence_length <= context:
            raise ValueError(
                f"data.sequence_length is {sequence_length}, but the context of "
                f"{start} is {context} tokens"
            )
        shorter = self.sequence_length < context
        self.length_name = "data.sequence_length" if shorter else "the context"
        self.bad: list[str] = []
        self.counts: dict[str, int] = {}
        self.sources: dict[str, Any] = {"start": folder_stamps(start)}

    def limit(self, answer_tokens: int = 0) -> Callable[[Dialog], None]:
        """A check for dialogues that are too long, see `context_limit`."""
        longest = self.sequence_length, answer_tokens, self.length_name
        return context_limit(self.opened, *longest)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.opened

    def source(self) -> dict[str, Any]:
        """What the data depends on, as JSON values."""
        return self.sources

    def note_files(self, **patterns: list[str]) -> None:
        """Remember which files were read, and what they were then."""
        for name, of_name in patterns.items():
            paths = chain.from_iterable(map(matching_files, of_name))
            self.sources[name] = file_stamps(paths)

    def encode(self, dialogs: Iterable[Dialog], train_on: str = "all") -> list[Any]:
        """Dialogues as tokens."""
        return [encode_dialog(dialog, self.opened, train_on) for dialog in dialogs]

    @contextmanager
    def in_parts(self, n_parts: int) -> Iterator[None]:
        """For the time being, batches are smaller by a factor."""
        whole = self.batch_size
        self.batch_size = max(1, whole // n_parts)
        try:
            yield
        finally:
            self.batch_size = whole

    def val_dataloader(self) -> Any:
        """What is held out, no more at a time than in training."""
        with self.in_parts(self.trainer.accumulate_grad_batches):
            return super().val_dataloader()

    def plan_steps(self, n_steps: float) -> None:
        """Let the trainer take so many steps, unless it has been told a number."""
        if self.trainer.max_steps == -1:
            self.trainer.fit_loop.epoch_loop.max_steps = max(1, round(n_steps))


def folder_stamps(folder: str | Path) -> dict[str, Any]:
    """Names, sizes and contents of the files of a model; of large ones, both ends."""
    return {
        path.name: [path.stat().st_size, hash_ends(path)]
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
    }


def hash_ends(path: Path, n_bytes: int = 2**20) -> str:
    """Hash the beginning and the end of a file."""
    with path.open("rb") as file:
        ends = file.read(n_bytes)
        file.seek(max(0, path.stat().st_size - n_bytes))
        ends += file.read(n_bytes)
    return hashlib.sha256(ends).hexdigest()[:16]


def read_start(folder: Path) -> LlamaConfig:
    """The sizes of the model in a folder.

    Raises:
        FileNotFoundError: if there is no model.
    """
    check_model_folder(folder)
    return read_config(folder / "config.json")


def check_fraction(fraction: float) -> None:
    """Refuse a share of held-out samples that leaves nothing on one side."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction={fraction} must be between 0 and 1")


class DialogFiles(FileData, DialogDataModule):
    """Dialogues of files, to learn the answers of.

    Args:
        start: folder of the model to start from.
        files: one or several paths or globs; layouts as in
            `llama2_lite.runtime.dialogs`.
        validation_fraction: of the prompts that is held out.
        sequence_length: of a window; the model's context if left out.
        batch_size: windows of a batch over all processes.
        epochs: how often each dialogue is learned; the paper's 2.
        train_on: "all" answers of a dialogue, or the "last" one.
        skip_bad: drop what is wrong instead of stopping at it.
        seed: of what is held out, and of the order.
    """

    def __init__(
        self,
        start: str,
        files: Files,
        validation_fraction: float = 0.1,
        sequence_length: PositiveInt | None = None,
        batch_size: PositiveInt = 64,
        epochs: Epochs = 2.0,
        train_on: str = "all",
        skip_bad: bool = False,
        seed: int = 0,
    ):
        check_fraction(validation_fraction)
        self.open_start(start, sequence_length)
        patterns = as_patterns(files)
        read = read_dialogs(patterns, limit=self.limit(), skip_bad=skip_bad)
        train, held_out = split_by_prompt(
            read.items, lambda dialog: dialog[:-1], validation_fraction, seed
        )
        super().__init__(
            self.encode(train, train_on),
            self.encode(held_out, train_on),
            self.sequence_length,
            batch_size,
            seed,
        )
        self.epochs, self.bad = epochs, read.bad
        self.counts = {"dialogues": len(train), "held_out": len(held_out)}
        self.note_files(files=patterns)

    def setup(self, stage: str) -> None:
        """Fix the number of steps."""
        self.plan_steps(self.count_steps(self.epochs))


class PreferenceFiles(FileData, PreferenceDataModule):
    """Preference pairs of files.

    Args:
        start: folder of the chat model to start from.
        files: one or several paths or globs; layouts as in
            `llama2_lite.runtime.dialogs`.
        axis: what the pairs are about, "helpfulness" or "safety", where a file tells.
        other_files: pairs about the other axis, to mix in.
        own_share: of the mix that is about this axis; 0.5, as the paper has it for
            helpfulness, if left out. Its share for safety is 0.9.
        margins: "none", "small" or "large"; 0 in any case where there is no level.
        validation_fraction: of the prompts of ``files`` that is held out to choose
            the best step by; as many again are held out to report the accuracy on.
        sequence_length: of a dialogue; the model's context if left out.
        batch_size: pairs of a batch over all processes.
        epochs: how often each pair is learned; the paper's 1.
        skip_bad: drop what is wrong instead of stopping at it.
        seed: of what is held out, of the mix and of the order.

    Attributes:
        held_out_pairs: those to report the accuracy on, which choose nothing.
    """

    def __init__(
        self,
        start: str,
        files: Files,
        axis: str = "helpfulness",
        other_files: Files | None = None,
        own_share: float | None = None,
        margins: str = "small",
        validation_fraction: float = 0.1,
        sequence_length: PositiveInt | None = None,
        batch_size: PositiveInt = 512,
        epochs: Epochs = 1.0,
        skip_bad: bool = False,
        seed: int = 0,
    ):
        if not 0 < validation_fraction < 0.5:
            raise ValueError(
                f"validation_fraction={validation_fraction} must be between 0 and 0.5: "
                "so much is held out to choose the best step by, and again to test"
            )
        patterns, others = as_patterns(files), as_patterns(other_files)
        if own_share is not None:
            check_own_share(own_share, others)
        self.open_start(start, sequence_length)
        limit = self.limit()
        read = read_preferences(patterns, axis=axis, limit=limit, skip_bad=skip_bad)
        self.bad = read.bad
        train, self.held_out_pairs = split_by_prompt(
            read.items, prompt_of, validation_fraction, seed
        )
        rest = validation_fraction / (1 - validation_fraction)
        train, choosing = split_by_prompt(train, prompt_of, rest, seed)
        if others:
            other_axis = AXES[1 - AXES.index(axis)]
            more = read_preferences(
                others, axis=other_axis, limit=limit, skip_bad=skip_bad
            )
            held_out = [*self.held_out_pairs, *choosing]
            unseen = {dialog_key(pair.prompt) for pair in held_out}
            usable = [p for p in more.items if dialog_key(p.prompt) not in unseen]
            train = mix_pairs(train, usable, own_share or 0.5, seed)
            self.bad += more.bad

        def as_tokens(pairs: list[Preference]) -> PreferenceDataset:
            return PreferenceDataset(
                pairs, self.opened, self.sequence_length, margins=margins, seed=seed
            )

        super().__init__(as_tokens(train), as_tokens(choosing), batch_size)
        self.epochs = epochs
        self.counts = {
            "pairs": len(train),
            "validation": len(choosing),
            "held_out": len(self.held_out_pairs),
        }
        self.note_files(files=patterns, other_files=others)

    def setup(self, stage: str) -> None:
        """Fix the number of steps."""
        self.plan_steps(self.count_steps(self.epochs))

    def val_dataloader(self) -> DataLoader[PairBatch]:  # type: ignore[override]
        """The pairs that are held out, no more at a time than in training."""
        _, n_groups = processes(self.trainer)
        with self.in_parts(n_groups):
            return super().val_dataloader()


def check_own_share(share: float, others: list[str]) -> None:
    """Refuse a share of a mix where there is nothing to mix, or that is no share."""
    if not others:
        raise ValueError(
            "data.own_share is for a mix, but there are no data.other_files to mix in"
        )
    if not 0 < share <= 1:
        raise ValueError(f"data.own_share must be above 0 and at most 1, not {share}")


def prompt_of(pair: Preference) -> Dialog:
    """The prompt of a pair."""
    return pair.prompt


class PromptFiles(FileData, PromptDataModule):
    """Prompts of files, for a policy to answer.

    Args:
        start: folder of the policy.
        files: one or several paths or globs; layouts as in
            `llama2_lite.runtime.dialogs`, of which the prompts are used.
        safety_files: more of them, whose prompts are tagged as ones that may elicit
            unsafe answers, so that safety decides what they are worth.
        validation_prompts: how many are held out, drawn evenly.
        max_new_tokens: room for the answer.
        batch_size: prompts of an iteration.
        skip_bad: drop what is wrong instead of stopping at it.
        seed: of what is held out, and of the order.

    Attributes:
        safety_prompts: what users say in the tagged prompts.
    """

    def __init__(
        self,
        start: str,
        files: Files,
        safety_files: Files | None = None,
        validation_prompts: int = 64,
        max_new_tokens: int = 64,
        batch_size: PositiveInt = 512,
        skip_bad: bool = False,
        seed: int = 0,
    ):
        self.open_start(start, None)
        prompts, tagged = read_tagged_prompts(
            self, files, safety_files, max_new_tokens, skip_bad
        )
        self.safety_prompts = tagged
        if not 0 < validation_prompts < len(prompts):
            raise ValueError(
                f"validation_prompts is {validation_prompts}, but there are "
                f"{len(prompts)} prompts, and some have to be left to learn from"
            )
        fraction = validation_prompts / len(prompts)
        train, held_out = split_by_prompt(prompts, lambda p: p, fraction, seed)

        def as_tokens(some: list[Dialog]) -> PromptDataset:
            length = self.sequence_length
            return PromptDataset(some, self.opened, length, max_new_tokens, seed)

        super().__init__(as_tokens(train), as_tokens(held_out), batch_size)
        self.counts = {"prompts": len(train), "held_out": len(held_out)}


def read_tagged_prompts(
    data: FileData,
    files: Files,
    safety_files: Files | None,
    max_new_tokens: int,
    skip_bad: bool,
) -> tuple[list[Dialog], set[str]]:
    """Prompts of both kinds of files, and what users say in the tagged ones."""
    limit = data.limit(max_new_tokens)
    patterns, tagged_patterns = as_patterns(files), as_patterns(safety_files)
    read = read_prompts(patterns, limit=limit, skip_bad=skip_bad)
    data.bad = read.bad
    prompts, tagged = read.items, set()
    if tagged_patterns:
        more = read_prompts(tagged_patterns, limit=limit, skip_bad=skip_bad)
        tagged = {prompt[-1]["content"] for prompt in more.items}
        known = {dialog_key(prompt) for prompt in prompts}
        prompts = prompts + [p for p in more.items if dialog_key(p) not in known]
        data.bad = data.bad + more.bad
    data.note_files(files=patterns, safety_files=tagged_patterns)
    return prompts, tagged
