"""Dialogues that a model writes itself, to learn from them."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    PositiveInt,
)
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from llama2_lite.chat import Dialog, DialogDataset, check_dialog, encode_dialog
from llama2_lite.ghost_attention import (
    GhostDataset,
    GhostDialog,
    build_dialogs,
    instruct_every_turn,
)
from llama2_lite.model import Llama, read_config
from llama2_lite.pretraining import processes
from llama2_lite.rejection import (
    Pick,
    best_of,
    best_of_all_rounds,
    best_temperature,
    sample_answers,
    score_answers,
)
from llama2_lite.runtime.configs import Epochs
from llama2_lite.runtime.dialogs import (
    Read,
    collect,
    context_limit,
    field_text,
    read_dialogs,
    split_by_prompt,
)
from llama2_lite.runtime.file_data import (
    FileData,
    Files,
    as_patterns,
    check_fraction,
    folder_stamps,
    read_start,
    read_tagged_prompts,
)
from llama2_lite.runtime.progress import follow, make_console
from llama2_lite.runtime.rewards import (
    check_gate,
    check_reward_models,
    open_reward,
)
from llama2_lite.sft import DialogDataModule
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import SystemInstruction, system_instructions

CHUNK = 256  # prompts whose answers are kept at a time; what a kill can cost
PILOT = 64  # prompts on which temperatures are compared


class SampledData(FileData, DialogDataModule):
    """Dialogues that are written before training, into a folder of the run.

    A subclass writes `dialogs_file` in `prepare_data`, which one process does.
    """

    def prepare_sampling(
        self,
        folder: Path,
        start: str,
        sequence_length: int | None,
        batch_size: int,
        epochs: float,
        validation_fraction: float,
        seed: int,
    ) -> None:
        """Note how to train; called by the constructors."""
        LightningDataModule.__init__(self)  # the dialogues are not there yet
        check_fraction(validation_fraction)
        self.open_start(start, sequence_length)
        self.folder = Path(folder) / "sampled"
        self.batch_size, self.epochs = batch_size, epochs
        self.validation_fraction, self.seed = validation_fraction, seed

    def open_sampler(self, folder: str) -> None:
        """Note the model that writes."""
        self.sampler = Path(folder)
        self.sampler_context = read_start(self.sampler).max_seq_len
        if Tokenizer(self.sampler / "tokenizer.model").sha256 != self.opened.sha256:
            raise ValueError(
                f"{folder} and {self.start} have different tokenizers, so that one "
                "cannot learn from the other"
            )
        self.sources["sampler"] = folder_stamps(self.sampler)

    def load_sampler(self) -> Llama:
        """The model that writes, where the trainer computes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        device = self.trainer.strategy.root_device
        return Llama.from_pretrained(self.sampler).to(device).eval()

    @property
    def dialogs_file(self) -> Path:
        """Where the dialogues go."""
        return self.folder / "dialogs.jsonl"

    def setup(self, stage: str) -> None:
        """Read the dialogues, and fix the number of steps."""
        if hasattr(self, "dataset"):  # Lightning asks again, to validate
            return
        items = self.read_items()
        train, held_out = split_by_prompt(
            items, self.prompt_of, self.validation_fraction, self.seed
        )
        self.dataset, self.held_out = self.as_tokens(train), self.as_tokens(held_out)
        self.counts |= {"dialogues": len(train), "held_out": len(held_out)}
        self.plan_steps(self.count_steps(self.epochs))

    def read_items(self) -> list[Any]:
        """What `dialogs_file` holds."""
        raise NotImplementedError

    def prompt_of(self, item: Any) -> Dialog:
        """What a training sample may not share with a held-out one."""
        raise NotImplementedError

    def as_tokens(self, items: list[Any]) -> Any:
        """Samples as a dataset."""
        raise NotImplementedError


class RejectionData(SampledData):
    """The best of K answers to each prompt, by reward models.

    Args:
        folder: of the run.
        start: folder of the model to fine-tune.
        files: prompts; layouts as in `llama2_lite.runtime.dialogs`.
        safety_files: more of them, tagged as ones that may elicit unsafe answers.
        helpfulness, safety: folders of the reward models; one may be left out.
        sampler: folder of the model that answers, such as a larger one; the model to
            fine-tune if left out.
        earlier: ``dialogs.jsonl`` of earlier rounds; of all rounds, the best answer to
            each prompt is learned, by the reward models of this one.
        k: answers to each prompt.
        temperatures: of the sampling; of several, the one with the best rewards.
        max_new_tokens: an answer without an end is not picked.
        validation_fraction: of the prompts that is held out.
        sequence_length: of a window; the model's context if left out.
        batch_size: windows of a batch over all processes.
        epochs: how often each dialogue is learned.
        skip_bad: drop what is wrong instead of stopping at it.
        seed: of the answers, of what is held out, and of the order.
    """

    def __init__(
        self,
        folder: Path,
        start: str,
        files: Files,
        safety_files: Files | None = None,
        helpfulness: str | None = None,
        safety: str | None = None,
        sampler: str | None = None,
        earlier: Files | None = None,
        k: PositiveInt = 8,
        temperatures: list[NonNegativeFloat] = [1.0],  # noqa: B006
        max_new_tokens: PositiveInt = 64,
        validation_fraction: float = 0.1,
        sequence_length: PositiveInt | None = None,
        batch_size: PositiveInt = 64,
        epochs: Epochs = 2.0,
        skip_bad: bool = False,
        seed: int = 0,
    ):
        self.prepare_sampling(
            folder,
            start,
            sequence_length,
            batch_size,
            epochs,
            validation_fraction,
            seed,
        )
        self.open_sampler(sampler or start)
        self.rewards = (helpfulness, safety)
        folders = check_reward_models(helpfulness, safety, self.sampler)
        self.sources["rewards"] = [folder_stamps(path) for path in folders]
        check_gate(safety_files, helpfulness, safety, "data.safety")
        check_temperatures(temperatures, k)
        self.prompts, self.tagged = read_tagged_prompts(
            self, files, safety_files, max_new_tokens, skip_bad
        )
        self.k, self.temperatures = k, temperatures
        self.max_new_tokens = max_new_tokens
        self.counts["prompts"] = len(self.prompts)
        self.earlier: list[list[Pick]] = []
        self.read_earlier(as_patterns(earlier), folders, skip_bad)

    def read_earlier(
        self, patterns: list[str], folders: list[Path], skip_bad: bool
    ) -> None:
        """Read what earlier rounds kept, as far as the reward models can score it."""
        sizes = {p: read_config(p / "config.json").max_seq_len for p in folders}
        least = min(folders, key=sizes.__getitem__)
        name = f"the context of {least}"
        limit = context_limit(self.opened, sizes[least], name=name)
        for pattern in patterns:
            read = read_dialogs([pattern], limit=limit, skip_bad=skip_bad)
            self.bad = self.bad + read.bad
            self.earlier.append(
                [Pick(dialog[:-1], dialog[-1]["content"], 0.0) for dialog in read.items]
            )
        self.note_files(earlier=patterns)

    def read_items(self) -> list[Dialog]:
        """The best answers with their prompts; retokenised, a few may be too long."""
        path = str(self.dialogs_file)
        read = read_dialogs([path], limit=self.limit(), skip_bad=True)
        self.counts["too_long"] = len(read.bad)
        answered = [one["dialog"][:-1] for one in read_records(self.dialogs_file)]
        known = set(map(json.dumps, answered))
        self.counts["unanswered"] = sum(
            json.dumps(prompt) not in known for prompt in self.prompts
        )
        return read.items

    def prompt_of(self, item: Dialog) -> Dialog:
        """All but the answer."""
        return item[:-1]

    def as_tokens(self, items: list[Dialog]) -> DialogDataset:
        """Dialogues as packed windows."""
        return DialogDataset(self.encode(items), self.sequence_length, seed=self.seed)

    def prepare_data(self) -> None:
        """Answer the prompts, and keep the best answers; goes on where it stopped."""
        if self.dialogs_file.is_file():
            return
        model = self.load_sampler()
        device = model.norm.weight.device
        score = open_reward(
            *self.rewards, self.sampler, model.config, self.tagged, device
        )
        picks = best_of(*self._sample(model, score), version=len(self.earlier))
        if self.earlier:
            picks = best_of_all_rounds([*self.earlier, picks], score)
        if not picks:
            raise ValueError(
                f"no answer to any of {len(self.prompts):,} prompts has an end and "
                f"content, with data.k={self.k} and data.max_new_tokens="
                f"{self.max_new_tokens}: give larger ones, or another data.sampler"
            )
        write_lines(
            self.dialogs_file,
            ({"dialog": pick.dialog(), "score": pick.score} for pick in picks),
        )

    def _sample(self, model: Llama, score: Any) -> tuple[list[Dialog], Any, Any]:
        """Prompts, their answers and the scores of these, (N, K)."""
        starts = range(0, len(self.prompts), CHUNK)
        temperature = self.temperatures[0]
        if len(self.temperatures) > 1:
            temperature = best_temperature(
                model,
                self.opened,
                self.prompts[:PILOT],
                score,
                self.k,
                self.temperatures,
                self.seed,
            )
        answers: list[list[str]] = []
        scores = []
        for start in follow(starts, len(starts), "sampling", make_console()):
            path = self.folder / f"answers-{start:08}.json"
            prompts = self.prompts[start : start + CHUNK]
            if not path.is_file():
                drawn = sample_answers(
                    model,
                    self.opened,
                    prompts,
                    self.k,
                    temperature=temperature,
                    max_new_tokens=self.max_new_tokens,
                    seed=self.seed * 1_000_003 + start,
                    keep_cut=False,
                )
                found = score_answers(score, prompts, drawn)
                write_lines(path, [{"answers": drawn, "scores": found.tolist()}])
            (kept,) = read_records(path)
            answers += kept["answers"]
            scores.append(torch.tensor(kept["scores"]))
        return self.prompts, answers, torch.cat(scores)


def check_temperatures(temperatures: list[float], k: int) -> None:
    """Refuse temperatures that leave nothing to choose."""
    if not temperatures:
        raise ValueError("data.temperatures is empty: give at least one")
    if k > 1 and 0 in temperatures:
        raise ValueError(
            f"data.temperatures holds 0, at which all data.k={k} answers to a prompt "
            "are the same; give numbers above 0, or data.k=1"
        )


class GhostData(SampledData):
    """Dialogues with an instruction, and replies of a model told it at every turn.

    Args:
        folder: of the run.
        start: folder of the model to fine-tune.
        files: dialogues; layouts as in `llama2_lite.runtime.dialogs`.
        instructions: files of objects with a ``text``, and optionally ``short``, the
            same in fewer words, and ``pattern``, a regular expression that an answer
            that obeys must match; those of the town if left out.
        sampler: folder of the model that replies; the one to fine-tune if left out.
        combined: share of the instructed dialogues that have two instructions; 0.2 if
            left out.
        plain: share of dialogues without, whose own answers are learned.
        context: turns that the sampler sees; all if left out.
        max_new_tokens: a reply without an end is not used.
        temperature: of the sampling.
        validation_fraction: of the dialogues that is held out.
        sequence_length: of a dialogue; the model's context if left out.
        batch_size: dialogues of a batch over all processes.
        epochs: how often each dialogue is learned.
        skip_bad: drop what is wrong instead of stopping at it.
        seed: of the replies, of what is held out, and of the order.
    """

    def __init__(
        self,
        folder: Path,
        start: str,
        files: Files,
        instructions: Files | None = None,
        sampler: str | None = None,
        combined: ClosedUnitInterval | None = None,
        plain: ClosedUnitInterval = 0.1,
        context: PositiveInt | None = None,
        max_new_tokens: PositiveInt = 64,
        temperature: NonNegativeFloat = 1.0,
        validation_fraction: float = 0.1,
        sequence_length: PositiveInt | None = None,
        batch_size: PositiveInt = 64,
        epochs: Epochs = 2.0,
        skip_bad: bool = False,
        seed: int = 0,
    ):
        self.prepare_sampling(
            folder,
            start,
            sequence_length,
            batch_size,
            epochs,
            validation_fraction,
            seed,
        )
        self.open_sampler(sampler or start)
        self.instructions, dropped = system_instructions("train"), []
        instruction_patterns = as_patterns(instructions)
        if instruction_patterns:
            told = read_instructions(
                instruction_patterns,
                lambda text: self.check_instruction(text, max_new_tokens),
                skip_bad,
            )
            self.instructions, dropped = told.items, told.bad
        combined = choose_combined(combined, self.instructions)
        longest = sorted((one.text for one in self.instructions), key=len)
        text = " ".join(longest[-2:] if combined else longest[-1:])

        def check(dialog: Dialog) -> None:
            self.check_room(dialog, text, context, max_new_tokens)

        patterns = as_patterns(files)
        read = read_dialogs(patterns, limit=check, skip_bad=skip_bad)
        self.dialogs, self.bad = read.items, read.bad + dropped
        self.note_files(files=patterns, instructions=instruction_patterns)
        self.settings: dict[str, Any] = {
            "combined": combined,
            "plain": plain,
            "context": context,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        }
        self.counts["instructions"] = len(self.instructions)

    def sampler_room(self) -> tuple[int, str]:
        """How many tokens the sampler may have before it, and what says so."""
        if self.sampler_context < self.sequence_length:
            return self.sampler_context, "the sampler's context"
        return self.sequence_length, self.length_name

    def check_instruction(self, text: str, answer_tokens: int) -> None:
        """Refuse an instruction that leaves no room, whatever the dialogue."""
        n_tokens, (room, name) = len(self.opened.encode(text)), self.sampler_room()
        if n_tokens + answer_tokens > room:
            raise ValueError(
                f"the instruction has {n_tokens} tokens, but {name} is {room}, less "
                f"{answer_tokens} for the answer"
            )

    def check_room(
        self, dialog: Dialog, text: str, n_turns: int | None, answer_tokens: int
    ) -> None:
        """Refuse a dialogue that is too long for the sampler, told at every turn."""
        turns = instruct_every_turn(dialog, text)
        sizes = [len(encode_dialog(turn, self.opened).ids) for turn in turns]
        seen = min(n_turns or len(sizes), len(sizes))
        most = max(sum(sizes[i : i + seen]) for i in range(len(sizes) - seen + 1))
        room, name = self.sampler_room()
        if most + answer_tokens > room:
            raise ValueError(
                f"the dialogue may have {most} tokens when the instruction is told at "
                f"every turn, but {name} is {room}, less {answer_tokens} for the "
                "answer; --data.context N shows the sampler only N turns"
            )

    def prepare_data(self) -> None:
        """Let the sampler reply; goes on where it stopped."""
        if self.dialogs_file.is_file():
            return
        model = self.load_sampler()
        made: list[dict[str, Any]] = []
        starts = range(0, len(self.dialogs), CHUNK)
        for start in follow(starts, len(starts), "sampling", make_console()):
            path = self.folder / f"replies-{start:08}.jsonl"
            if not path.is_file():
                ghosts = build_dialogs(
                    model,
                    self.opened,
                    self.dialogs[start : start + CHUNK],
                    self.instructions,
                    seed=self.seed * 1_000_003 + start,
                    **self.settings,
                )
                write_lines(path, (ghost._asdict() for ghost in ghosts))
            made += read_records(path)
        write_lines(self.dialogs_file, made)

    def read_items(self) -> list[GhostDialog]:
        """The dialogues with their replies."""
        ghosts = [GhostDialog(**record) for record in read_records(self.dialogs_file)]
        told = [
            reply for ghost in ghosts if ghost.instruction for reply in ghost.replies
        ]
        self.counts["replies"] = len(told)
        self.counts["obeyed"] = sum(reply is not None for reply in told)
        if told and not self.counts["obeyed"]:
            raise ValueError(f"there is no reply to learn: {self.say_obeyed()}")
        return ghosts

    def say_obeyed(self) -> str:
        """How many replies can be learned, and how to get more."""
        return (
            f"of {self.counts['replies']:,} sampled replies {self.counts['obeyed']:,} "
            f"ended within data.max_new_tokens={self.settings['max_new_tokens']} and "
            "obeyed; raise that, give more dialogues, or let another data.sampler reply"
        )

    def prompt_of(self, item: GhostDialog) -> Dialog:
        """The dialogue itself."""
        return item.dialog

    def as_tokens(self, items: list[GhostDialog]) -> GhostDataset:
        """Dialogues as trees."""
        length = self.sequence_length
        try:
            return GhostDataset(items, self.opened, length, seed=self.seed)
        except ValueError as error:
            raise ValueError(f"{error}; {self.say_obeyed()}") from None

    def val_dataloader(self) -> DataLoader[Any]:
        """What is held out, no more at a time than in training.

        The dialogues are the same however many processes there are; all see them all.
        """
        n, size = len(self.held_out), self.batch_size
        n = n // size * size or n
        _, n_groups = processes(self.trainer)
        most = max(1, size // n_groups // self.trainer.accumulate_grad_batches)
        part = max(k for k in range(1, min(n, most) + 1) if n % k == 0)
        batches: Any = [self.held_out.batch(i, part) for i in range(n // part)]
        return DataLoader(batches, batch_size=None)


def choose_combined(
    combined: float | None, instructions: list[SystemInstruction]
) -> float:
    """The share of combined instructions; refused where no two can be combined."""
    kinds = {one.short.partition(":")[0] for one in instructions}  # as they are dealt
    if combined and len(kinds) < 2:
        raise ValueError(
            f"data.combined is {combined}, but data.instructions has no two that can "
            "be combined, as they must differ in what `short` says before a colon; "
            "leave it out, or give more of them"
        )
    return 0.2 if combined is None else combined


def read_instructions(
    patterns: list[str], limit: Callable[[str], None], skip_bad: bool
) -> Read[SystemInstruction]:
    """System messages from files.

    Args:
        limit: raises ValueError for a text that is too long.
        skip_bad: drop what is wrong instead of stopping at it.

    Raises:
        ValueError: if a record has no text, or a pattern is no regular expression; the
            sentence names its file and line.
    """

    def convert(record: dict[str, Any]) -> list[SystemInstruction]:
        text = field_text(record, "text")
        optional = {
            name: field_text(record, name)
            for name in ("short", "pattern")
            if record.get(name) is not None
        }
        texts = {"short": text, "pattern": "", **optional}
        return [SystemInstruction(text=text, example="{answer}", **texts)]

    def check(instruction: SystemInstruction) -> None:
        for text in (instruction.text, instruction.short):
            if not text:
                raise ValueError("the text is empty")
            check_dialog(
                [{"role": "system", "content": text}, {"role": "user", "content": "Hi"}]
            )
            limit(text)
        try:
            re.compile(instruction.pattern)
        except re.error as error:
            pattern = instruction.pattern
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None

    return collect(patterns, convert, check, skip_bad, "instruction")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, all of them or none."""
    beside = path.with_name(f"{path.name}.partial")
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
