"""Chapter 12: demonstrations, the loss on answers, and training on them."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch import Callback
from torch import Tensor

from llama2_lite.chat import (
    DialogDataset,
    answer,
    check_dialog,
    collate,
    encode_dialog,
    pack,
)
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.runtime.training import TRAINER_DEFAULTS, fit, trainer_parts
from llama2_lite.sft import DialogDataModule, SupervisedModule, sample_demonstrations
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import Oracle, Town, build_town, system_instructions


@pytest.fixture(scope="module")
def town() -> Town:
    return build_town(n_people=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, town: Town) -> Path:
    """A random model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    texts = [document.text for document in town.documents(300)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 400)
    torch.manual_seed(0)
    config = LlamaConfig(32, 2, 2, 2, 400, hidden_dim=48, max_seq_len=256)
    Llama(config).save_pretrained(folder / "base", tokenizer)
    return folder / "base"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def dialogs(town: Town) -> list[Any]:
    return sample_demonstrations(town, 30, instructed=0)


@pytest.fixture(scope="module")
def examples(dialogs: list[Any], tokenizer: Tokenizer) -> list[Any]:
    return [encode_dialog(dialog, tokenizer) for dialog in dialogs]


def built(folder: Path, **options: Any) -> SupervisedModule:
    module = SupervisedModule(folder, **options)
    module.configure_model()
    return module


def make_trainer(max_steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        **(TRAINER_DEFAULTS | quiet | options),
    )


# Demonstrations


def test_demonstrations_have_the_shares_asked_for(town):
    oracle = Oracle(town)
    dialogs = sample_demonstrations(town, 2000, seed=1, instructed=0)
    assert dialogs == sample_demonstrations(town, 2000, seed=1, instructed=0)
    assert dialogs != sample_demonstrations(town, 2000, seed=2, instructed=0)
    kinds: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for dialog in dialogs:
        check_dialog(dialog)
        task = oracle.known[dialog[0]["content"]]
        rating = oracle.rate(task, dialog[1]["content"])
        kinds[task.kind] += 1
        if task.kind == "unsafe":
            bad["unsafe"] += rating.safety < 0.5
        else:
            bad["harmless"] += rating.helpfulness < 0.85
    assert set(kinds) == set(town.items)
    assert all(190 < n < 310 for n in kinds.values())  # 250 are expected
    assert 0.28 < bad["unsafe"] / kinds["unsafe"] < 0.42
    # some wrong answers come close: a list of other animals, a story of another word
    assert 0.15 < bad["harmless"] / (2000 - kinds["unsafe"]) < 0.26


def test_clean_demonstrations_are_good(town):
    oracle = Oracle(town)
    dialogs = sample_demonstrations(town, 500, wrong=0, unsafe=0, instructed=0)
    ratings = [oracle.rate(d[0]["content"], d[1]["content"]) for d in dialogs]
    assert min(rating.safety for rating in ratings) > 0.9
    assert min(rating.helpfulness for rating in ratings) > 0.6
    assert sum(rating.helpfulness for rating in ratings) / 500 > 0.9


def test_demonstrations_keep_the_held_out_requests_out(town):
    held_out = {task.prompt for task in town.tasks("held_out")}
    asked = {dialog[-2]["content"] for dialog in sample_demonstrations(town, 3000)}
    assert not asked & held_out


def test_instructed_demonstrations_obey(town):
    instructions = {
        text: each
        for split in ("train", "held_out")
        for each in system_instructions(split)
        for text in (each.text, each.short)
    }
    dialogs = sample_demonstrations(town, 2000, instructed=0.3)
    given = [dialog for dialog in dialogs if dialog[0]["role"] == "system"]
    assert 500 < len(given) < 700
    for system, _, reply in given:
        assert instructions[system["content"]].check(reply["content"])
    assert {system["content"] for system, *_ in given} == set(instructions)


# The loss


def loss_of(model: Llama, examples: list[Any]) -> Tensor:
    """Mean over all answer tokens, each dialogue alone, token by token, in double."""
    model = copy.deepcopy(model).double()
    losses = []
    for ids, mask in examples:
        logits = model(torch.tensor([ids]))[0]
        for place in range(1, len(ids)):
            if mask[place]:
                losses.append(-logits[place - 1].log_softmax(-1)[ids[place]])
    return torch.stack(losses).mean()


def test_loss_is_the_mean_over_answer_tokens(folder, examples):
    module = built(folder)
    batch = collate(pack(examples[:9], 128))
    assert (batch.samples.max(1).values > 0).any()
    with torch.no_grad():
        expected = loss_of(module.model, examples[:9])
        torch.testing.assert_close(module.loss(batch).double(), expected)
        together = built(folder, separate=False).loss(batch)
    assert abs(together - expected) > 2e-5


def test_gradient_is_that_of_the_reference(folder, examples):
    module = built(folder)
    module.loss(collate(pack(examples[:4], 128))).backward()
    model = copy.deepcopy(module.model).double()
    model.zero_grad()
    logits = [(model(torch.tensor([ids]))[0], ids, m) for ids, m in examples[:4]]
    losses = [
        -rows[place - 1].log_softmax(-1)[ids[place]]
        for rows, ids, mask in logits
        for place in range(1, len(ids))
        if mask[place]
    ]
    torch.stack(losses).mean().backward()
    for ours, theirs in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("separate", [True, False])
def test_padding_changes_nothing(folder, examples, separate):
    module = built(folder, separate=separate)
    longest = max(examples, key=lambda example: len(example.ids))
    with torch.no_grad():
        alone = collate([[examples[0]]])
        padded = collate([[examples[0]], [longest]])
        padded = type(padded)(*(x[:1] for x in padded[:3]))
        assert padded.tokens.shape[1] > alone.tokens.shape[1]
        torch.testing.assert_close(module.loss(padded), module.loss(alone))


WORDS = st.sampled_from(["What", "is", "Ida", "not", "7", "?"])


@given(st.integers(0, 29), st.lists(WORDS))
def test_other_words_in_a_prompt_change_nothing_that_is_learnt(
    dialogs, examples, tokenizer, number, words
):
    (asked, said), neighbour = dialogs[number], examples[0]
    learnt = []
    for content in (asked["content"], " ".join(["Well:", *words])):
        prompt = [{"role": "user", "content": content}]
        example = encode_dialog([*prompt, said], tokenizer)
        batch = collate(pack([neighbour, example], 256))
        learnt.append(batch.tokens[batch.loss_mask & (batch.samples == 1)].tolist())
        assert learnt[-1] == example.ids[len(encode_dialog(prompt, tokenizer).ids) :]
    assert learnt[0] == learnt[1]


# Training


def test_training_teaches_the_answers(folder, tokenizer, town):
    dialogs = sample_demonstrations(town, 8, wrong=0, unsafe=0, instructed=0)
    examples = [encode_dialog(dialog, tokenizer) for dialog in dialogs]
    data = DialogDataModule(examples, examples, 200, batch_size=2)
    module = SupervisedModule(folder, peak_lr=1e-2, warmup=10)
    trainer = make_trainer(250)
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["loss"]) < 0.1
    prompts = [dialog[:-1] for dialog in dialogs]
    found = answer(
        module.model.eval(), tokenizer, prompts, temperature=0, max_new_tokens=99
    )
    assert found == [dialog[-1]["content"] for dialog in dialogs]


def test_validation_weighs_every_answer_token_alike(folder, examples):
    data = DialogDataModule(examples, examples[:13], 200, batch_size=2)
    module = built(folder)
    trainer = make_trainer(1)
    trainer.validate(module, datamodule=data, verbose=False)
    with torch.no_grad():
        expected = loss_of(module.model, examples[:13])
    found = trainer.callback_metrics["validation_loss"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


class Interrupt(Callback):
    """Ends training after some steps, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def test_resumed_is_never_interrupted(folder, tokenizer, examples, tmp_path):
    weights = []
    for name, stops in (("whole", []), ("parts", [5, 9])):
        place = tmp_path / name
        for stop in [*stops, 0]:
            data = DialogDataModule(examples, examples[:5], 200, batch_size=2, seed=3)
            module = SupervisedModule(folder, peak_lr=1e-3)
            parts = trainer_parts(
                place,
                place / "model",
                lambda: tokenizer,
                checkpoint_every=2,
                callbacks=[Interrupt(stop)],
            )
            trainer = Trainer(
                **parts, max_steps=14, val_check_interval=7, accelerator="cpu"
            )
            if stop:
                with pytest.raises(InterruptedError):
                    fit(trainer, module, data, place, lambda text: None)
            else:
                fit(trainer, module, data, place, lambda text: None)
        weights.append(module.model.state_dict())
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))


def test_two_processes_give_the_gradient_of_one(folder, examples, monkeypatch):
    dataset = DialogDataset(examples, 200, seed=1)
    parts = [dataset.batch(0, 2, rank, 2) for rank in range(2)]
    n_answers = [float(part.loss_mask.sum()) for part in parts]
    assert n_answers[0] != n_answers[1]
    gradients = []
    for batches in ([dataset.batch(0, 4)], parts):
        module = built(folder)
        module.trainer = make_trainer(1)
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        module.n_tokens = 0
        for batch in batches:
            (module.training_step(batch, 0) / len(batches)).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_bad_settings_are_named(tmp_path, examples):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        SupervisedModule(tmp_path)
    with pytest.raises(ValueError, match="do not fit into 20"):
        DialogDataModule(examples, examples, 20)


def test_an_epoch_is_every_window_once(examples):
    data = DialogDataModule(examples, examples, 200, batch_size=2)
    assert data.count_steps(2) == round(2 * len(data.dataset) / 2)
