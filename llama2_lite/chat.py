"""Chat.

Exported from book/11_chat.md, which explains every part. Edit it there,
then `make export`.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2_lite.generation import generate
from llama2_lite.model import Llama
from llama2_lite.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Dialog = list[Message]

INSTRUCTION = ("[INST]", "[/INST]")
SYSTEM = ("<<SYS>>\n", "\n<</SYS>>\n\n")
TAGS = tuple(tag.strip() for tag in (*INSTRUCTION, *SYSTEM))


def check_dialog(dialog: Dialog) -> None:
    """Refuse a dialogue that cannot be written in Llama 2's format.

    Raises:
        ValueError: if there is no user message, if user and assistant do not take
            turns, if there is a system message anywhere but first, if a message is
            empty, or if it contains one of the tags.
    """
    first_user = int(bool(dialog) and dialog[0]["role"] == "system")
    if len(dialog) == first_user:
        raise ValueError("the dialogue has no message of the user")
    for number, message in enumerate(dialog):
        expected = ("user", "assistant")[(number - first_user) % 2]
        if number >= first_user and message["role"] != expected:
            raise ValueError(
                f"message {number + 1} is from {message['role']!r}, where "
                f"{expected!r} should speak: user and assistant take turns, after at "
                "most one system message"
            )
        if not message["content"].strip():
            raise ValueError(f"message {number + 1} ({message['role']}) is empty")
        for tag in TAGS:
            if tag in message["content"]:
                raise ValueError(
                    f"message {number + 1} ({message['role']}) contains {tag}, which "
                    "marks the parts of a dialogue and may not stand in its text"
                )


class Example(NamedTuple):
    """A dialogue as tokens, and for each whether the model should learn to write it."""

    ids: list[int]
    loss_mask: list[bool]


def encode_dialog(
    dialog: Dialog, tokenizer: Tokenizer, train_on: str = "all"
) -> Example:
    """Write a dialogue as the tokens that Llama 2-Chat expects.

    Each turn is BOS, ``[INST] user [/INST] assistant`` and a space, EOS; a system
    message stands inside the first user message. A dialogue that ends with the user is
    a prompt to answer: no EOS, and nothing to learn. Source: Meta's
    llama/generation.py.

    Args:
        dialog: messages, see `check_dialog`.
        tokenizer: Meta's, or one with the same rules.
        train_on: which answers to learn, "all" or the "last" one. An answer's tokens
            are what follows ``[/INST]``, with the EOS. Source: paper §3.1.

    Raises:
        ValueError: if the dialogue is refused, or if this tokenizer joins the end of a
            prompt with its answer.
    """
    if train_on not in ("all", "last"):
        raise ValueError(f'train_on is {train_on!r}, but must be "all" or "last"')
    check_dialog(dialog)
    texts = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        system, user, *rest = texts
        texts = [SYSTEM[0] + system + SYSTEM[1] + user, *rest]
    ids: list[int] = []
    mask: list[bool] = []
    is_prompt = len(texts) % 2 == 1
    for turn in range(0, len(texts), 2):
        request = f"{INSTRUCTION[0]} {texts[turn].strip()} {INSTRUCTION[1]}"
        asked = tokenizer.encode(request, bos=True)
        whole = asked
        if turn + 1 < len(texts):
            text = f"{request} {texts[turn + 1].strip()} "
            whole = tokenizer.encode(text, bos=True, eos=True)
        if whole[: len(asked)] != asked:
            raise ValueError(
                f"{tokenizer.path} joins the end of a prompt with the answer in one "
                "token, so that a model could not be asked as it was trained"
            )
        learn = not is_prompt and (train_on == "all" or turn + 2 == len(texts))
        ids += whole
        mask += [False] * len(asked) + [learn] * (len(whole) - len(asked))
    return Example(ids, mask)


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Share examples out over windows of at most ``length`` tokens.

    Each example, in order, goes whole into the window where it leaves the least room
    (best fit; the paper says only that sequences are filled).

    Raises:
        ValueError: if an example is longer than a window.
    """
    windows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, window), sorted
    for number, example in enumerate(examples):
        size = len(example.ids)
        if size > length:
            raise ValueError(
                f"dialogue {number} has {size} tokens, which do not fit into {length}"
            )
        place = bisect_left(rooms, (size, 0))
        if place == len(rooms):
            windows.append([])
            rooms.append((length, len(windows) - 1))
        room, window = rooms.pop(place)
        windows[window].append(example)
        insort(rooms, (room - size, window))
    return windows


class DialogBatch(NamedTuple):
    """Windows of packed dialogues, each (B, T).

    Attributes:
        tokens: ids, int64.
        loss_mask: whether the model should learn to write a token.
        samples: the number of a token's dialogue in its window; -1 for padding.
        weight: of this part of a step's batch, see `weigh_part`.
    """

    tokens: Tensor
    loss_mask: Tensor
    samples: Tensor
    weight: float = 1.0


def collate(windows: Sequence[Sequence[Example]]) -> DialogBatch:
    """Lay windows out as tensors, padded behind to the length of the fullest."""
    fullest = max(sum(len(example.ids) for example in window) for window in windows)
    shape = (len(windows), fullest)
    tokens = np.zeros(shape, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    samples = np.full(shape, -1, dtype=np.int64)
    for row, window in enumerate(windows):
        start = 0
        for number, example in enumerate(window):
            place = (row, slice(start, start + len(example.ids)))
            tokens[place] = example.ids
            loss_mask[place] = example.loss_mask
            samples[place] = number
            start += len(example.ids)
    first, second, third = map(torch.from_numpy, (tokens, loss_mask, samples))
    return DialogBatch(first, second, third)


def weigh_part(counts: Sequence[int], part: int, n_parts: int) -> float:
    """How much a part of a step's batch has to learn, compared to the average part.

    A loss that is a mean over tokens, times this, has for its average over all parts
    the mean over the tokens of them all.

    Args:
        counts: tokens to learn of each sample of the step, the first part's first.
        part, n_parts: which of how many parts of equally many samples.
    """
    size = len(counts) // n_parts
    mine, total = sum(counts[part * size : (part + 1) * size]), sum(counts)
    return n_parts * mine / total if total else 1.0


class DialogDataset:
    """Dialogues, packed into windows, in a new order of the windows in each epoch.

    Args:
        examples: from `encode_dialog`.
        sequence_length: of a window, at most; what is longer is refused.
        seed: of the orders.

    Attributes:
        n_tokens: of all examples together.

    Raises:
        ValueError: if there are no examples, or one is too long or has nothing to
            learn.
    """

    def __init__(
        self, examples: Sequence[Example], sequence_length: int, *, seed: int = 0
    ):
        if not examples:
            raise ValueError("there are no dialogues")
        for number, example in enumerate(examples):
            if not any(example.loss_mask):
                raise ValueError(f"dialogue {number} has no answer to learn")
        self.sequence_length = sequence_length
        self.seed = seed
        self.n_tokens = sum(len(example.ids) for example in examples)
        self.windows = pack(examples, sequence_length)
        self._n_learned = [
            sum(sum(example.loss_mask) for example in window) for window in self.windows
        ]
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self.windows)

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> DialogBatch:
        """The windows of one process at one step.

        What a step sees in all processes together depends on the product of their
        number and ``batch_size`` only.
        """
        size = batch_size * world_size
        windows = [
            self._window(place) for place in range(step * size, step * size + size)
        ]
        mine = windows[rank * batch_size : (rank + 1) * batch_size]
        weight = weigh_part([self._n_learned[i] for i in windows], rank, world_size)
        return collate([self.windows[i] for i in mine])._replace(weight=weight)

    def _window(self, position: int) -> int:
        """Which window comes at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, len(self))
        if epoch not in self._orders:
            random = np.random.default_rng([self.seed, epoch])
            self._orders = {epoch: random.permutation(len(self))}
        return int(self._orders[epoch][place])


def separate_samples(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and mask that keep the dialogues of a window apart.

    Each dialogue then gives what it gives alone: its positions start at 0, and its
    tokens see only each other.

    Args:
        samples: see `DialogBatch`, (B, T).

    Returns:
        Positions (B, T) and mask (B, 1, T, T), for the model.
    """
    place = torch.arange(samples.shape[1], device=samples.device).expand_as(samples)
    is_first = torch.ones_like(samples, dtype=torch.bool)
    is_first[:, 1:] = samples[:, 1:] != samples[:, :-1]
    start = torch.where(is_first, place, 0).cummax(1).values  # (B, T)
    same = samples[:, :, None] == samples[:, None, :]  # (B, T, T)
    return place - start, same.tril()[:, None]


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    dialogs: Sequence[Dialog],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    keep_cut: bool = True,
) -> list[str]:
    """Answer dialogues that end with the user.

    The noise of an answer depends on the seed and on its dialogue's number in the
    list, not on the batch: dialogues of like length share one.

    Args:
        max_new_tokens: an answer without an end is cut there.
        temperature, top_p, seed: see `llama2_lite.generation.generate`.
        batch_size: dialogues answered at a time.
        keep_cut: if not, an answer that was cut is empty.

    Raises:
        ValueError: if a dialogue is refused, ends with the assistant, or is too long.
    """
    for number, dialog in enumerate(dialogs):
        if dialog and dialog[-1]["role"] != "user":
            raise ValueError(f"dialogue {number} does not end with the user")
    prompts = [encode_dialog(dialog, tokenizer).ids for dialog in dialogs]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        generation = generate(
            model,
            [prompts[i] for i in rows],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_ids=[tokenizer.eos_id],
            seed=seed,
            rows=rows,
        )
        for row, ids, ended in zip(
            rows, generation.ids, generation.finished, strict=True
        ):
            if ended or keep_cut:
                answers[row] = tokenizer.decode(ids).strip()
    return answers
