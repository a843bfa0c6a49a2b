"""What a training command shows while it works."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from llama2_lite.generation import generate
from llama2_lite.runtime.processes import is_divided
from llama2_lite.tokenizer import Tokenizer


def make_console() -> Console:
    """Where progress goes: standard error, as plain lines unless it is a terminal."""
    return Console(file=sys.stderr, force_jupyter=False, highlight=False)


def make_bar(console: Console) -> Progress:
    """A bar that is drawn in terminals only."""
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def follow(
    items: Iterable[Any], total: int, label: str, console: Console
) -> Iterator[Any]:
    """Yield the items and show how many have gone by."""
    with make_bar(console) as bar:
        task = bar.add_task(label, total=total, note="")
        for number, item in enumerate(items):
            if number % 1000 == 0:
                bar.update(task, completed=number)
            yield item


class TrainingProgress(Callback):
    """A bar with the loss and the pace; ten plain lines where there is no terminal.

    Args:
        label: what is being trained.
        console: shared with whoever prints between.
    """

    def __init__(self, label: str, console: Console):
        self.label = label
        self.console = console
        self.bar = make_bar(console)
        self.shown_at = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the bar, in one process."""
        self.console.quiet = not trainer.is_global_zero
        self.bar.start()
        self.task = self.bar.add_task(
            self.label,
            total=trainer.max_steps,
            completed=trainer.global_step,
            note="",
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, *args: Any
    ) -> None:
        """Update the bar four times a second: reading the loss makes a GPU wait."""
        step, now = trainer.global_step, time.monotonic()
        if self.console.is_terminal:
            if now - self.shown_at > 0.25:
                self.shown_at = now
                self.bar.update(self.task, completed=step, note=describe(trainer))
        elif step % math.ceil(trainer.max_steps / 10) == 0:
            line = f"{self.label}: step {step} of {trainer.max_steps}, "
            self.console.print(line + describe(trainer))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the bar away."""
        self.bar.stop()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Take the bar away."""
        self.bar.stop()


def describe(trainer: Trainer) -> str:
    """The figures logged last, in a few words."""
    metrics = trainer.callback_metrics
    parts = [f"loss {float(metrics['loss']):.3f}"] if "loss" in metrics else []
    if "bits_per_character" in metrics:
        parts.append(f"{float(metrics['bits_per_character']):.3f} bits/character")
    if "tokens_per_second" in metrics:
        parts.append(f"{float(metrics['tokens_per_second']):,.0f} tokens/s")
    return ", ".join(parts)


class Samples(Callback):
    """Prints what the model writes, after each validation, one prompt after another.

    A model that is divided among processes is not asked.

    Args:
        tokenizer: of the model; a function, as it may not be there yet.
        prompts: what the model continues.
        console: shared with the bar.
        n_tokens: length of a sample.
    """

    def __init__(
        self,
        tokenizer: Callable[[], Tokenizer],
        prompts: list[str],
        console: Console,
        n_tokens: int = 48,
    ):
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.console = console
        self.n_tokens = n_tokens

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse prompts that could not be continued, before any work is done.

        Raises:
            ValueError: if one fills the context.
        """
        context = module.config.max_seq_len
        for prompt in self.prompts:
            n_tokens = len(self.tokenizer().encode(prompt, bos=True))
            if n_tokens >= context:
                raise ValueError(
                    f"prompts: {prompt[:40]!r} has {n_tokens} tokens, which "
                    f"leaves no room in the context of {context}"
                )

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print a sample."""
        is_due = trainer.state.fn == "fit" and trainer.is_global_zero
        if is_due and self.prompts and not is_divided(module):
            step = trainer.global_step
            turn = step // int(trainer.val_check_batch or 1)
            prompt = self.prompts[turn % len(self.prompts)]
            text = write_on(module.model, self.tokenizer(), prompt, self.n_tokens)
            self.console.print(f"[dim]step {step}:[/] {escape(one_line(text))}")


def one_line(text: str) -> str:
    """Text on one line, without what would control a terminal."""
    shown = (char if char.isprintable() else " " for char in text)
    return " ".join("".join(shown).split())


def write_on(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    n_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The prompt and what the model makes of it, up to the end of the document."""
    ids = tokenizer.encode(prompt, bos=True)
    n_tokens = min(n_tokens, model.config.max_seq_len - len(ids))
    model.eval()
    made = generate(
        model,
        [ids],
        max_new_tokens=n_tokens,
        temperature=temperature,
        top_p=0.95,
        stop_ids=[tokenizer.eos_id],
        seed=seed,
    )
    model.train()
    return tokenizer.decode(ids + made.ids[0])
