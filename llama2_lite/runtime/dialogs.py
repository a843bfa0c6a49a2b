"""Dialogues, preference pairs and prompts from files of JSON lines, JSON and Parquet.

Each record says by its fields what layout it has:

- our own: ``{"dialog": [...]}`` (or ``messages``) with messages of a ``role`` (system,
  user, assistant) and a ``content``; ``{"prompt", "chosen", "rejected"}`` with an
  optional ``level`` and ``safety_bin`` (in the words of `llama2_lite.town`), where the
  prompt is a text or a list of messages; and ``{"prompt"}`` alone;
- HH-RLHF: ``chosen`` and ``rejected`` are whole transcripts, which differ in their last
  answer; either as text with ``Human:`` and ``Assistant:`` or as lists of messages;
- Alpaca: ``instruction``, ``input`` and ``output``, or ``chosen`` and ``rejected``
  instead of the output;
- PKU-SafeRLHF: ``prompt``, ``response_0``, ``response_1``, and which of them is better
  and which is safer;
- OpenAssistant: trees of ranked replies, or their messages one by one.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

from llama2_lite.chat import Dialog, Message, check_dialog, encode_dialog
from llama2_lite.runtime.documents import (
    LONG_NUMBER,
    Place,
    Record,
    json_lines,
    json_object,
    matching_files,
    parquet_rows,
)
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import LEVELS, SAFETY_BINS, Preference

T = TypeVar("T")
AXES = ("helpfulness", "safety")


@dataclass
class Read(Generic[T]):
    """What was read.

    Args:
        skip_bad: drop what is wrong instead of stopping at it.

    Attributes:
        items: what is usable.
        bad: one sentence for each record that was dropped.
    """

    skip_bad: bool = False
    items: list[T] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @contextmanager
    def record(self, where: str) -> Iterator[None]:
        """Name the place of what goes wrong inside; note it, or stop."""
        try:
            yield
        except ValueError as error:
            if not self.skip_bad:
                hint = "--skip-bad drops and counts such samples"
                raise ValueError(f"{where} {error}; {hint}") from None
            self.bad.append(f"{where} {error}")


def read_dialogs(
    patterns: Iterable[str],
    *,
    limit: Callable[[Dialog], None] | None = None,
    skip_bad: bool = False,
) -> Read[Dialog]:
    """Demonstrations: dialogues that end with an answer.

    Of a preference pair it is the chosen answer, of an OpenAssistant tree the path of
    the best ranked replies.

    Args:
        patterns: paths or globs of .jsonl, .jsonl.gz, .jsonl.xz, .json and .parquet.
        limit: raises ValueError for a dialogue that is too long, see `context_limit`.
        skip_bad: drop what is wrong instead of stopping at it.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        ValueError: if a record is wrong, or none is usable; the sentence names its file
            and line.
    """

    def check(dialog: Dialog) -> None:
        check_dialog(dialog)
        if dialog[-1]["role"] != "assistant":
            raise ValueError("the dialogue ends with a question, not with an answer")
        if limit:
            limit(dialog)

    return collect(patterns, _demonstrations, check, skip_bad, "dialogue")


def read_preferences(
    patterns: Iterable[str],
    *,
    axis: str = "helpfulness",
    limit: Callable[[Dialog], None] | None = None,
    skip_bad: bool = False,
) -> Read[Preference]:
    """Preference pairs; of an OpenAssistant tree all pairs of ranked answers.

    Args:
        axis: where a file tells the more helpful answer from the safer one, which of
            them is meant; pairs of which only the chosen answer is unsafe are wrong
            (the paper leaves them out).

    Other arguments and the errors are those of `read_dialogs`.
    """
    if axis not in AXES:
        raise ValueError(f"the axis {axis!r} is none of {', '.join(AXES)}")

    def check(pair: Preference) -> None:
        for answer in (pair.chosen, pair.rejected):
            dialog = answered(pair, answer)
            check_dialog(dialog)
            if limit:
                limit(dialog)
        if pair.chosen.strip() == pair.rejected.strip():
            raise ValueError("the two answers are identical")

    def convert(record: Record) -> Iterable[Preference]:
        return _preferences(record, axis)

    return collect(patterns, convert, check, skip_bad, "preference pair")


def read_prompts(
    patterns: Iterable[str],
    *,
    limit: Callable[[Dialog], None] | None = None,
    skip_bad: bool = False,
) -> Read[Dialog]:
    """Prompts to answer: dialogues that end with a question, each of them once.

    Of a file with answers, everything before the last answer. Arguments and errors are
    those of `read_dialogs`.
    """

    def check(prompt: Dialog) -> None:
        check_dialog(prompt)
        if prompt[-1]["role"] != "user":
            raise ValueError("the prompt ends with an answer, not with a question")
        if limit:
            limit(prompt)

    read = collect(patterns, _prompts, check, skip_bad, "prompt")
    read.items = list({dialog_key(prompt): prompt for prompt in read.items}.values())
    return read


def context_limit(
    tokenizer: Tokenizer,
    context: int,
    answer_tokens: int = 0,
    name: str = "the context",
) -> Callable[[Dialog], None]:
    """A check for dialogues of more tokens than a context has.

    Args:
        answer_tokens: room to leave for an answer.
        name: of what has so many tokens, as its sentence says it.
    """

    def limit(dialog: Dialog) -> None:
        n_tokens = len(encode_dialog(dialog, tokenizer).ids)
        if n_tokens + answer_tokens > context:
            room = f", less {answer_tokens} for the answer" if answer_tokens else ""
            raise ValueError(
                f"the dialogue has {n_tokens} tokens, but {name} is {context}{room}"
            )

    return limit


def answered(pair: Preference, answer: str) -> Dialog:
    """The prompt of a pair with one of its answers."""
    return [*pair.prompt, _message("assistant", answer)]


def dialog_key(dialog: Dialog) -> str:
    """A string that only equal dialogues share."""
    return json.dumps([[message["role"], message["content"]] for message in dialog])


def split_by_prompt(
    items: list[T], prompt_of: Callable[[T], Dialog], fraction: float, seed: int = 0
) -> tuple[list[T], list[T]]:
    """A part to train on and a part held out, which share no prompt.

    Args:
        prompt_of: the prompt of an item.
        fraction: of the prompts to hold out; at least one is.
        seed: of the choice.

    Raises:
        ValueError: if there are fewer than two prompts.
    """
    keys = [dialog_key(prompt_of(item)) for item in items]
    prompts = list(dict.fromkeys(keys))
    if len(prompts) < 2:
        raise ValueError(
            f"{len(items)} samples with one prompt cannot be split into a part to "
            "train on and a part held out"
        )
    n_held_out = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held_out = set(Random(f"held out {seed}").sample(prompts, n_held_out))
    parts: tuple[list[T], list[T]] = [], []
    for key, item in zip(keys, items, strict=True):
        parts[key in held_out].append(item)
    return parts


def collect(
    patterns: Iterable[str],
    convert: Callable[[Record], Iterable[T]],
    check: Callable[[T], None],
    skip_bad: bool,
    what: str,
) -> Read[T]:
    """Convert and check every record."""
    patterns = list(patterns)
    read: Read[T] = Read(skip_bad)
    for where, record in _records(patterns, read):
        items: list[T] = []
        with read.record(where):
            items = list(convert(record))
        for item in items:
            with read.record(where):
                check(item)
                read.items.append(item)
    if not read.items:
        reason = f"; {read.bad[0]}" if read.bad else ""
        raise ValueError(f"there is no {what} in {', '.join(patterns)}{reason}")
    return read


def _records(patterns: list[str], read: Read[T]) -> Iterator[tuple[str, Record]]:
    """Every record and where it stands; single messages joined to trees, at the end."""
    messages: list[tuple[str, Record]] = []
    for where, load in chain.from_iterable(map(_places, _files(patterns))):
        record: Record | None = None
        with read.record(where):
            record = load()
        if record is None:
            continue
        if {"message_id", "parent_id"} <= record.keys():
            with read.record(where):
                _check_ids(record)
                messages.append((where, record))
        else:
            yield where, record
    yield from _join_messages(messages, read)


SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".parquet")


def _files(patterns: list[str]) -> list[Path]:
    """The files that patterns name, each once."""
    files = list(dict.fromkeys(chain.from_iterable(map(matching_files, patterns))))
    for path in files:
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    return files


def _places(path: Path) -> Iterator[Place]:
    """Where each record of a file is, and how to read it."""
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
    elif path.suffix == ".json" and _is_array(path):
        yield from _array_places(path)
    else:
        for where, line in json_lines(path):
            yield where, partial(json_object, line)


def _is_array(path: Path) -> bool:
    """Whether the first thing in a file of JSON is the bracket of a list."""
    return path.read_bytes().removeprefix(BOM_UTF8).lstrip()[:1] == b"["


def _array_places(path: Path) -> Iterator[Place]:
    """The members of the list that a JSON file is, with the lines they begin on."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = text.index("[")
    while text[position] != "]":
        start = BLANK.match(text, position + 1).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        where = f"{path}, line {line}:"
        if text[start : start + 1] == "]" and text[position] == "[":
            return
        try:
            member, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"{where} not JSON") from None
        except ValueError:
            raise ValueError(f"{where} {LONG_NUMBER}") from None
        position = BLANK.match(text, end).end()  # type: ignore[union-attr]
        if text[position : position + 1] not in (",", "]"):
            raise ValueError(f"{where} neither a comma nor the end of the list follows")
        yield where, partial(_checked_object, member)


BLANK = re.compile(r"\s*")


def _checked_object(member: Any) -> Record:
    if not isinstance(member, dict):
        raise ValueError("not a JSON object")
    return member


def _demonstrations(record: Record) -> Iterable[Dialog]:
    """The dialogues of one record, each with the answer to learn."""
    if _is_tree(record):
        path = _best_path(record["prompt"])
        while path and path[-1]["role"] != "assistant":
            path.pop()
        return [path] if path else []
    for name in ("dialog", "messages"):
        if record.get(name) is not None:
            return [_messages(record[name], name)]
    if "instruction" in record and "chosen" not in record:
        answer = _message("assistant", field_text(record, "output"))
        return [[*_prompt(record), answer]]
    pairs = _preferences(record, "helpfulness")
    return [answered(pair, pair.chosen) for pair in pairs]


def _prompts(record: Record) -> Iterable[Dialog]:
    """What one record asks, without the last answer."""
    if _is_tree(record):
        dialog = _best_path(record["prompt"])
    elif "prompt" in record or "instruction" in record:
        return [_prompt(record)]
    else:
        (dialog,) = _demonstrations(record)
    while dialog and dialog[-1]["role"] == "assistant":
        dialog.pop()
    return [dialog]


def _preferences(record: Record, axis: str) -> Iterable[Preference]:
    """The preference pairs of one record."""
    if _is_tree(record):
        return _ranked_pairs(record["prompt"], [])
    if "response_0" in record:
        return [_safe_rlhf_pair(record, axis)]
    if "chosen" not in record:
        there = ", ".join(record) or "nothing"
        raise ValueError(f"no layout that is known has the fields: {there}")
    level, safety_bin = record.get("level"), record.get("safety_bin")
    for name, value, known in (
        ("level", level, tuple(LEVELS)),
        ("safety bin", safety_bin, SAFETY_BINS),
    ):
        if value is not None and value not in known:
            raise ValueError(f"the {name} {value!r} is none of: {'; '.join(known)}")
    names = ("chosen", "rejected")
    if "prompt" in record or "instruction" in record:
        prompt = _prompt(record)
        chosen, rejected = (field_text(record, name) for name in names)
    else:
        dialogs = [_transcript(record, name) for name in names]
        for name, dialog in zip(names, dialogs, strict=True):
            if not dialog or dialog[-1]["role"] != "assistant":
                raise ValueError(f"the {name} dialogue does not end with an answer")
        prompt = dialogs[0][:-1]
        if dialogs[1][:-1] != prompt:
            raise ValueError("the two answers have no common prompt")
        chosen, rejected = (dialog[-1]["content"] for dialog in dialogs)
    return [Preference(prompt, chosen, rejected, level, safety_bin)]


def _safe_rlhf_pair(record: Record, axis: str) -> Preference:
    """A pair of PKU-SafeRLHF, by one of its two judgements."""
    judgement = "better_response_id" if axis == "helpfulness" else "safer_response_id"
    if record.get(judgement) not in (0, 1):
        raise ValueError(f"the field {judgement!r} is not 0 or 1")
    best = int(record[judgement])
    chosen, rejected = (field_text(record, f"response_{i}") for i in (best, 1 - best))
    safety_bin: str | None = None
    if axis == "safety":
        safe: Any = tuple(record.get(f"is_response_{i}_safe") for i in (best, 1 - best))
        bins = dict(
            zip([(True, False), (True, True), (False, False)], SAFETY_BINS, strict=True)
        )
        if safe == (False, True):
            raise ValueError("the chosen answer is unsafe and the other one is safe")
        if not all(flag in (True, False) for flag in safe):
            raise ValueError("the fields 'is_response_..._safe' are not true or false")
        safety_bin = bins[safe]
    return Preference(_prompt(record), chosen, rejected, None, safety_bin)


def field_text(record: Record, name: str) -> str:
    """A field that is a text."""
    if name not in record:
        raise ValueError(f"no field {name!r}, only {', '.join(record)}")
    if not isinstance(record[name], str):
        raise ValueError(f"the field {name!r} is not a string")
    return record[name].strip()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _prompt(record: Record) -> Dialog:
    """The question of a record that has it in fields of its own."""
    if isinstance(record.get("prompt"), list):
        return _messages(record["prompt"], "prompt")
    if "prompt" in record:
        return [_message("user", field_text(record, "prompt"))]
    text = field_text(record, "instruction")
    if record.get("input"):
        text = f"{text}\n\n{field_text(record, 'input')}".strip()
    return [_message("user", text)]


def _messages(value: Any, name: str) -> Dialog:
    """A list of messages of our own layout."""
    if not isinstance(value, list):
        raise ValueError(f"the field {name!r} is not a list of messages")
    for number, message in enumerate(value, start=1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"message {number} of {name!r} has no {key}")
    return [_message(message["role"], message["content"].strip()) for message in value]


TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {
    "Human": "user",
    "Assistant": "assistant",
    "prompter": "user",
    "assistant": "assistant",
}


def _transcript(record: Record, name: str) -> Dialog:
    """A whole dialogue in one field, as HH-RLHF writes it or as messages."""
    if isinstance(record.get(name), list):
        return _messages(record[name], name)
    before, *parts = TURN.split(field_text(record, name))
    if before or not parts:
        raise ValueError(f"the field {name!r} does not begin with 'Human:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [_message(ROLES[who], text.strip()) for who, text in turns]


def _is_tree(record: Record) -> bool:
    """Whether it is a tree of OpenAssistant."""
    return isinstance(record.get("prompt"), dict)


def _node(node: Record) -> tuple[Message, list[Record]]:
    """A message of a tree, and the replies to it that stand, the best ranked first."""
    role = ROLES.get(field_text(node, "role"))
    if role is None:
        raise ValueError(f"the role {node['role']!r} is not prompter or assistant")
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(r, dict) for r in replies):
        raise ValueError("the field 'replies' is not a list of messages")
    standing = [reply for reply in replies if not reply.get("deleted")]
    return _message(role, field_text(node, "text")), sorted(standing, key=_rank)


def _rank(node: Record) -> float:
    rank = node.get("rank")
    try:
        return float("inf") if rank is None else float(rank)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the rank {rank!r} is not a number") from None


def _best_path(node: Record) -> Dialog:
    """From the first prompt down the best ranked replies."""
    message, replies = _node(node)
    dialog = [message]
    while replies:
        message, replies = _node(replies[0])
        dialog.append(message)
    return dialog


def _ranked_pairs(node: Record, before: Dialog) -> Iterator[Preference]:
    """All pairs of ranked answers to the prompts of a tree."""
    message, replies = _node(node)
    dialog = [*before, message]
    ranked = [reply for reply in replies if _rank(reply) < float("inf")]
    if message["role"] == "user":
        for better, worse in combinations(ranked, 2):
            if _rank(better) < _rank(worse):
                answers = field_text(better, "text"), field_text(worse, "text")
                yield Preference(dialog, *answers)
    for reply in replies:
        yield from _ranked_pairs(reply, dialog)


def _check_ids(record: Record) -> None:
    """Make sure that a message, and the one that it replies to, can be found."""
    for name, kinds in (("message_id", str | int), ("parent_id", str | int | None)):
        if not isinstance(record[name], kinds):
            raise ValueError(f"the field {name!r} is not a string")


def _join_messages(
    messages: list[tuple[str, Record]], read: Read[T]
) -> Iterator[tuple[str, Record]]:
    """OpenAssistant's trees from their messages, which come in any order."""
    nodes = {record["message_id"]: {**record, "replies": []} for _, record in messages}
    for where, record in messages:
        if record["parent_id"] is not None:
            with read.record(where):
                if record["parent_id"] not in nodes:
                    raise ValueError("the message that it replies to is not there")
                replies = nodes[record["parent_id"]]["replies"]
                replies.append(nodes[record["message_id"]])
    for where, record in messages:
        if record["parent_id"] is None and not record.get("deleted"):
            yield where, {"prompt": nodes[record["message_id"]]}
