"""Ghost Attention.

Exported from book/16_ghost_attention.md, which explains every part. Edit it there,
then `make export`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llama2_lite.chat import Dialog, answer, check_dialog, encode_dialog, weigh_part
from llama2_lite.generation import generate
from llama2_lite.layers import apply_rope
from llama2_lite.model import Llama
from llama2_lite.pretraining import vocabulary_loss
from llama2_lite.sft import SupervisedModule
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import SystemInstruction, Task


def split_turns(dialog: Dialog) -> list[Dialog]:
    """A dialogue without a system message as its turns: a request, and the reply.

    Raises:
        ValueError: if the dialogue is refused (see `check_dialog`), or has a system
            message, where there can be only one.
    """
    check_dialog(dialog)
    if dialog[0]["role"] == "system":
        raise ValueError(
            "the dialogue has a system message already; an instruction would replace it"
        )
    return [dialog[i : i + 2] for i in range(0, len(dialog), 2)]


def join_turns(turns: Sequence[Dialog]) -> Dialog:
    """The inverse of `split_turns`."""
    return [message for turn in turns for message in turn]


def instruct_every_turn(dialog: Dialog, instruction: str) -> list[Dialog]:
    """Add an instruction to every request (paper, §3.3).

    Llama 2's format writes each turn separately, and only the first can have a system
    message. So this returns one dialogue for each turn; their tokens in a row are those
    of the whole dialogue with the instruction at every turn.

    Raises:
        ValueError: see `split_turns`.
    """
    system = {"role": "system", "content": instruction}
    return [[system, *turn] for turn in split_turns(dialog)]


def train_first_turn_only(dialog: Dialog, instruction: str) -> Dialog:
    """The same dialogue as it is trained on: told once, at the beginning.

    Raises:
        ValueError: see `split_turns`.
    """
    split_turns(dialog)
    return [{"role": "system", "content": instruction}, *dialog]


def combine(instructions: Sequence[SystemInstruction]) -> SystemInstruction:
    """One instruction that asks for several things at a time (paper, §3.3)."""
    patterns = ""
    example = "{answer}"
    # capitals last, so that what the others add is in capitals too
    for one in sorted(instructions, key=lambda one: "{ANSWER}" in one.example):
        pattern = re.sub(r"^\(\?i\)(.*)$", r"(?i:\1)", one.pattern)
        patterns += rf"(?=[\s\S]*?(?:{pattern}))"
        if "{ANSWER}" in one.example:
            head, _, tail = example.partition("{answer}")
            example = f"{head.upper()}{{ANSWER}}{tail.upper()}"
        else:
            example = one.example.replace("{answer}", example)
    text = " ".join(one.text for one in instructions)
    short = " ".join(one.short for one in instructions)
    return SystemInstruction(text, short, rf"\A{patterns}", example)


def deal_instructions(
    instructions: Sequence[SystemInstruction], combined: float, random: Random
) -> Iterator[SystemInstruction]:
    """Deal instructions without end, like cards, so that all come equally often.

    A share of them comes with a second one of another kind. The kind is what stands
    before the colon of the short form: "Hobby: chess." is a hobby.
    """

    def kind(one: SystemInstruction) -> str:
        return one.short.partition(":")[0]

    while True:
        for one in random.sample(list(instructions), len(instructions)):
            others = [other for other in instructions if kind(other) != kind(one)]
            if others and random.random() < combined:
                one = combine([one, random.choice(others)])
            yield one


# How often a question is of a kind: short ones more often, so that many turns fit.
KINDS = {"fact": 4, "sum": 4, "opposite": 3, "unsafe": 2}
KINDS |= {"list": 1, "howto": 1, "borderline": 1, "story": 1}


def draw_tasks(tasks: Sequence[Task], n: int, random: Random) -> list[Task]:
    """Draw requests, of each kind as often as ``KINDS`` says."""
    by_kind: dict[str, list[Task]] = {}
    for task in tasks:
        by_kind.setdefault(task.kind, []).append(task)
    weights = [KINDS[kind] for kind in by_kind]
    kinds = random.choices(list(by_kind), weights, k=n)
    return [random.choice(by_kind[kind]) for kind in kinds]


def chat_about(
    model: Llama,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    n_dialogs: int,
    n_turns: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Dialog]:
    """Make dialogues of requests that a model answers, each of them by itself.

    Requests of the town do not depend on each other, so that a turn needs no history
    (our choice: the paper has people's dialogues).
    """
    random = Random(f"chat {seed}")
    drawn = draw_tasks(tasks, n_dialogs * n_turns, random)
    prompts = [task.dialog() for task in drawn]
    answers = answer(
        model,
        tokenizer,
        prompts,
        temperature=temperature,
        seed=seed,
    )
    turns = [
        task.dialog(text or "...") for task, text in zip(drawn, answers, strict=True)
    ]
    return [join_turns(turns[i : i + n_turns]) for i in range(0, len(turns), n_turns)]


class GhostDialog(NamedTuple):
    """A dialogue, and what a model replies that is told an instruction at every turn.

    Attributes:
        instruction: the system message; empty for none.
        dialog: user and assistant in turn; the assistant was told nothing.
        replies: one for each turn; None where it did not obey.
    """

    instruction: str
    dialog: Dialog
    replies: list[str | None]


def draw_replies(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    checks: Sequence[Callable[[str], bool]],
    *,
    draws: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[str | None]:
    """Reply to each prompt; what fails its check is drawn again, or None at the end.

    An empty reply fails, and so does one without an end.
    """
    replies: list[str | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for draw in range(draws):
        waiting = [row for row in order if replies[row] is None]
        for start in range(0, len(waiting), batch_size):
            rows = waiting[start : start + batch_size]
            drawn = generate(
                model,
                [prompts[row] for row in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_ids=[tokenizer.eos_id],
                seed=seed + 7919 * draw,
                rows=rows,
            )
            for row, ids, ended in zip(rows, drawn.ids, drawn.finished, strict=True):
                reply = tokenizer.decode(ids).strip()
                if ended and reply and checks[row](reply):
                    replies[row] = reply
    return replies


def build_dialogs(
    model: Llama,
    tokenizer: Tokenizer,
    dialogs: Sequence[Dialog],
    instructions: Sequence[SystemInstruction],
    *,
    combined: float = 0.2,
    plain: float = 0.1,
    context: int | None = None,
    draws: int = 2,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[GhostDialog]:
    """Give each dialogue an instruction, and sample replies that obey it.

    Half of the instructions are given in their short form (paper, §3.3).

    Args:
        model: samples the replies; it has to obey what it is told in the same turn.
        dialogs: without system messages, each ending with the assistant.
        instructions: one or two of them go to each dialogue.
        combined: share of the instructed dialogues that have two.
        plain: share of dialogues without instruction, whose own answers are the
            replies, so that what is not asked for is not learned.
        context: how many turns, the current one too, the model sees when it replies;
            all if left out.
        draws: how often to draw a reply, at most, until one obeys.
        max_new_tokens: a reply without an end is not used.

    Raises:
        ValueError: see `split_turns`; or if a dialogue does not end with the assistant.
    """
    random = Random(f"ghost {seed}")
    dealt = deal_instructions(instructions, combined, random)
    made: list[GhostDialog] = []
    prompts: list[list[int]] = []
    asked: list[tuple[int, int, SystemInstruction]] = []
    for number, dialog in enumerate(dialogs):
        turns = split_turns(dialog)
        if len(turns[-1]) == 1:
            raise ValueError(f"dialogue {number} does not end with the assistant")
        if random.random() < plain:
            made.append(GhostDialog("", dialog, [turn[1]["content"] for turn in turns]))
            continue
        instruction = next(dealt)
        text = instruction.short if random.random() < 0.5 else instruction.text
        made.append(GhostDialog(text, dialog, [None] * len(turns)))
        told = instruct_every_turn(dialog, text)
        encoded = [encode_dialog(turn, tokenizer).ids for turn in told]
        for k in range(len(turns)):
            first = 0 if context is None else max(0, k + 1 - context)
            ids = encode_dialog(told[k][:-1], tokenizer).ids
            prompts.append([id for turn in encoded[first:k] for id in turn] + ids)
            asked.append((number, k, instruction))
    checks = [instruction.check for *_, instruction in asked]
    replies = draw_replies(
        model,
        tokenizer,
        prompts,
        checks,
        draws=draws,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    for (number, k, _), reply in zip(asked, replies, strict=True):
        made[number].replies[k] = reply
    return made


class Turn(NamedTuple):
    """A turn as tokens: the request, the dialogue's answer, and the reply to learn."""

    request: list[int]
    answer: list[int]
    reply: list[int] | None


def encode_ghost(
    ghost: GhostDialog, tokenizer: Tokenizer, length: int
) -> Iterator[Turn]:
    """Encode the turns of a dialogue, told once, as long as they fit."""
    room = length
    for number, turn in enumerate(split_turns(ghost.dialog)):
        if number == 0 and ghost.instruction:
            turn = train_first_turn_only(turn, ghost.instruction)
        *request, said = turn
        n_request = len(encode_dialog(request, tokenizer).ids)
        ids, reply = encode_dialog(turn, tokenizer).ids, None
        if (text := ghost.replies[number]) is not None:
            told = [*request, {**said, "content": text}]
            reply = encode_dialog(told, tokenizer).ids[n_request:]
        room -= max(len(ids), n_request + len(reply or []))
        if room < 0:
            return
        yield Turn(ids[:n_request], ids[n_request:], reply)


class Tree(NamedTuple):
    """A dialogue and its branches in one row of tokens.

    Attributes:
        ids: of the dialogue, then of each branch.
        learn: whether the model should learn to write a token.
        positions: of a token in its own dialogue.
        branches: 0 for the dialogue, then 1, 2, ...
        forks: how many tokens of the dialogue a token's own dialogue begins with.
    """

    ids: list[int]
    learn: list[bool]
    positions: list[int]
    branches: list[int]
    forks: list[int]


def grow_tree(turns: Sequence[Turn], keep_reply: Sequence[bool]) -> Tree:
    """Lay the turns of a dialogue out, with each reply in it or on a branch.

    Args:
        turns: from `encode_ghost`.
        keep_reply: for each turn whether the dialogue goes on from the reply, and not
            from the answer that was told nothing.
    """
    ids: list[int] = []
    learn: list[bool] = []
    branches: list[tuple[int, list[int]]] = []
    for turn, keep in zip(turns, keep_reply, strict=True):
        ids += turn.request
        learn += [False] * len(turn.request)
        is_kept = keep and turn.reply is not None
        if turn.reply is not None and not is_kept:
            branches.append((len(ids), turn.reply))
        said = turn.reply if is_kept and turn.reply else turn.answer
        ids += said
        learn += [is_kept] * len(said)
    n = len(ids)
    tree = Tree(ids, learn, list(range(n)), [0] * n, [n] * n)
    for number, (fork, reply) in enumerate(branches, 1):
        tree.ids.extend(reply)
        tree.learn.extend([True] * len(reply))
        tree.positions.extend(range(fork, fork + len(reply)))
        tree.branches.extend([number] * len(reply))
        tree.forks.extend([fork] * len(reply))
    return tree


class GhostBatch(NamedTuple):
    """Trees as a batch, each (B, T), padded behind; see `Tree`.

    Its weight is that of this part of a step's batch, see `weigh_part`.
    """

    tokens: Tensor
    loss_mask: Tensor
    positions: Tensor
    branches: Tensor  # -1 for padding
    forks: Tensor
    weight: float = 1.0


def collate_trees(trees: Sequence[Tree]) -> GhostBatch:
    """Lay trees out as tensors."""
    shape = (len(trees), max(len(tree.ids) for tree in trees))
    batch = [np.zeros(shape, dtype=np.int64) for _ in Tree._fields]
    batch[3] -= 1
    for row, tree in enumerate(trees):
        for columns, values in zip(batch, tree, strict=True):
            columns[row, : len(tree.ids)] = np.asarray(values)
    tokens, learn, places, branches, forks = map(torch.from_numpy, batch)
    return GhostBatch(tokens, learn.bool(), places, branches, forks)


def tree_mask(batch: GhostBatch) -> Tensor:
    """Who sees whom, (B, 1, T, T): a branch sees itself, and what it grows from."""
    branches, place = batch.branches, torch.arange(batch.tokens.shape[1])
    is_own = branches[:, :, None] == branches[:, None, :]  # (B, T, T)
    is_trunk = branches[:, None, :] == 0
    is_before = place.to(branches.device) < batch.forks[:, :, None]
    return (is_own | is_trunk & is_before).tril()[:, None]


def predecessors(batch: GhostBatch) -> Tensor:
    """Where the token before each token stands, (B, T)."""
    branches = batch.branches
    place = torch.arange(branches.shape[1], device=branches.device)
    before = (place - 1).expand_as(branches)
    is_first = torch.zeros_like(batch.loss_mask)
    is_first[:, 1:] = (branches[:, 1:] != branches[:, :-1]) & (branches[:, 1:] > 0)
    return torch.where(is_first, batch.forks - 1, before)


class GhostDataset:
    """Dialogues as trees, in a new order and shape in each epoch.

    In each dialogue another share of the replies, from none to all, stands in the
    dialogue itself; the others are on branches.

    Args:
        dialogs: from `build_dialogs`.
        tokenizer: of the model.
        sequence_length: of a dialogue without its branches; later turns are left out.
        seed: of orders and shapes.

    Raises:
        ValueError: if nothing is to be learned.
    """

    def __init__(
        self,
        dialogs: Sequence[GhostDialog],
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        seed: int = 0,
    ):
        encoded = [list(encode_ghost(d, tokenizer, sequence_length)) for d in dialogs]
        self.dialogs = [
            turns for turns in encoded if any(turn.reply is not None for turn in turns)
        ]
        if not self.dialogs:
            raise ValueError(
                "there is no dialogue with a reply to learn: either none obeys, or "
                f"no first turn fits into {sequence_length} tokens"
            )
        self.sequence_length = sequence_length
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}
        self.n_tokens = sum(
            len(turn.request) + len(turn.answer)
            for turns in self.dialogs
            for turn in turns
        )

    def __len__(self) -> int:
        """Dialogues in an epoch."""
        return len(self.dialogs)

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> GhostBatch:
        """The dialogues of one process at one step; seed and arguments say which."""
        first = step * world_size * batch_size
        counts = [
            sum(len(turn.reply or []) for turn in self._turns(first + i)[0])
            for i in range(world_size * batch_size)
        ]
        mine = range(first + rank * batch_size, first + (rank + 1) * batch_size)
        batch = collate_trees([self._tree(position) for position in mine])
        return batch._replace(weight=weigh_part(counts, rank, world_size))

    def _turns(self, position: int) -> tuple[list[Turn], int, int]:
        """A dialogue by its place in all epochs, with its epoch and place there."""
        epoch, place = divmod(position, len(self))
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            self._orders = {epoch: order}
        return self.dialogs[self._orders[epoch][place]], epoch, place

    def _tree(self, position: int) -> Tree:
        """What comes at a position of the endless sequence of epochs."""
        turns, epoch, place = self._turns(position)
        random = np.random.default_rng([self.seed, epoch, place])
        keep_reply = random.random(len(turns)) < random.random()
        return grow_tree(turns, keep_reply.tolist())


class GhostAttentionModule(SupervisedModule):
    """A Llama that learns to keep to what it was told in the first turn.

    Each reply is learned as the last one of a dialogue of its own; see `Tree`.
    """

    def loss(self, batch: GhostBatch) -> Tensor:  # type: ignore[override]
        """Mean loss of the replies' tokens."""
        hidden = self.model(
            batch.tokens, batch.positions, tree_mask(batch), return_hidden=True
        )
        rows, places = batch.loss_mask.nonzero(as_tuple=True)
        hidden = hidden[rows, predecessors(batch)[rows, places]]
        targets = batch.tokens[rows, places]
        return vocabulary_loss(hidden, self.model.output.weight, targets)


class Visit(NamedTuple):
    """An instruction, and requests for a dialogue in which it should hold."""

    instruction: SystemInstruction
    tasks: list[Task]


def plan_visits(
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    instructions: Sequence[SystemInstruction],
    n_dialogs: int,
    n_turns: int,
    length: int,
    seed: int = 0,
) -> list[Visit]:
    """Draw requests so that the whole dialogue, well answered, fits into a length.

    Instructions come equally often.

    Raises:
        ValueError: if hardly any draw is short enough.
    """
    random = Random(f"visits {seed}")
    visits: list[Visit] = []
    for number in range(n_dialogs):
        instruction = instructions[number % len(instructions)]
        for _ in range(1000):
            drawn = draw_tasks(tasks, n_turns, random)
            turns = [task.dialog(instruction.apply(task.reference)) for task in drawn]
            said = join_turns(turns)
            told = train_first_turn_only(said, instruction.text)
            if len(encode_dialog(told, tokenizer).ids) <= length:
                visits.append(Visit(instruction, drawn))
                break
        else:
            raise ValueError(
                f"{n_turns} turns hardly ever fit into {length} tokens; ask for "
                "fewer, or of kinds with shorter answers"
            )
    return visits


def converse(
    model: Llama,
    tokenizer: Tokenizer,
    visits: Sequence[Visit],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[str]]:
    """Hold the dialogues, told once, the model's own answers becoming its history.

    Returns:
        The answers of each dialogue. One that fills the context ends early.
    """
    dialogs: list[Dialog] = [
        [{"role": "system", "content": visit.instruction.text}] for visit in visits
    ]
    answers: list[list[str]] = [[] for _ in visits]
    limit = model.config.max_seq_len - max_new_tokens
    for k in range(max(len(visit.tasks) for visit in visits)):
        going = []
        for row, (visit, dialog) in enumerate(zip(visits, dialogs, strict=True)):
            if len(answers[row]) == k < len(visit.tasks):
                dialog.append({"role": "user", "content": visit.tasks[k].prompt})
                if len(encode_dialog(dialog, tokenizer).ids) <= limit:
                    going.append(row)
        texts = answer(
            model,
            tokenizer,
            [dialogs[row] for row in going],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + 7919 * k,
            batch_size=batch_size,
        )
        for row, text in zip(going, texts, strict=True):
            answers[row].append(text)
            dialogs[row].append({"role": "assistant", "content": text or "..."})
    return answers


def count_obeyed(
    visits: Sequence[Visit], answers: Sequence[Sequence[str]]
) -> list[tuple[int, int]]:
    """For each turn: how many answers obeyed, and how many dialogues got there."""
    obeyed = [
        [visit.instruction.check(text) for text in texts]
        for visit, texts in zip(visits, answers, strict=True)
    ]
    n_turns = max(map(len, obeyed))
    reached = [[row[k] for row in obeyed if len(row) > k] for k in range(n_turns)]
    return [(sum(checks), len(checks)) for checks in reached]


@torch.no_grad()
def strongest_attention(model: Llama, ids: Sequence[int]) -> Tensor:
    """The largest weight of all layers and heads, from each token to each, (T, T)."""
    inputs: list[tuple[Any, tuple[Tensor, ...]]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append((module, args))

    layers: list[Any] = list(model.layers)
    hooks = [layer.attention.register_forward_pre_hook(note) for layer in layers]
    tokens = torch.tensor([ids], device=model.norm.weight.device)
    model(tokens, return_hidden=True)
    for hook in hooks:
        hook.remove()
    n_tokens = len(ids)
    strongest = torch.zeros(n_tokens, n_tokens, device=tokens.device)
    future = torch.ones_like(strongest, dtype=torch.bool).triu(1)
    for attention, (x, cos, sin, *_) in inputs:
        heads = (1, n_tokens, -1, attention.head_dim)
        q = apply_rope(attention.wq(x).view(heads), cos, sin).transpose(1, 2)
        k = apply_rope(attention.wk(x).view(heads), cos, sin).transpose(1, 2)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.mT)[0].float() * attention.head_dim**-0.5  # (H, T, T)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        strongest = torch.maximum(strongest, weights.amax(0))
    return strongest
