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
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any, NoReturn

from llama2_lite.runtime.stopping import Watch, watch_signals
from llama2_lite.runtime.usage import SUMMARIES, usage

DEBUG = "LLAMA2_LITE_DEBUG"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see {self.prog} --help")


def make_parser() -> Parser:
    """Commands and their arguments, but for those that train."""
    parser = Parser(prog="llama2-lite", description="Llama 2, rebuilt.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    tour = commands.add_parser(
        "tour",
        help="train a Llama and a chat model on the built-in town, in minutes",
        description="Train a tokenizer and a Llama on the built-in town, and a chat "
        "model from it. Stopped at any moment, the same command continues.",
    )
    tour.add_argument("--folder", default="runs/tour", help="(%(default)s)")
    tour.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    tour.add_argument("--config", help="another recipe than configs/tour.yaml")
    only = tour.add_mutually_exclusive_group()
    only.add_argument(
        "--base-only", action="store_true", help="stop after the base model"
    )
    only.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="after fine-tuning, make N versions by rounds of RLHF instead of one",
    )
    tour.add_argument("--rounds-config", help="another recipe than configs/rounds.yaml")
    for name, summary in SUMMARIES.items():
        commands.add_parser(name, help=summary)
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
    chat = commands.add_parser(
        "chat",
        help="talk to a chat model",
        description="Talk to a chat model in the terminal. A line that begins with a "
        "slash is a command: /system TEXT, /reset, /help, /quit.",
    )
    chat.add_argument("folder", help="of the model, in Hugging Face's layout")
    add = chat.add_argument
    add("--system", default="", metavar="TEXT", help="a system message")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--temperature", type=float, default=0.6, help="(%(default)s)")
    add("--top-p", type=float, default=0.9, help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add_plan(commands)
    return parser


def add_plan(commands: Any) -> None:
    """The arguments of `llama2-lite plan`."""
    convert = commands.add_parser(
        "convert",
        help="make a model folder of a checkpoint",
        description="Make a model folder of a checkpoint, whatever number of processes "
        "wrote it, on a CPU and holding one copy.",
    )
    convert.add_argument("checkpoint", help="or the folder of a run: its newest one")
    convert.add_argument("folder", help="of the model, in Hugging Face's layout")
    convert.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.model (that of the run's model)"
    )
    plan = commands.add_parser(
        "plan",
        help="say what training a model takes: memory, days, energy, carbon",
        description="Say what training a model takes on so many GPUs: memory on each "
        "by kind, operations, days, energy and carbon; and what does not fit, and why.",
    )
    add = plan.add_argument
    add("--model", required=True, metavar="SIZE", help="7b, 13b, 34b, 70b, 1b, ...")
    add("--gpus", type=int, default=1, metavar="N", help="how many (%(default)s)")
    add("--gpu", default="a100-80gb", metavar="NAME", help="which (%(default)s)")
    add("--tp", type=int, default=1, metavar="N", help="share each product (1)")
    add("--shard", type=int, default=0, metavar="N", help="share a copy (0: all)")
    add("--sequence", type=int, metavar="N", help="tokens of a window (the context)")
    add("--device-batch", type=int, default=1, metavar="N", help="windows at a time")
    add("--batch-tokens", default="4M", metavar="N", help="M: 2^20 (%(default)s)")
    add("--tokens", default="2T", metavar="N", help="in all; T: 10^12 (%(default)s)")
    add("--mfu", type=float, metavar="X", help="0 to 1 (0.4)")
    add("--gpu-hours", type=float, metavar="X", help="in place of --mfu")
    add("--watts", type=float, metavar="X", help="of a GPU (the most it draws)")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, also if a signal stopped a command that can be continued, or if nobody reads
        the output any more; 2 if what was asked for makes no sense, 1 if something else
        went wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    is_kept = bool({"tour", *SUMMARIES} & set(arguments[:1]))
    open_streams()
    # what takes hours goes on when nobody reads; what only prints has no more to do
    out: Any = Unheard(sys.stdout, BrokenPipeError) if is_kept else sys.stdout
    err: Any = Unheard(sys.stderr, OSError)  # where else could it be said?
    with redirect_stdout(out), redirect_stderr(err):
        return write_out(attempt(arguments, is_kept))


def attempt(arguments: list[str], is_kept: bool) -> int:
    """Run a command, report what went wrong, and return the exit code."""
    try:
        with watch_signals() if is_kept else nullcontext():
            run_command(arguments)
    except SystemExit as stop:  # such as after --print_config
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return report_stop(is_kept)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not is_kept:  # nobody reads it
            return 0
        if isinstance(error, RuntimeError) and Watch.signal:  # others are gone already
            return report_stop(is_kept)
        return report(error)
    return 0


class Unheard:
    """A stream whose errors do not matter: after the first, it leads nowhere.

    Args:
        stream: where to write.
        errors: what may happen.
    """

    def __init__(self, stream: Any, errors: type[OSError]):
        self.stream, self.errors = stream, errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, if somebody takes it."""
        try:
            self.stream.write(text)
        except self.errors:
            mute(self.stream)
        return len(text)

    def flush(self) -> None:
        """Write what is left, if somebody takes it."""
        try:
            self.stream.flush()
        except self.errors:
            mute(self.stream)


def mute(stream: Any) -> None:
    """Lead a stream nowhere, so that Python, at exit, does not try to write again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_streams() -> None:
    """Lead the standard streams that are closed nowhere: libraries count on them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def write_out(code: int) -> int:
    """Write the rest of the output; return the exit code, another if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        mute(sys.stdout)
        if code == 0 and not isinstance(error, BrokenPipeError):
            return report(OSError(error.errno, error.strerror, "standard output"))
    return code


def report_stop(is_kept: bool) -> int:
    """Print what becomes of a command that a signal stopped; return the exit code."""
    hint = "stopped; the same command goes on from here" if is_kept else ""
    if is_first_process():
        print(f"\n{hint}", file=sys.stderr)
    return 0 if is_kept else 130


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the one that speaks for all."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt("terminated")


def _show_warning(message: Warning | str, *args: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def report(error: Exception) -> int:
    """Print one line about an error and return the exit code."""
    if type(error).__name__ == "Stopped":
        if is_first_process():
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
    if any(sign in sentence for sign in ("gloo/transport", "Gloo", "NCCL")):
        which = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
        print(
            f"error: process {which} has lost another process of this run, which may "
            "say why it ended",
            file=sys.stderr,
        )
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
        "convert": run_convert,
        "chat": run_chat,
        "plan": run_plan,
    }
    name = arguments[0] if arguments else "--help"
    known = (*commands, *SUMMARIES)
    if not name.startswith("-") and name not in known:
        near = difflib.get_close_matches(name, known)
        hint = f"did you mean {near[0]}?" if near else "see llama2-lite --help"
        raise ValueError(f"there is no command {name!r}; {hint}")
    if name in SUMMARIES:
        if {"-h", "--help"} & set(arguments) or len(arguments) == 1:
            print(usage(name), end="")
            return
        run_training(name, arguments[1:])
        return
    try:
        parsed, rest = parser.parse_known_args(arguments or ["--help"])
    except SystemExit:  # help was printed
        return
    if rest:
        raise ValueError(f"what is {rest[0]!r}? See llama2-lite {name} --help")
    commands[parsed.command](parsed)


def _say_loading() -> None:
    """Tell somebody who waits that PyTorch and Lightning take some seconds."""
    if sys.stderr.isatty():
        print("loading PyTorch", file=sys.stderr)


def run_training(name: str, arguments: list[str]) -> None:
    """Train as the arguments say."""
    _say_loading()
    from llama2_lite.runtime.training import prepare_process

    prepare_process()
    if name == "pretrain":
        from llama2_lite.runtime.pretrain import Pretrain

        Pretrain(arguments).run()
    else:
        from llama2_lite.runtime.align import COMMANDS

        COMMANDS[name](arguments).run()


def run_tour(options: argparse.Namespace) -> None:
    """Build the stages of the tour and print their table."""
    _say_loading()
    from llama2_lite.runtime.alignment import (
        CONTEXT,
        AlignmentRecipe,
        finish_tour,
        keep_gains,
    )
    from llama2_lite.runtime.tour import tour
    from llama2_lite.runtime.tour_checks import check_tour

    where = options.folder, options.seed, options.config
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, but is {options.rounds}")
    if options.rounds is None and options.rounds_config is not None:
        raise ValueError("--rounds-config is the recipe of --rounds N: give both")
    if options.rounds is not None:
        from llama2_lite.runtime.rounds import RoundsRecipe
        from llama2_lite.runtime.versions import tour_rounds

        # a mistake in it is not to be found after minutes of training
        recipe = RoundsRecipe.read(options.rounds_config)
        check_tour(*where, CONTEXT)
        tour(*where)
        keep_gains(options.folder)
        tour_rounds(
            options.folder, options.rounds, options.seed, options.config, recipe
        )
    elif options.base_only:
        check_tour(*where)
        tour(*where)
        keep_gains(options.folder)
    else:
        check_tour(*where, AlignmentRecipe.read().context())
        tour(*where)
        finish_tour(*where)


def run_convert(options: argparse.Namespace) -> None:
    """Make a model folder of a checkpoint."""
    from llama2_lite.runtime.convert import convert

    found = convert(options.checkpoint, options.folder, options.tokenizer)
    print(f"{options.folder} holds the model of {found}")


def run_generate(options: argparse.Namespace) -> None:
    """Print the prompt, and what a model makes of it as it comes."""
    from llama2_lite.generation import stream, stream_text
    from llama2_lite.runtime.talk import open_model

    model, tokenizer = open_model(options.folder)
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


def run_chat(options: argparse.Namespace) -> None:
    """Talk to a model."""
    _say_loading()
    from llama2_lite.runtime.talk import Conversation, open_model, read_lines, talk

    conversation = Conversation(
        *open_model(options.folder),
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if sys.stdin.isatty():
        print("/help shows the commands", file=sys.stderr)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    talk(conversation, read_lines(), write)


def run_plan(options: argparse.Namespace) -> None:
    """Print what a training takes."""
    from llama2_lite.runtime.plan import plan

    print(plan(options))


def _chain(first: int, rest: Any) -> Any:
    yield first
    yield from rest


if __name__ == "__main__":
    sys.exit(main())
