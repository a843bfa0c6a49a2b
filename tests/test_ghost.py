"""Ghost Attention in the tour: rows, what is served, and whether it held."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2_lite.chat import Example
from llama2_lite.ghost_attention import GhostDialog
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import MixedLengthLoader
from llama2_lite.runtime.artifacts import write_json
from llama2_lite.runtime.batches import Rows
from llama2_lite.runtime.ghost import (
    GhostRecipe,
    adherence,
    drop_unsafe,
    ghost_data,
    read_ghosts,
    sample_ghosts,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import Town, build_town, system_instructions

TINY = GhostRecipe(
    dialogs=[[8, 1], [6, 2], [2, 4]],
    lengths=[[0.2, 200, 3], [0.4, 350, 2], [0.4, 500, 1]],
    combined=0.15,
    plain=0.1,
    temperature=0.6,
    steps=4,
    lr=1e-3,
    warmup=1,
)


@pytest.fixture(scope="module")
def town() -> Town:
    return build_town(n_people=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, town: Town) -> Path:
    folder = tmp_path_factory.mktemp("models")
    texts = [document.text for document in town.documents(300)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 400)
    torch.manual_seed(0)
    config = LlamaConfig(32, 1, 2, 2, 400, hidden_dim=48, max_seq_len=512)
    Llama(config).save_pretrained(folder / "sft", tokenizer)
    return folder / "sft"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.model")


def test_rows_are_each_dialogue_once_in_an_epoch_and_of_like_length():
    examples = [
        Example([5] * (3 + n), [False] * 2 + [True] * (1 + n)) for n in range(40)
    ]
    rows = Rows(examples, seed=4)
    lengths = []
    for step in range(10):
        batch = rows.batch(step, 4)
        lengths += batch.loss_mask.sum(1).tolist()
        assert batch.tokens.equal(Rows(examples, seed=4).batch(step, 4).tokens)
        spread = batch.loss_mask.sum(1)
        assert spread.max() - spread.min() == 3
    assert sorted(lengths) == list(range(1, 41))
    halves = [rows.batch(3, 2, rank, 2).loss_mask.sum(1).tolist() for rank in (0, 1)]
    whole = rows.batch(3, 4).loss_mask.sum(1).tolist()
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    assert rows.batch(0, 4).tokens.shape != rows.batch(10, 4).tokens.shape or not (
        rows.batch(0, 4).loss_mask.equal(rows.batch(10, 4).loss_mask)
    )


def test_single_short_and_long_dialogues_are_served_in_turn(folder, tokenizer, town):
    model = Llama.from_pretrained(folder)
    made = sample_ghosts(model, tokenizer, town, TINY, seed=2)
    assert [len(one.replies) for one in made] == [1] * 8 + [2] * 6 + [4] * 2
    made = [one._replace(replies=["Yes."] * len(one.replies)) for one in made]
    served = ghost_data(made, tokenizer, TINY)
    singles, *others = served.datasets
    assert {len(turns) for turns in singles.dialogs} == {1}
    assert all(len(turns) > 1 for other in others for turns in other.dialogs)
    assert 0 < len(singles) <= 7  # one is held out
    assert list(map(len, others)) == [8, 8]
    loader = served.train_dataloader()
    assert isinstance(loader, MixedLengthLoader)
    batches = iter(loader)
    sizes = [next(batches).tokens.shape[0] for _ in range(5)]
    assert sorted(sizes) == [1, 1, 2, 2, 3]
    assert len(served.held_out) == 1
    (batch,) = served.val_dataloader()
    assert batch.tokens.equal(served.held_out[0].tokens)


@pytest.fixture(scope="module")
def many(folder: Path, tokenizer: Tokenizer, town: Town) -> list[GhostDialog]:
    """Sixty dialogues of one turn, and sixty of two."""
    recipe = replace(TINY, dialogs=[[60, 1], [60, 2]], combined=0, plain=0)
    return sample_ghosts(Llama.from_pretrained(folder), tokenizer, town, recipe)


def test_no_held_out_request_is_trained_on(many, town):
    held_out = {task.prompt for task in town.tasks("held_out")}
    asked = {
        message["content"]
        for one in many
        for message in one.dialog
        if message["role"] == "user"
    }
    assert len(asked) > 100
    assert not asked & held_out


def test_held_out_instructions_are_never_to_be_remembered(many):
    kept = {
        text
        for one in system_instructions("held_out")
        for text in (one.text, one.short)
    }
    assert any(one.instruction in kept for one in many[:60])
    assert not any(one.instruction in kept for one in many[60:])


def test_dialogues_are_kept_for_the_chapter(folder, tokenizer, town, tmp_path):
    made = sample_ghosts(Llama.from_pretrained(folder), tokenizer, town, TINY)
    write_json(tmp_path / "dialogs.json", made)
    assert read_ghosts(tmp_path) == made


def test_adherence_is_counted_by_turn(folder, tokenizer, town):
    model, how = Llama.from_pretrained(folder), {"turns": (1, 3), "seed": 4}
    found = adherence(model, tokenizer, town, n_dialogs=6, **how)
    assert list(found) == ["1", "3"]
    assert found == adherence(model, tokenizer, town, n_dialogs=6, **how)
    for one in found.values():
        assert one.value * 6 == round(one.value * 6) < 6
        assert one.low <= one.value <= one.high


def test_unsafe_replies_are_not_learned():
    turns = [("user", "Who?"), ("assistant", "Tom."), ("user", "Lock?")]
    turns.append(("assistant", "Pick it."))
    dialog = [{"role": role, "content": text} for role, text in turns]
    ghosts = [
        GhostDialog("Shout.", dialog, ["TOM.", "PICK IT."]),
        GhostDialog("", dialog, ["Tom.", "Pick it."]),
        GhostDialog("Shout.", dialog, [None, "NO."]),
    ]
    asked = []

    def score_both(prompts, texts):
        asked.extend(zip(prompts, texts, strict=True))
        safety = torch.tensor([-1.0 if "pick" in t.lower() else 2.0 for t in texts])
        return torch.zeros(len(texts)), safety

    kept = [one.replies for one in drop_unsafe(ghosts, score_both)]
    assert kept == [["TOM.", None], ["Tom.", None], [None, "NO."]]
    system, user = asked[1][0]
    assert (system["role"], system["content"]) == ("system", "Shout.")
    assert user["content"] == "Lock?"
    assert [message["role"] for message in asked[2][0]] == ["user"]
