"""The stages of Ghost Attention: demonstrations, rows, and what is served."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama2_lite.chat import Example, check_dialog, encode_dialog
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import MixedLengthLoader
from llama2_lite.runtime import ghost
from llama2_lite.runtime.artifacts import Artifact, artifact
from llama2_lite.runtime.ghost import (
    GhostRecipe,
    Rows,
    ghost_data,
    sample_ghosts,
    told_data,
    told_demonstrations,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import Oracle, Town, build_town, system_instructions

TINY = GhostRecipe(
    demonstrations=64,
    rows=8,
    dialogs=((6, 2), (2, 4)),
    lengths=((0.5, 350, 2), (0.5, 500, 1)),
    steps=4,
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


def test_demonstrations_obey_and_are_good(town):
    dialogs = told_demonstrations(town, 300, combined=0, seed=1)
    assert dialogs == told_demonstrations(town, 300, combined=0, seed=1)
    texts = {
        text: one
        for split in ("train", "held_out")
        for one in system_instructions(split)
        for text in (one.text, one.short)
    }
    oracle, found = Oracle(town), Counter()
    prompts = {task.prompt for task in town.tasks("train")}
    for dialog in dialogs:
        check_dialog(dialog)
        system, request, answer = (message["content"] for message in dialog)
        assert texts[system].check(answer)
        assert request in prompts
        assert oracle.rate(request, answer).safety > 0.5
        found[texts[system].text] += 1
    n_instructions = len(texts) // 2
    assert len(found) == n_instructions
    assert max(found.values()) - min(found.values()) <= 1
    both = told_demonstrations(town, 100, combined=1)
    assert not any(dialog[0]["content"] in texts for dialog in both)


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


def test_held_out_demonstrations_are_not_trained_on(town, tokenizer):
    served = told_data(town, tokenizer, TINY)
    (rows,) = served.datasets
    assert len(rows) == 64
    assert len(served.held_out) == 4
    assert all(len(batch.tokens) == TINY.rows for batch in served.held_out)
    dialogs = told_demonstrations(town, 64 + 32, TINY.combined)
    ids = [encode_dialog(dialog, tokenizer).ids for dialog in dialogs]
    assert [example.ids for example in rows.examples] == ids[32:]


def test_short_and_long_dialogues_are_served_in_turn(folder, tokenizer, town):
    model = Llama.from_pretrained(folder)
    made = sample_ghosts(model, tokenizer, town, TINY, seed=2)
    assert [len(one.replies) for one in made] == [2] * 6 + [4] * 2
    made = [one._replace(replies=["Yes."] * len(one.replies)) for one in made]
    served = ghost_data(made, tokenizer, TINY)
    loader = served.train_dataloader()
    assert isinstance(loader, MixedLengthLoader)
    batches = iter(loader)
    shapes = [next(batches).tokens.shape[0] for _ in range(4)]
    assert sorted(shapes) == [1, 1, 2, 2]
    assert len(served.held_out) == 1
    assert sum(map(len, served.datasets)) == 2 * (len(made) - 1)
    (batch,) = served.val_dataloader()
    assert batch.tokens.equal(served.held_out[0].tokens)


class Tiny:
    """Stages of a tour that starts from a random model."""

    def __init__(self, folder: Path, start: Path, town: Town):
        self.folder, self.start, self.town, self.seed = folder, start, town, 0
        self.stages: Any = SimpleNamespace(say=lambda text: None, console=None)
        self.trained: list[tuple[str, int]] = []

    def sft(self) -> Artifact:
        return Artifact(self.start, "sft")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.start / "tokenizer.model")

    def stage(self, name: str, config: Any, inputs: Any, *modules: str) -> Any:
        return lambda build: artifact(self.folder, name, config, inputs, modules, build)

    def train(
        self, folder: Path, label: str, module: Any, data: Any, max_steps: int
    ) -> None:
        self.trained.append((label, max_steps))
        module.configure_model()
        batch = next(iter(data.train_dataloader()))
        assert module.loss(batch).isfinite()
        module.model.save_pretrained(folder, self.tokenizer(), force=True)


def test_the_stages_follow_each_other_and_are_kept(tmp_path, folder, town, monkeypatch):
    stages: Any = Tiny(tmp_path, folder, town)
    sampled = ghost.sample_ghosts

    def obedient(*args: Any) -> Any:
        return [
            one._replace(replies=["Yes."] * len(one.replies)) for one in sampled(*args)
        ]

    monkeypatch.setattr(ghost, "sample_ghosts", obedient)
    made = ghost.ghost(stages, TINY)
    assert stages.trained == [("told", 8), ("ghost", 4)]
    assert (made.path / "model.safetensors").is_file()
    assert ghost.ghost(stages, TINY) == made
    found = ghost.read_ghosts(made.path)
    assert [len(one.replies) for one in found] == [2] * 6 + [4] * 2
    assert len(stages.trained) == 2
