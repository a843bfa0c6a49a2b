"""`llama2-lite chat`: a conversation in the terminal."""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llama2_lite.chat import Dialog, check_dialog, encode_dialog
from llama2_lite.generation import generate, stream, stream_text
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.tokenizer import Tokenizer

HELP = """\
/system TEXT  begin anew under a system message; without TEXT, under none
/reset        begin anew under the same system message
/help         show this
/quit         leave; so does the end of the input (Ctrl-D)
Ctrl-C        cut an answer short"""


def open_model(folder: str | Path) -> tuple[Llama, Tokenizer]:
    """A model and its tokenizer.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds something else, or the two do not fit together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not (folder / "params.json").is_file():  # of Meta's own layout
        check_model_folder(folder)
    model = Llama.from_pretrained(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    check_vocabulary(folder, tokenizer, model.config)
    return model, tokenizer


def check_model_folder(folder: Path, is_reward: bool = False) -> None:
    """Make sure that a model is in a folder, one that writes or one that rewards.

    Raises:
        FileNotFoundError: if none is; of a run, the sentence says where it has its own.
        ValueError: if it is of the other kind.
    """
    if not (folder / "config.json").is_file():
        inside = folder / "model"
        hint = f"; this run has its model in {inside}" if inside.is_dir() else ""
        raise FileNotFoundError(
            f"{folder} is no model folder: no config.json in it{hint}"
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        found = "LlamaForSequenceClassification" in config["architectures"]
    except (ValueError, KeyError, TypeError):  # whoever opens it says what is wrong
        return
    if found != is_reward:
        kinds = ("language model", "reward model")
        raise ValueError(
            f"{folder} holds a {kinds[found]}; a {kinds[is_reward]} is needed here"
        )


def check_vocabulary(folder: Path, tokenizer: Tokenizer, config: LlamaConfig) -> None:
    """Make sure that the tokenizer in a folder is that of the model.

    Raises:
        ValueError: if it has another number of pieces.
    """
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} pieces, but the model "
            f"{config.vocab_size}"
        )


class Conversation:
    """What has been said to a model, and how it answers.

    Args:
        system: the system message; none if it is empty.
        max_new_tokens: longest answer.
        temperature, top_p: see `llama2_lite.generation.generate`.
        seed: the same seed and the same words give the same answers.

    Attributes:
        cut_after: how many tokens the last answer has, if it was cut there instead of
            coming to its end; else 0.

    Raises:
        ValueError: if a setting makes no sense, or if the system message is too long
            or contains a tag of the dialogue format.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        system: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        seed: int = 0,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        # no prompts: this refuses what makes no sense, and does nothing else
        generate(
            model,
            [],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        self.dialog: Dialog = []
        self.cut_after = 0
        self.begin(system)

    def begin(self, system: str) -> None:
        """Forget what was said, and give the model another system message.

        Raises:
            ValueError: if it contains a tag, or leaves no room for a dialogue.
        """
        dialog = [{"role": "system", "content": system}] if system.strip() else []
        if dialog:
            shortest = [*dialog, {"role": "user", "content": "Hi"}]
            self._encode(shortest, "shorten the system message")
        self.dialog = dialog

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.dialog = [
            message for message in self.dialog if message["role"] == "system"
        ]

    def reply(self, text: str) -> Iterator[str]:
        """Answer, in pieces of text as they come.

        Both sides are remembered as far as they came, unless the answer is empty.

        Raises:
            ValueError: if the text is empty or contains a tag, or if the dialogue has
                become too long; what was said before stays as it was.
        """
        self.cut_after = 0
        dialog = [*self.dialog, {"role": "user", "content": text}]
        ids = self._encode(dialog, "shorten it, or begin anew with /reset")
        tokens = stream(
            self.model,
            ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop_ids=[self.tokenizer.eos_id],
            seed=self.seed + len(dialog),  # not the same dice in each turn
        )
        said: list[str] = []
        try:
            for piece in stream_text(self.tokenizer, ids, self._count(tokens)):
                # the space behind [/INST] belongs to the format, not to the answer
                shown = piece if said else piece.lstrip()
                if shown:
                    said.append(shown)
                    yield shown
        finally:
            self._remember(dialog, "".join(said).strip())

    def _encode(self, dialog: Dialog, remedy: str) -> list[int]:
        """Tokens of a dialogue, if they leave room for an answer."""
        ids = encode_dialog(dialog, self.tokenizer).ids
        context = self.model.config.max_seq_len
        if len(ids) >= context:
            raise ValueError(
                f"with this, the dialogue has {len(ids)} tokens, which leaves no room "
                f"in the context of {context}; {remedy}"
            )
        return ids

    def _count(self, tokens: Iterator[int]) -> Iterator[int]:
        """Pass the tokens of an answer on, and note whether it came to its end."""
        count, token = 0, self.tokenizer.eos_id
        for token in tokens:
            count += 1
            yield token
        self.cut_after = 0 if token == self.tokenizer.eos_id else count

    def _remember(self, dialog: Dialog, answer: str) -> None:
        whole = [*dialog, {"role": "assistant", "content": answer}]
        try:
            check_dialog(whole)
        except ValueError:  # empty, or the model wrote a tag: it cannot be repeated
            return
        self.dialog = whole


def talk(
    conversation: Conversation, lines: Iterable[str], write: Callable[[str], None]
) -> None:
    """Answer line after line, and obey commands, until they end.

    Args:
        lines: what the user types.
        write: shows text.
    """
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/help":
                write(f"{HELP}\n")
            elif command == "/reset":
                conversation.reset()
                write("[begun anew]\n")
            elif command == "/system":
                conversation.begin(rest)
                which = "a" if rest.strip() else "no"
                write(f"[begun anew, with {which} system message]\n")
            elif command.startswith("/"):
                write(f"[there is no command {command}]\n{HELP}\n")
            elif command:
                show(conversation, line.strip(), write)
        except ValueError as error:
            write(f"[{error}]\n")


def show(conversation: Conversation, text: str, write: Callable[[str], None]) -> None:
    """Write an answer as it comes; Ctrl-C ends it."""
    pieces = conversation.reply(text)
    is_empty = True
    try:
        for piece in pieces:
            is_empty = False
            write(printable(piece))
    except KeyboardInterrupt as error:
        pieces.close()  # type: ignore[attr-defined]
        if error.args:  # the process was told to end
            raise
    write("[no answer]\n" if is_empty else "\n")
    if conversation.cut_after:
        write(f"[cut after {conversation.cut_after} tokens]\n")


def printable(text: str) -> str:
    """Text without what would control a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def read_lines() -> Iterator[str]:
    """What the user types: with a prompt, and editing, in a terminal.

    Bytes that are no text become replacement characters.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # input() then knows arrow keys

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
