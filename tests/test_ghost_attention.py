"""Chapter 16: dialogues told once, branches, adherence, and where a model looks."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningDataModule, Trainer
from lightning.pytorch import Callback

import llama2_lite.ghost_attention as ghost_attention
from llama2_lite.chat import Dialog, encode_dialog
from llama2_lite.generation import Generation
from llama2_lite.ghost_attention import (
    GhostAttentionModule,
    GhostBatch,
    GhostDataset,
    GhostDialog,
    Turn,
    Visit,
    build_dialogs,
    chat_about,
    collate_trees,
    combine,
    converse,
    count_obeyed,
    encode_ghost,
    grow_tree,
    instruct_every_turn,
    plan_visits,
    predecessors,
    split_turns,
    strongest_attention,
    train_first_turn_only,
    tree_mask,
)
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import MixedLengthLoader, next_token_loss
from llama2_lite.runtime.training import TRAINER_DEFAULTS
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import (
    SystemInstruction,
    Town,
    build_town,
    system_instructions,
)

CAPITALS, INDEED, *_ = system_instructions("train")
ANYTHING = SystemInstruction("Be kind.", "Kind.", "", "{answer}")


@pytest.fixture(scope="module")
def town() -> Town:
    return build_town(n_people=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, town: Town) -> Path:
    """A random model with two key-value heads for four, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    texts = [document.text for document in town.documents(300)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 400)
    torch.manual_seed(0)
    config = LlamaConfig(32, 2, 4, 2, 400, hidden_dim=48, max_seq_len=256)
    Llama(config).save_pretrained(folder / "base", tokenizer)
    return folder / "base"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Llama:
    return Llama.from_pretrained(folder)


def say(*contents: str) -> Dialog:
    """A dialogue that the user begins."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def ghost_dialogs(n_dialogs: int = 5, seed: int = 0) -> list[GhostDialog]:
    """Dialogues of three to five turns, some without a reply to learn."""
    random = Random(seed)
    made = []
    for number in range(n_dialogs):
        n_turns = random.randint(3, 5)
        texts = [f"{word} {number}" for word in ("Who", "A cat")]
        dialog = say(*(f"{texts[i % 2]} {i}?" for i in range(2 * n_turns)))
        replies = [
            random.choice([None, f"INDEED {k} {number}"]) for k in range(n_turns)
        ]
        replies[0] = "INDEED."
        made.append(GhostDialog("" if number == 2 else "Shout.", dialog, replies))
    return made


# Two ways to write one dialogue


def test_told_at_every_turn_is_the_instruction_in_every_request(tokenizer):
    dialog = say("Who?", "Tom.", "Where?", "Home.", "When?")
    turns = instruct_every_turn(dialog, "Shout.")
    ids = [id for turn in turns for id in encode_dialog(turn, tokenizer).ids]
    text = "[INST] <<SYS>>\nShout.\n<</SYS>>\n\n{} [/INST]"
    expected = []
    for request, reply in (("Who?", "Tom."), ("Where?", "Home.")):
        said = f"{text.format(request)} {reply} "
        expected += tokenizer.encode(said, bos=True, eos=True)
    expected += tokenizer.encode(text.format("When?"), bos=True)
    assert ids == expected


def test_told_once_is_a_system_message(tokenizer):
    dialog = say("Who?", "Tom.", "Where?", "Home.")
    once = train_first_turn_only(dialog, "Shout.")
    assert once[0] == {"role": "system", "content": "Shout."}
    assert once[1:] == dialog
    every = instruct_every_turn(dialog, "Shout.")
    first, second = (encode_dialog(turn, tokenizer).ids for turn in every)
    rest = encode_dialog(dialog[2:], tokenizer).ids
    assert encode_dialog(once, tokenizer).ids == first + rest
    assert rest != second


@pytest.mark.parametrize("function", [instruct_every_turn, train_first_turn_only])
def test_a_second_system_message_is_refused(function):
    dialog = [{"role": "system", "content": "Whisper."}, *say("Who?", "Tom.")]
    with pytest.raises(ValueError, match="has a system message already"):
        function(dialog, "Shout.")
    with pytest.raises(ValueError, match="take turns"):
        function(say("Who?", "Tom.")[::-1], "Shout.")


@given(st.integers(1, 9))
def test_splitting_loses_nothing(n_messages):
    dialog = say(*map(str, range(n_messages)))
    turns = split_turns(dialog)
    assert [message for turn in turns for message in turn] == dialog
    assert len(turns) == (n_messages + 1) // 2


def test_combined_instructions_ask_for_both():
    both = combine([CAPITALS, INDEED])
    assert both.text == f"{CAPITALS.text} {INDEED.text}"
    assert both.short == f"{CAPITALS.short} {INDEED.short}"
    assert both.check("A BAKER. INDEED.")
    assert not both.check("A baker. Indeed.")
    assert not both.check("A BAKER.")
    assert both.apply("A baker {x}.") == "A BAKER {X}. INDEED."


def test_every_pair_of_instructions_can_be_obeyed_and_is_checked():
    instructions = system_instructions("train")
    for i, one in enumerate(instructions):
        for other in instructions[i + 1 :]:
            both = combine([one, other])
            reply = both.apply("Tom is a baker.")
            assert both.check(reply) == (one.check(reply) and other.check(reply))
            assert not both.check("Tom is a baker.")
            for half in (one, other):
                text = half.apply("Tom is a baker.")
                assert both.check(text) == (one.check(text) and other.check(text))


# Dialogues


def test_dialogues_are_made_of_requests_and_the_models_answers(model, tokenizer, town):
    tasks = town.tasks("train")
    dialogs = chat_about(model, tokenizer, tasks, 3, 4, seed=1)
    assert dialogs == chat_about(model, tokenizer, tasks, 3, 4, seed=1)
    assert dialogs != chat_about(model, tokenizer, tasks, 3, 4, seed=2)
    prompts = {task.prompt for task in tasks}
    assert [len(split_turns(dialog)) for dialog in dialogs] == [4, 4, 4]
    for dialog in dialogs:
        assert all(message["content"] in prompts for message in dialog[::2])


def scripted(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, texts: list[str]):
    """Let the model reply with these texts, one for each row; note its prompts."""
    prompts: dict[int, list[int]] = {}

    def fake(model: Any, ids: Any, *, rows: Any, **options: Any) -> Generation:
        prompts.update(zip(rows, ids, strict=True))
        replies = [tokenizer.encode(texts[row % len(texts)]) for row in rows]
        finished = ["cut" not in texts[row % len(texts)] for row in rows]
        return Generation(replies, [[]] * len(rows), finished)

    monkeypatch.setattr(ghost_attention, "generate", fake)
    return prompts


def test_only_finished_replies_that_obey_are_kept(model, tokenizer, monkeypatch):
    texts = ["HELLO.", "Hello.", "HELLO cut", "", "A1"]
    scripted(monkeypatch, tokenizer, texts)
    dialog = say(*("Who?", "Tom.") * 5)
    (made,) = build_dialogs(
        model, tokenizer, [dialog], [CAPITALS], plain=0, combined=0, batch_size=2
    )
    assert made.replies == ["HELLO.", None, None, None, "A1"]
    assert made.dialog == dialog
    assert made.instruction in (CAPITALS.text, CAPITALS.short)


def test_a_reply_that_does_not_obey_is_drawn_again(model, tokenizer, monkeypatch):
    asked: list[list[int]] = []

    def fake(model: Any, ids: Any, *, rows: Any, seed: int, **_: Any) -> Generation:
        later = bool(asked)
        asked.append(sorted(rows))
        texts = [
            "LATER." if later and row == 1 else ("NOW.", "no")[row % 2] for row in rows
        ]
        return Generation(
            [tokenizer.encode(text) for text in texts],
            [[]] * len(rows),
            [True] * len(rows),
        )

    monkeypatch.setattr(ghost_attention, "generate", fake)
    dialog = say(*("Who?", "Tom.") * 4)
    (made,) = build_dialogs(
        model, tokenizer, [dialog], [CAPITALS], plain=0, combined=0, draws=3
    )
    assert made.replies == ["NOW.", "LATER.", "NOW.", None]
    assert asked == [[0, 1, 2, 3], [1, 3], [3]]


@pytest.mark.parametrize("context", [None, 1, 2])
def test_the_sampler_is_told_at_every_turn(model, tokenizer, monkeypatch, context):
    prompts = scripted(monkeypatch, tokenizer, ["Yes."])
    dialog = say("Who?", "Tom.", "Where?", "Home.", "When?", "Now.")
    (made,) = build_dialogs(
        model, tokenizer, [dialog], [ANYTHING], plain=0, combined=0, context=context
    )
    assert made.replies == ["Yes."] * 3
    told = instruct_every_turn(dialog, made.instruction)
    for k in range(3):
        first = 0 if context is None else max(0, k + 1 - context)
        turns = [*told[first:k], told[k][:-1]]
        ids = [id for turn in turns for id in encode_dialog(turn, tokenizer).ids]
        assert prompts[k] == ids


def test_instructions_are_shortened_combined_or_left_out(model, tokenizer, monkeypatch):
    scripted(monkeypatch, tokenizer, ["YES. INDEED. FRIEND."])
    dialogs = [say(f"Who {i}?", "Tom.") for i in range(400)]
    friend = system_instructions("train")[2]
    all_three = [CAPITALS, INDEED, friend]
    made = build_dialogs(model, tokenizer, dialogs, all_three, plain=0.25, combined=0.5)
    plain = [ghost for ghost in made if not ghost.instruction]
    assert 70 < len(plain) < 130
    assert all(ghost.replies == ["Tom."] for ghost in plain)
    told = [ghost.instruction for ghost in made if ghost.instruction]
    singles = {one.text for one in all_three} | {one.short for one in all_three}
    assert 0.4 < sum(text in singles for text in told) / len(told) < 0.6
    short = sum(":" in text for text in told) / len(told)
    assert 0.4 < short < 0.6
    again = build_dialogs(
        model, tokenizer, dialogs, all_three, plain=0.25, combined=0.5
    )
    assert again == made


def test_a_dialogue_without_a_last_answer_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="dialogue 1 does not end with the assistant"):
        build_dialogs(
            model, tokenizer, [say("Who?", "Tom."), say("Who?")], [CAPITALS], plain=1
        )


# A dialogue and its branches


def test_turns_are_encoded_as_far_as_they_fit(tokenizer):
    dialog = say("Who?", "Tom.", "Where?", "Home.")
    ghost = GhostDialog("Shout.", dialog, ["TOM.", None])
    turns = list(encode_ghost(ghost, tokenizer, 1000))
    ids = encode_dialog(train_first_turn_only(dialog, "Shout."), tokenizer).ids
    assert [id for turn in turns for id in turn.request + turn.answer] == ids
    told = train_first_turn_only(say("Who?", "TOM."), "Shout.")
    assert turns[0].request + turns[0].reply == encode_dialog(told, tokenizer).ids
    assert turns[1].reply is None
    first = len(turns[0].request) + max(len(turns[0].answer), len(turns[0].reply))
    second = len(turns[1].request) + len(turns[1].answer)
    for length, expected in ((first + second, 2), (first + second - 1, 1), (first, 1)):
        assert len(list(encode_ghost(ghost, tokenizer, length))) == expected
    assert not list(encode_ghost(ghost, tokenizer, first - 1))


def test_a_tree_by_hand():
    turns = [Turn([5, 6], [7], [8, 9]), Turn([1], [2, 3], None), Turn([4], [4], [6])]
    tree = grow_tree(turns, [False, True, True])
    assert tree.ids == [5, 6, 7, 1, 2, 3, 4, 6, 8, 9]
    assert tree.learn == [False] * 7 + [True] * 3
    assert tree.positions == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3]
    assert tree.branches == [0] * 8 + [1, 1]
    assert tree.forks == [8] * 8 + [2, 2]
    batch = collate_trees([tree, grow_tree(turns[:1], [True])])
    assert batch.tokens.shape == (2, 10)
    assert batch.branches[1].tolist() == [0, 0, 0, 0, *[-1] * 6]
    mask = tree_mask(batch)[:, 0]
    assert mask[0, 8].nonzero().flatten().tolist() == [0, 1, 8]
    assert mask[0, 9].nonzero().flatten().tolist() == [0, 1, 8, 9]
    assert mask[0, :8, :8].equal(torch.ones(8, 8, dtype=torch.bool).tril())
    assert not mask[0, :8, 8:].any()
    assert mask.any(-1).all()  # a softmax over nothing would be NaN
    assert predecessors(batch)[0].tolist()[1:] == [0, 1, 2, 3, 4, 5, 6, 1, 8]


def loss_one_by_one(model: Llama, trees: list[tuple[list[Turn], list[bool]]]):
    """The last reply of each beginning of each dialogue, without trees."""
    total, n_tokens = torch.zeros(()), 0
    for turns, keep in trees:
        history: list[int] = []
        for turn, is_kept in zip(turns, keep, strict=True):
            history = history + turn.request
            if turn.reply is not None:
                ids = torch.tensor([history + turn.reply])
                logits = model(ids)[:, len(history) - 1 : -1]
                targets = ids[:, len(history) :]
                total = total + next_token_loss(logits, targets) * targets.numel()
                n_tokens += targets.numel()
            said = turn.reply if is_kept and turn.reply else turn.answer
            history = history + said
    return total / n_tokens


def gradients(model: Llama, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_a_tree_is_its_dialogues_one_by_one(folder, tokenizer, seed):
    module = GhostAttentionModule(folder)
    module.configure_model()
    random = Random(seed)
    trees = []
    for ghost in ghost_dialogs(3, seed):
        turns = list(encode_ghost(ghost, tokenizer, 200))
        trees.append((turns, [random.random() < 0.5 for _ in turns]))
    loss = module.loss(collate_trees([grow_tree(*tree) for tree in trees]))
    expected = loss_one_by_one(module.model, trees)
    torch.testing.assert_close(loss, expected)
    pairs = zip(
        gradients(module.model, loss), gradients(module.model, expected), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_earlier_answers_and_padding_are_not_learned(folder, tokenizer):
    module = GhostAttentionModule(folder)
    module.configure_model()
    turns = [list(encode_ghost(g, tokenizer, 200)) for g in ghost_dialogs(2)]
    trees = [grow_tree(t, [False] * len(t)) for t in turns]
    batch = collate_trees(trees)
    n_replies = sum(len(turn.reply or []) for t in turns for turn in t)
    assert int(batch.loss_mask.sum()) == n_replies
    for tree, ghost in zip(turns, ghost_dialogs(2), strict=True):
        assert len(tree) == len(ghost.replies)
    padded = GhostBatch(
        *(
            torch.nn.functional.pad(x, (0, 7), value=-1 if i == 3 else 0)
            for i, x in enumerate(batch[:5])
        )
    )
    torch.testing.assert_close(module.loss(padded), module.loss(batch))
    other = batch._replace(tokens=batch.tokens.clone())
    other.tokens[:, 5] = 17  # of the instruction
    assert torch.equal(other.loss_mask, batch.loss_mask)
    assert module.loss(other) != module.loss(batch)


def test_batches_are_a_function_of_the_step(tokenizer):
    dialogs = ghost_dialogs()
    data = GhostDataset(dialogs, tokenizer, 200, seed=3)
    again = GhostDataset(dialogs, tokenizer, 200, seed=3)
    for step in (7, 0, 3):
        whole = data.batch(step, 4)
        for ours, theirs in zip(whole[:5], again.batch(step, 4)[:5], strict=True):
            assert ours.equal(theirs)
        halves = [data.batch(step, 2, rank, 2) for rank in range(2)]
        for row in range(4):
            part, width = halves[row // 2], halves[row // 2].tokens.shape[1]
            width = min(width, whole.tokens.shape[1])
            assert part.tokens[row % 2, :width].equal(whole.tokens[row, :width])
        learned = [int(half.loss_mask.sum()) for half in halves]
        for half, n_mine in zip(halves, learned, strict=True):
            assert half.weight == 2 * n_mine / sum(learned)
    epochs = [
        sorted(int(data.batch(e * 5 + i, 1).loss_mask.sum()) for i in range(5))
        for e in range(2)
    ]
    assert epochs[0] == epochs[1]  # each reply once, on a branch or not
    shapes = {tuple(data.batch(5 * e, 5).branches.amax(1).tolist()) for e in range(6)}
    assert len(shapes) > 1


def test_nothing_to_learn_is_refused(tokenizer):
    dialog = say("Who?", "Tom.")
    with pytest.raises(ValueError, match="no dialogue with a reply to learn"):
        GhostDataset([GhostDialog("Shout.", dialog, [None])], tokenizer, 200)
    with pytest.raises(ValueError, match="no dialogue with a reply to learn"):
        GhostDataset([GhostDialog("Shout.", dialog, ["TOM."])], tokenizer, 5)


class Data(LightningDataModule):
    """Serves a dataset to a trainer."""

    def __init__(self, dataset: Any):
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self) -> MixedLengthLoader:
        return MixedLengthLoader([self.dataset], [1.0], [2])


class StopAt(Callback):
    """Saves a checkpoint after some steps, and stops."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_training_learns_and_resumes_exactly(folder, tokenizer, tmp_path):
    def train(n_steps: int, checkpoint: Path | None = None):
        module = GhostAttentionModule(folder, peak_lr=1e-2)
        data = Data(GhostDataset(ghost_dialogs(), tokenizer, 200))
        quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
        trainer = Trainer(max_steps=12, **(TRAINER_DEFAULTS | quiet))
        if n_steps < 12:
            trainer.callbacks.append(StopAt(n_steps, tmp_path / "half.ckpt"))
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module

    batch = GhostDataset(ghost_dialogs(), tokenizer, 200).batch(0, 5)
    before = GhostAttentionModule(folder)
    before.configure_model()
    whole = train(12)
    assert whole.loss(batch) < 0.7 * before.loss(batch)
    train(5)
    resumed = train(12, tmp_path / "half.ckpt")
    for name, parameter in whole.model.named_parameters():
        assert parameter.equal(resumed.model.get_parameter(name)), name


# Does it hold?


def test_visits_fit_and_cover_all_instructions(tokenizer, town):
    tasks = town.tasks("held_out", ["sum", "opposite"])
    instructions = [CAPITALS, INDEED]
    visits = plan_visits(tokenizer, tasks, instructions, 6, 3, 200)
    assert [visit.instruction for visit in visits] == instructions * 3
    assert visits == plan_visits(tokenizer, tasks, instructions, 6, 3, 200)
    for visit in visits:
        turns = [t.dialog(visit.instruction.apply(t.reference)) for t in visit.tasks]
        said = [message for turn in turns for message in turn]
        told = train_first_turn_only(said, visit.instruction.text)
        assert len(turns) == 3
        assert len(encode_dialog(told, tokenizer).ids) <= 200
    with pytest.raises(ValueError, match="30 turns hardly ever fit into 200 tokens"):
        plan_visits(tokenizer, tasks, instructions, 1, 30, 200)


def test_the_models_own_answers_become_its_history(model, tokenizer, town, monkeypatch):
    seen: list[list[Dialog]] = []

    def fake(model: Any, tokenizer: Any, dialogs: Any, **options: Any) -> list[str]:
        seen.append([list(dialog) for dialog in dialogs])
        return [f"{len(dialog)} {options['seed']}" for dialog in dialogs]

    monkeypatch.setattr(ghost_attention, "answer", fake)
    tasks = town.tasks("held_out", ["sum"])[:3]
    visits = [Visit(INDEED, tasks), Visit(CAPITALS, tasks[:2])]
    answers = converse(model, tokenizer, visits, seed=5)
    assert [len(row) for row in answers] == [3, 2]
    assert len({text.split()[1] for text in answers[0]}) == 3  # new noise at each turn
    last = seen[-1][0]
    assert last[0] == {"role": "system", "content": INDEED.text}
    assert [m["content"] for m in last[1::2]] == [task.prompt for task in tasks]
    assert [m["content"] for m in last[2::2]] == answers[0][:2]
    assert sum(message["role"] == "system" for message in last) == 1


def test_a_dialogue_ends_where_the_context_does(model, tokenizer, town):
    tasks = town.tasks("held_out", ["sum"])
    visits = [Visit(INDEED, tasks[:12]), Visit(CAPITALS, tasks[:1])]
    answers = converse(model, tokenizer, visits, max_new_tokens=30)
    assert 1 < len(answers[0]) < 12
    assert len(answers[1]) == 1
    assert answers == converse(model, tokenizer, visits, max_new_tokens=30)
    alone = converse(model, tokenizer, visits[:1], max_new_tokens=30)
    assert alone == answers[:1]


def test_obedience_is_counted_among_dialogues_that_get_there(town):
    tasks = town.tasks("held_out", ["sum"])[:3]
    visits = [Visit(INDEED, tasks), Visit(CAPITALS, tasks), Visit(INDEED, tasks)]
    answers = [["7. Indeed.", "Yes.", "Indeed"], ["NO.", "YES."], ["7.", "8.", "9."]]
    assert count_obeyed(visits, answers) == [(2, 3), (1, 3), (1, 2)]


# Where it looks


def test_the_strongest_attention_is_that_of_transformers(model, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    )
    ids = torch.randint(3, 400, (40,), generator=torch.manual_seed(1)).tolist()
    weights = theirs(torch.tensor([ids]), output_attentions=True).attentions
    expected = torch.stack(weights)[:, 0].amax((0, 1))  # (T, T)
    found = strongest_attention(model, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not model.layers[0].attention._forward_pre_hooks
