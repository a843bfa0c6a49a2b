"""Batches for fine-tuning that need no packing."""

from collections.abc import Sequence
from random import Random
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from llama2_lite.chat import DialogBatch, Example, collate, weigh_part
from llama2_lite.pretraining import MixedLengthLoader


class Rows:
    """Dialogues as batches of rows of like length, one in each row: no mask is needed.

    Args:
        examples: from `encode_dialog`.
        seed: of the order.
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        self.examples, self.seed = list(examples), seed
        self.sequence_length = max(len(example.ids) for example in examples)
        self.n_tokens = sum(len(example.ids) for example in examples)

    def __len__(self) -> int:
        """Dialogues in an epoch."""
        return len(self.examples)

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> DialogBatch:
        """The rows of one process at one step: a function of the step alone."""
        size = batch_size * world_size
        per_epoch = max(1, len(self) // size)
        epoch, place = divmod(step, per_epoch)
        random = Random(f"rows {self.seed} {epoch}")
        order = random.sample(range(len(self)), len(self))
        batches: list[list[int]] = []
        for start in range(0, len(order), 50 * size):
            some = order[start : start + 50 * size]
            some.sort(key=lambda number: len(self.examples[number].ids))
            batches += [some[i : i + size] for i in range(0, len(some), size)]
        batches = [rows for rows in batches if len(rows) == size] or batches
        random.shuffle(batches)
        # of rows sorted by length, each process takes short and long ones
        parts = [batches[place][i::world_size] for i in range(world_size)]
        counts = [
            sum(self.examples[number].loss_mask) for part in parts for number in part
        ]
        batch = collate([[self.examples[number]] for number in parts[rank]])
        return batch._replace(weight=weigh_part(counts, rank, world_size))


class Served(LightningDataModule):
    """Datasets of several lengths for a trainer.

    Args:
        datasets: one for each length.
        shares: of the batches.
        batch_sizes: over all processes.
        held_out: batches to measure the loss on.
    """

    def __init__(
        self,
        datasets: list[Any],
        shares: list[float],
        batch_sizes: list[int],
        held_out: list[Any],
    ):
        super().__init__()
        self.datasets, self.shares, self.batch_sizes = datasets, shares, batch_sizes
        self.held_out = held_out

    def train_dataloader(self) -> MixedLengthLoader:
        """Batches without end."""
        return MixedLengthLoader(self.datasets, self.shares, self.batch_sizes)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out batches."""
        return DataLoader(self.held_out, batch_size=None)  # type: ignore[arg-type]
