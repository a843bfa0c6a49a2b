"""Supervised fine-tuning.

Exported from book/12_sft.md, which explains every part. Edit it there,
then `make export`.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from llama2_lite.chat import (
    Dialog,
    DialogBatch,
    DialogDataset,
    Example,
    collate,
    separate_samples,
)
from llama2_lite.model import Llama, read_config
from llama2_lite.pretraining import (
    LayOut,
    MixedLengthLoader,
    PretrainingModule,
    on_one_device,
    processes,
    vocabulary_loss,
)
from llama2_lite.town import Town, system_instructions

# What may be wrong with an answer to a harmless request; half of the time its content.
FLAWS = ("wrong", "wrong", "wrong", "wrong", "off_topic", "rude", "evasive", "terse")


def sample_demonstrations(
    town: Town,
    n: int,
    seed: int = 0,
    wrong: float = 0.22,
    unsafe: float = 0.35,
    instructed: float = 0.3,
) -> list[Dialog]:
    """Write requests of the training split with answers, most of them good.

    The kinds of requests come equally often.

    Args:
        wrong: share of answers to harmless requests that have one of ``FLAWS``.
        unsafe: share of unsafe requests that are answered as they ask.
        instructed: share of dialogues with a system instruction, in full or in few
            words, which the answer obeys.
    """
    random = Random(f"demonstrations {town.seed} {seed}")
    tasks = {kind: town.tasks("train", [kind]) for kind in town.items}
    # Ghost Attention holds some out, but to obey in one turn is learned here
    instructions = [*system_instructions("train"), *system_instructions("held_out")]
    dialogs = []
    for _ in range(n):
        task = random.choice(tasks[random.choice(list(tasks))])
        answer, is_unsafe = task.reference, task.kind == "unsafe"
        if random.random() < (unsafe if is_unsafe else wrong):
            flaw = "unsafe" if is_unsafe else random.choice(FLAWS)
            answer = town.bad_answer(task, flaw, random)
        dialog = task.dialog(answer)
        if random.random() < instructed:
            instruction = random.choice(instructions)
            text = random.choice([instruction.text, instruction.short])
            dialog = task.dialog(instruction.apply(answer))
            dialog.insert(0, {"role": "system", "content": text})
        dialogs.append(dialog)
    return dialogs


class SupervisedModule(PretrainingModule):
    """A Llama that learns to write the answers of dialogues.

    Logs what `PretrainingModule` logs. The defaults are the paper's (§3.1, and
    §2.2 for clipping and the end of the cosine); it says nothing of a warm-up, so there
    is none, and nothing of attention across samples.

    Args:
        folder: of the model to start from, in Hugging Face's layout.
        peak_lr: the learning rate at the start.
        warmup: steps until it is reached.
        weight_decay, clip_norm, lay_out: see `PretrainingModule`.
        separate: keep the dialogues of a window from seeing each other.

    Raises:
        FileNotFoundError: if there is no model in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        peak_lr: float = 2e-5,
        warmup: int = 0,
        weight_decay: float = 0.1,
        clip_norm: float = 1.0,
        separate: bool = True,
        lay_out: LayOut[Any] = on_one_device,
    ):
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no model: no config.json in it")
        super().__init__(
            read_config(path),
            peak_lr=peak_lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            lay_out=lay_out,
        )
        self.folder = folder
        self.separate = separate

    def fill(self, model: Llama) -> None:
        """The weights to start from."""
        model.load_weights(self.folder)

    def loss(self, batch: DialogBatch) -> Tensor:  # type: ignore[override]
        """Mean loss of the answers' tokens."""
        learn, targets = batch.loss_mask[:, 1:], batch.tokens[:, 1:]
        positions = mask = None
        if self.separate:
            positions, mask = separate_samples(batch.samples[:, :-1])
        hidden = self.model(batch.tokens[:, :-1], positions, mask, return_hidden=True)
        # the rows that predict nothing to learn never reach the vocabulary
        weight = self.model.output.weight
        return vocabulary_loss(hidden[learn], weight, targets[learn])

    def weigh(self, batch: DialogBatch) -> float:  # type: ignore[override]
        """Each answer token of all parts of a step weighs alike."""
        return batch.weight

    def count_tokens(self, batch: DialogBatch) -> int:  # type: ignore[override]
        """How many tokens go through the model."""
        return batch.tokens[:, 1:].numel()

    def validation_step(  # type: ignore[override]
        self, batch: DialogBatch, batch_idx: int
    ) -> None:
        """Log the loss of the answers' tokens."""
        n_answers = int(batch.loss_mask[:, 1:].sum())
        loss = self.loss(batch)
        log: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "prog_bar": True}
        self.log("validation_loss", loss, batch_size=n_answers, **log)


class DialogDataModule(LightningDataModule):
    """Dialogues for training and validation, packed into windows.

    Args:
        train, validation: from `llama2_lite.chat.encode_dialog`.
        sequence_length: of a window, at most.
        batch_size: windows of a batch, over all processes.
        seed: of the order of the windows.

    Raises:
        ValueError: see `llama2_lite.chat.DialogDataset`.
    """

    def __init__(
        self,
        train: Sequence[Example],
        validation: Sequence[Example],
        sequence_length: int,
        batch_size: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        self.dataset = DialogDataset(train, sequence_length, seed=seed)
        self.held_out = DialogDataset(validation, sequence_length)
        self.batch_size = batch_size

    def count_steps(self, epochs: float) -> int:
        """Updates that see every window so many times."""
        return max(1, round(epochs * len(self.dataset) / self.batch_size))

    def train_dataloader(self) -> MixedLengthLoader:
        """Batches without end."""
        datasets: list[Any] = [self.dataset]
        n_parts = self.trainer.accumulate_grad_batches
        return MixedLengthLoader(
            datasets, [1.0], [self.batch_size], *processes(self.trainer), n_parts
        )

    def val_dataloader(self) -> DataLoader[DialogBatch]:
        """The windows for validation, in order."""
        rank, world_size = processes(self.trainer)
        windows = self.held_out.windows
        mine = windows[rank : len(windows) // world_size * world_size : world_size]
        return DataLoader(
            mine,  # type: ignore[arg-type]
            self.batch_size // world_size,
            collate_fn=collate,
        )
