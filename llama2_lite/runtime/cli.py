"""The command line, ``llama2-lite``.

Nothing heavy is imported before it is needed, so that help comes at once.
"""

import argparse
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

DEBUG = "LLAMA2_LITE_DEBUG"

PRETRAIN_HELP = """\
usage: llama2-lite pretrain --config NAME_OR_FILE [--key value ...]

Train a Llama from the built-in town or from your own .txt, .jsonl or .parquet files.
Stopped at any moment, the same command continues.

  --config NAME_OR_FILE    town, text, or a YAML file; may be given several times
  --output FOLDER          of the run: checkpoints, logs, and model/ at the end
  --data.files PATTERN     what to read, or '[a.txt, b/*.jsonl]'; the town if left out
  --data.text_field NAME   JSON key or Parquet column with the text (text)
  --data.vocab_size N      of the tokenizer that is trained
  --data.tokenizer FILE    a SentencePiece model to use instead
  --data.validation_fraction X   of the text, at its end, that is held out (0.1)
  --data.lengths '[[1.0, 256, 16]]'   share, sequence length and windows of a batch
  --model.config.dim N     and n_layers, n_heads, n_kv_heads, hidden_dim, max_seq_len
  --model.peak_lr X        and warmup, weight_decay, clip_norm
  --trainer.max_steps N    and every other argument of Lightning's Trainer
  --prompts '[ROMEO:]'     what the samples continue
  --seed N                 of the weights and the order of the data (0)
  --force                  start anew in a folder that is used
  --print_config           all keys with their values; =comments explains them
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see {self.prog} --help")


def make_parser() -> Parser:
    """Commands and their arguments, but for pretrain's."""
    parser = Parser(prog="llama2-lite", description="Llama 2, rebuilt.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    tour = commands.add_parser(
        "tour",
        help="train a tokenizer and a Llama on the built-in town, in minutes",
        description="Train a tokenizer and a Llama on the built-in town. Stopped at "
        "any moment, the same command continues.",
    )
    tour.add_argument("--folder", default="runs/tour", help="(%(default)s)")
    tour.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    tour.add_argument("--config", help="another recipe than configs/tour.yaml")
    commands.add_parser(
        "pretrain", help="train a Llama from the town or from your own files"
    )
    generate = commands.add_parser(
        "generate",
        help="let a model continue a prompt",
        description="Let a model continue a prompt.",
    )
    generate.add_argument("folder", help="of the model, in Hugging Face's layout")
    generate.add_argument("prompt")
    add = generate.add_argument
    add("--max-new-tokens", type=int, default=200, help="(%(default)s)")
    add("--temperature", type=float, default=0.8, help="(%(default)s)")
    add("--top-p", type=float, default=0.95, help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 if what was asked for makes no sense, 1 if something else went wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        run_command(arguments)
    except KeyboardInterrupt:
        is_kept = arguments[:1] != ["generate"]
        hint = "stopped; the same command goes on from here" if is_kept else ""
        print(f"\n{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return report(error)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _show_warning(message: Warning | str, *args: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def report(error: Exception) -> int:
    """Print one line about an error and return the exit code."""
    if type(error).__name__ == "Stopped":
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        return 0
    if os.environ.get(DEBUG):
        raise error
    expected = ValueError, OSError, FloatingPointError
    sentence = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        sentence = ": ".join(
            str(part) for part in (error.filename, error.strerror) if part
        )
    if isinstance(error, expected) or type(error).__module__.startswith("lightning"):
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    kind = type(error).__name__
    hint = f"set {DEBUG}=1 to see where"
    print(f"error: unexpected {kind}: {sentence} ({hint})", file=sys.stderr)
    return 1


def run_command(arguments: list[str]) -> None:
    """Parse the arguments and call what they name."""
    parser = make_parser()
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "tour": run_tour,
        "generate": run_generate,
    }
    name = arguments[0] if arguments else "--help"
    if not name.startswith("-") and name not in (*commands, "pretrain"):
        near = difflib.get_close_matches(name, (*commands, "pretrain"))
        hint = f"did you mean {near[0]}?" if near else "see llama2-lite --help"
        raise ValueError(f"there is no command {name!r}; {hint}")
    if name == "pretrain":
        if {"-h", "--help"} & set(arguments) or len(arguments) == 1:
            print(PRETRAIN_HELP, end="")
            return
        _say_loading()
        from llama2_lite.runtime.pretrain import run

        run(arguments[1:])
        return
    if arguments[:1] == ["generate"]:  # a prompt may begin with a dash
        pass
    try:
        parsed = parser.parse_args(arguments or ["--help"])
    except SystemExit:  # help was printed
        return
    commands[parsed.command](parsed)


def _say_loading() -> None:
    """Tell somebody who waits that PyTorch and Lightning take some seconds."""
    if sys.stderr.isatty():
        print("loading PyTorch", file=sys.stderr)


def run_tour(options: argparse.Namespace) -> None:
    """Build the stages of the tour and print their table."""
    _say_loading()
    from llama2_lite.runtime.tour import tour

    tour(options.folder, seed=options.seed, recipe=options.config)


def run_generate(options: argparse.Namespace) -> None:
    """Print the prompt, and what a model makes of it as it comes."""
    from pathlib import Path

    from llama2_lite.generation import stream, stream_text
    from llama2_lite.model import Llama
    from llama2_lite.tokenizer import Tokenizer

    folder = Path(options.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    model = Llama.from_pretrained(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} pieces, but the model "
            f"{model.config.vocab_size}"
        )
    prompt = tokenizer.encode(options.prompt, bos=True)
    tokens = stream(
        model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop_ids=[tokenizer.eos_id],
        seed=options.seed,
    )
    first = next(tokens)  # errors come before any output
    print(options.prompt, end="", flush=True)
    for piece in stream_text(tokenizer, prompt, _chain(first, tokens)):
        print(piece, end="", flush=True)
    print()


def _chain(first: int, rest: Any) -> Any:
    yield first
    yield from rest


if __name__ == "__main__":
    sys.exit(main())
