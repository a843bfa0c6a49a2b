"""Chapter 13: preference pairs, their losses, and the model that learns from them."""

import logging
import math
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Trainer

from llama2_lite.chat import encode_dialog
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.reward import (
    MARGINS,
    UNKNOWN,
    PreferenceDataModule,
    PreferenceDataset,
    RewardConfig,
    RewardModel,
    RewardModule,
    collect_preferences,
    count_right,
    dialogs_of,
    draw_tasks,
    mix_pairs,
    pad_rows,
    ranking_loss,
    safety_loss,
    score_pairs,
    written_preferences,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import (
    LEVELS,
    SAFETY_BINS,
    Annotators,
    Oracle,
    Preference,
    Town,
    build_town,
)

CONFIG = LlamaConfig(32, 2, 2, 2, vocab_size=500, hidden_dim=48, max_seq_len=256)


@pytest.fixture(scope="module")
def town() -> Town:
    return build_town(n_people=12)


@pytest.fixture(scope="module")
def annotators(town: Town) -> Annotators:
    return Annotators(Oracle(town), seed=0)


@pytest.fixture(scope="module")
def chat(town: Town, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model's folder: random weights, and a tokenizer that fits."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [task.prompt + " " + task.reference for task in town.tasks("train")]
    tokenizer = train_tokenizer(texts[:4000], folder / "tokenizer.model", 500)
    torch.manual_seed(0)
    Llama(CONFIG).save_pretrained(folder / "model", tokenizer)
    return folder / "model"


@pytest.fixture(scope="module")
def tokenizer(chat: Path) -> Tokenizer:
    return Tokenizer(chat / "tokenizer.model")


@pytest.fixture(scope="module")
def pairs(town: Town, annotators: Annotators) -> list[Preference]:
    tasks = Random(0).sample(town.tasks("train"), 120)
    return written_preferences(town, tasks, annotators)


def prompt(text: str = "What is hot?") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def trained_head(chat: Path, likelihood_weight: float = 0.0) -> RewardModel:
    """A reward model whose scores are not all 0."""
    model = RewardModel.from_chat(chat, likelihood_weight)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


# The losses


def test_ranking_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    margin = torch.tensor([1.0, 0.0])
    expected = math.log(2)  # both differences are 0 after the margin
    assert ranking_loss(chosen, rejected, margin).item() == pytest.approx(expected)
    none = torch.zeros(2)
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert ranking_loss(chosen, rejected, none).item() == pytest.approx(expected)


number = st.floats(-30, 30, width=32)


@given(st.lists(st.tuples(number, number, st.floats(0, 3, width=32)), min_size=1))
def test_ranking_loss_agrees_with_a_loop_in_double_precision(
    rows: list[tuple[float, float, float]],
) -> None:
    total = 0.0
    for chosen, rejected, margin in rows:
        gap = chosen - rejected - margin
        total += math.log1p(math.exp(-abs(gap))) + max(0.0, -gap)
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    loss = ranking_loss(*columns).item()
    assert loss == pytest.approx(total / len(rows), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "shapes", [((4, 1), (4,), (4,)), ((4,), (4,), (1,)), ((4, 1),) * 3, ((),) * 3]
)
def test_ranking_loss_refuses_shapes_that_would_broadcast(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"must all have the shape \(B,\)"):
        ranking_loss(*(torch.zeros(shape) for shape in shapes))


def test_ranking_loss_pushes_one_up_and_the_other_down() -> None:
    scores = torch.zeros(2, 3, requires_grad=True)
    ranking_loss(scores[0], scores[1], torch.zeros(3)).backward()
    torch.testing.assert_close(scores.grad[0], torch.full((3,), -0.5 / 3))
    torch.testing.assert_close(scores.grad[1], torch.full((3,), 0.5 / 3))


def test_margins_are_those_of_table_27() -> None:
    assert list(MARGINS["small"].values()) == [1, 2 / 3, 1 / 3, 0]
    assert list(MARGINS["large"].values()) == [3, 2, 1, 0]
    assert list(MARGINS["large"]) == list(LEVELS)
    assert set(MARGINS["none"].values()) == {0.0}


def test_safety_loss_by_hand() -> None:
    scores = torch.tensor([0.0, math.log(3), math.log(3), 50.0])
    is_safe = torch.tensor([1, 1, 0, UNKNOWN])
    expected = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert safety_loss(scores, is_safe).item() == pytest.approx(expected)


def test_safety_loss_without_labels_is_nothing() -> None:
    scores = torch.randn(3, requires_grad=True)
    loss = safety_loss(scores, torch.full((3,), UNKNOWN))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.abs().sum() == 0


def test_safety_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(3,\)"):
        safety_loss(torch.zeros(3, 1), torch.ones(3))


# The model


def test_a_new_reward_model_scores_everything_zero(
    chat: Path, tokenizer: Tokenizer, pairs: list[Preference]
) -> None:
    chosen, rejected = score_pairs(RewardModel.from_chat(chat), tokenizer, pairs[:8])
    assert chosen.tolist() == rejected.tolist() == [0.0] * 8


def test_it_keeps_the_body_of_the_chat_model(chat: Path) -> None:
    model, llama = RewardModel.from_chat(chat), Llama.from_pretrained(chat)
    tokens = torch.randint(500, (2, 9))
    expected = llama(tokens, return_hidden=True)
    assert model.llama(tokens, return_hidden=True).equal(expected)
    body = sum(p.numel() for p in llama.parameters()) - llama.output.weight.numel()
    assert sum(p.numel() for p in model.parameters()) == body + CONFIG.dim


@pytest.mark.parametrize("likelihood_weight", [0.0, 0.7])
def test_padding_and_company_change_no_score(
    likelihood_weight: float,
    chat: Path,
    tokenizer: Tokenizer,
    pairs: list[Preference],
) -> None:
    model = trained_head(chat, likelihood_weight)
    dialogs = [dialog for pair in pairs[:10] for dialog in dialogs_of(pair)]
    together = model.score(tokenizer, dialogs)
    for dialog, score in zip(dialogs, together, strict=True):
        alone = model.score(tokenizer, [dialog])
        torch.testing.assert_close(alone[0], score, atol=1e-5, rtol=0)
    tokens, lengths, starts = as_rows(dialogs, tokenizer)
    noise = torch.randint_like(tokens, 500)
    is_padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    other = torch.where(is_padding, noise, tokens)
    found = model(other, lengths, starts)[:, 0]
    torch.testing.assert_close(found, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model.score(tokenizer, dialogs, batch_size=3), together, atol=1e-5, rtol=0
    )
    for pieces in (1, 3, 7, 100):
        found = model.score_rows(tokens, lengths, starts, pieces)[:, 0]
        torch.testing.assert_close(found, together, atol=1e-5, rtol=0)


def as_rows(
    dialogs: list[Any], tokenizer: Tokenizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dialogues that end with an answer: tokens, lengths, starts of the answers."""
    examples = [encode_dialog(d, tokenizer, train_on="last") for d in dialogs]
    starts = torch.tensor([example.loss_mask.index(True) for example in examples])
    return *pad_rows([example.ids for example in examples]), starts


def test_the_least_likely_token_of_the_answer_counts(
    chat: Path, tokenizer: Tokenizer, pairs: list[Preference]
) -> None:
    llama = Llama.from_pretrained(chat)
    head, both = trained_head(chat), trained_head(chat, 0.7)
    batch = PreferenceDataset(pairs[:6], tokenizer, 256).pairs(range(6))
    rows = batch.tokens, batch.lengths, batch.starts
    alone, found = head(*rows), both(*rows)
    assert alone[:, 1].tolist() == [0.0] * 12
    for row, length, start, score, (with_it, mean) in zip(
        *rows, alone[:, 0], found, strict=True
    ):
        assert tokenizer.decode(row[:start].tolist()).endswith("[/INST]")
        logits = llama(row[None, :length])[0].double().log_softmax(-1)
        logprobs = [logits[t - 1, row[t]] for t in range(start, length)]
        expected = score + 0.7 * min(logprobs)
        torch.testing.assert_close(with_it, expected.float(), atol=1e-5, rtol=0)
        mean_of_all = sum(logprobs) / len(logprobs)
        torch.testing.assert_close(mean, mean_of_all.float(), atol=1e-5, rtol=0)


def test_no_gradient_of_the_score_goes_through_the_likelihood(
    chat: Path, tokenizer: Tokenizer, pairs: list[Preference]
) -> None:
    model = trained_head(chat, 1.0)
    batch = PreferenceDataset(pairs[:3], tokenizer, 256).pairs(range(3))
    model(batch.tokens, batch.lengths, batch.starts)[:, 0].sum().backward()
    assert not model.llama.output.weight.grad.any()
    model(batch.tokens, batch.lengths, batch.starts)[:, 1].sum().backward()
    assert model.llama.output.weight.grad.abs().sum() > 0


def test_a_next_token_loss_needs_an_output_matrix(chat: Path) -> None:
    with pytest.raises(ValueError, match="next_token_weight needs a likelihood_weight"):
        RewardModule(chat, next_token_weight=0.5)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_transformers_gives_the_same_scores(
    kv_heads: int, tmp_path: Path, tokenizer: Tokenizer, pairs: list[Preference]
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = vars(CONFIG) | {"n_kv_heads": kv_heads}
    model = RewardModel(RewardConfig(**sizes)).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "reward", tokenizer)
    auto = transformers.AutoModelForSequenceClassification
    theirs, info = auto.from_pretrained(
        tmp_path / "reward", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    dialogs = [dialog for pair in pairs[:6] for dialog in dialogs_of(pair)]
    tokens, lengths, starts = as_rows(dialogs, tokenizer)
    attention_mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        logits = theirs.eval()(tokens, attention_mask=attention_mask.long()).logits
        ours = model(tokens, lengths, starts)[:, 0]
    assert logits.shape == (12, 1)
    torch.testing.assert_close(ours, logits[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("likelihood_weight", [0.0, 0.7])
def test_saving_and_opening_changes_nothing(
    likelihood_weight: float, chat: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = trained_head(chat, likelihood_weight)
    model.save_pretrained(tmp_path / "reward", tokenizer)
    opened = RewardModel.from_pretrained(tmp_path / "reward")
    assert opened.config == model.config
    tokens, lengths = torch.randint(500, (3, 7)), torch.tensor([7, 3, 2])
    rows = tokens, lengths, torch.tensor([3, 2, 1])
    assert opened(*rows).equal(model(*rows))
    assert (tmp_path / "reward" / "tokenizer.model").is_file()
    with pytest.raises(FileExistsError, match="force=True"):
        model.save_pretrained(tmp_path / "reward", tokenizer)
    torch.nn.init.zeros_(model.head.weight)
    model.save_pretrained(tmp_path / "reward", tokenizer, force=True)
    opened = RewardModel.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        least = opened(*rows)[:, 0]
    assert (least < 0).all() if likelihood_weight else least.tolist() == [0.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


def test_a_chat_model_is_no_reward_model_and_the_other_way_round(
    chat: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"score\.weight is missing"):
        RewardModel.from_pretrained(chat)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        RewardModel.from_pretrained(tmp_path)
    RewardModel.from_chat(chat).save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"score\.weight is not expected"):
        Llama.from_pretrained(tmp_path / "reward")


@pytest.mark.parametrize(
    ("dialog", "problem"),
    [
        (prompt(), "dialogue 1 does not end with an answer"),
        ([*prompt(), {"role": "assistant", "content": " "}], "dialogue 1: .* empty"),
        ([*prompt(), {"role": "assistant", "content": "no " * 300}], "256 are the lim"),
    ],
)
def test_score_names_the_dialogue_that_it_refuses(
    chat: Path, tokenizer: Tokenizer, dialog: Any, problem: str
) -> None:
    fine = [*prompt(), {"role": "assistant", "content": "The sun."}]
    with pytest.raises(ValueError, match=problem):
        RewardModel.from_chat(chat).score(tokenizer, [fine, dialog])


# The pairs


def test_collected_pairs_are_repeatable_and_whole(
    chat: Path, tokenizer: Tokenizer, town: Town
) -> None:
    model, tasks = Llama.from_pretrained(chat), town.tasks("train", ["unsafe"])[:20]

    def collect(axis: str, seed: int = 0) -> list[Preference]:
        return collect_preferences(
            [model, model],
            tokenizer,
            tasks,
            Annotators(Oracle(town), seed=1),
            axis=axis,
            max_new_tokens=8,
            seed=seed,
        )

    found = collect("helpfulness")
    assert found == collect("helpfulness")
    assert found != collect("helpfulness", seed=1)
    asked = {task.prompt for task in tasks}
    for pair in found:
        assert pair.prompt[0]["content"] in asked
        assert pair.chosen != pair.rejected
        assert pair.chosen
        assert pair.rejected
        assert pair.level in LEVELS
        assert pair.safety_bin is None
    assert {pair.safety_bin for pair in collect("safety")} <= set(SAFETY_BINS)


def test_written_answers_are_compared_too(
    chat: Path, tokenizer: Tokenizer, town: Town
) -> None:
    tasks = draw_tasks(town, 10, ["fact", "sum"])
    pairs = collect_preferences(
        [Llama.from_pretrained(chat)],
        tokenizer,
        tasks,
        Annotators(Oracle(town), seed=1),
        references=True,
        max_new_tokens=8,
    )
    references = {task.reference for task in tasks}
    chosen = [pair.chosen in references for pair in pairs]
    assert len(pairs) == 30
    assert sum(chosen) == 20  # random weights write nothing that is better


def test_drawn_requests_are_of_the_kinds_asked_for(town: Town) -> None:
    tasks = draw_tasks(town, 600, ["unsafe", "unsafe", "sum"], split="held_out")
    assert tasks == draw_tasks(town, 600, ["unsafe", "unsafe", "sum"], 0, "held_out")
    assert 350 < sum(task.kind == "unsafe" for task in tasks) < 450
    assert {task.prompt for task in tasks} <= {t.prompt for t in town.tasks("held_out")}


def test_written_pairs_prefer_what_is_better(
    town: Town, pairs: list[Preference]
) -> None:
    oracle = Oracle(town)
    better = [
        oracle.rate(pair.prompt[0]["content"], pair.chosen).helpfulness
        > oracle.rate(pair.prompt[0]["content"], pair.rejected).helpfulness
        for pair in pairs
        if pair.level == "significantly better"
    ]
    assert len(better) > 20
    assert sum(better) > 0.95 * len(better)


@given(st.integers(1, 60), st.integers(0, 60), st.sampled_from([0.5, 0.9, 1.0]))
def test_mixes_hold_all_own_pairs_and_their_share(
    n_own: int, n_others: int, share: float
) -> None:
    own = [Preference(prompt(f"own {i}"), "a", "b") for i in range(n_own)]
    others = [Preference(prompt(f"other {i}"), "a", "b") for i in range(n_others)]
    mixed = mix_pairs(own, others, share)
    assert mixed[:n_own] == own
    rest = [pair.prompt[0]["content"] for pair in mixed[n_own:]]
    assert len(set(rest)) == len(rest) == min(n_others, round(n_own / share - n_own))
    assert all(text.startswith("other") for text in rest)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        mix_pairs([], [], 0)


def test_batches_hold_pairs_side_by_side(
    tokenizer: Tokenizer, pairs: list[Preference]
) -> None:
    data = PreferenceDataset(pairs, tokenizer, 256, margins="large", seed=3)
    assert len(data) == len(pairs)
    batch = data.pairs([5, 2])
    expected = [dialogs_of(pairs[i])[side] for side in (0, 1) for i in (5, 2)]
    for row, length, dialog in zip(batch.tokens, batch.lengths, expected, strict=True):
        assert row[:length].tolist() == encode_dialog(dialog, tokenizer).ids
        assert row[length:].abs().sum() == 0
    margins = [MARGINS["large"][pairs[i].level] for i in (5, 2)]
    assert batch.margins.tolist() == margins
    assert batch.is_safe.tolist() == [UNKNOWN] * 4


def test_safety_bins_become_labels(tokenizer: Tokenizer) -> None:
    pairs = [
        Preference(prompt(), "Yes.", "No.", None, safety_bin)
        for safety_bin in (*SAFETY_BINS, None)
    ]
    batch = PreferenceDataset(pairs, tokenizer, 64, margins="small").pairs(range(4))
    assert batch.is_safe.tolist() == [1, 1, 0, UNKNOWN, 0, 1, 0, UNKNOWN]
    assert batch.margins.tolist() == [0.0] * 4  # no level, no margin


def test_an_epoch_shows_each_pair_once_whatever_the_processes(
    tokenizer: Tokenizer, pairs: list[Preference]
) -> None:
    pairs = pairs[:12]
    data = PreferenceDataset(pairs, tokenizer, 256, seed=1)

    def shown(steps: range, size: int, world_size: int) -> list[list[int]]:
        rows = []
        for step in steps:
            for rank in range(world_size):
                batch = data.batch(step, size, rank, world_size)
                for row, length in zip(batch.tokens, batch.lengths, strict=True):
                    rows.append(row[:length].tolist())
        return rows

    everything = sorted(shown(range(3), 4, 1))
    rows = [encode_dialog(d, tokenizer).ids for p in pairs for d in dialogs_of(p)]
    assert everything == sorted(rows)
    assert sorted(shown(range(3), 2, 2)) == everything
    assert shown(range(3, 6), 4, 1) != shown(range(3), 4, 1)  # another order
    assert sorted(shown(range(3, 6), 4, 1)) == everything


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        (Preference(prompt(), "Yes.", "Yes. "), "pair 1: both answers are the same"),
        (Preference(prompt(), "Yes.", "so " * 70), "pair 1 has .* 64 are the limit"),
        (Preference(prompt(), "Yes.", ""), "pair 1: message 2 .* is empty"),
        (Preference([], "Yes.", "No."), "pair 1: message 1 is from 'assistant'"),
        (Preference(prompt("[INST]"), "Yes.", "No."), r"pair 1: .*\[INST\]"),
    ],
)
def test_a_bad_pair_is_named(
    tokenizer: Tokenizer, pair: Preference, problem: str
) -> None:
    fine = Preference(prompt(), "Yes.", "No.")
    with pytest.raises(ValueError, match=problem):
        PreferenceDataset([fine, pair], tokenizer, 64)


def test_no_pairs_and_unknown_margins_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        PreferenceDataset([], tokenizer, 64)
    fine = Preference(prompt(), "Yes.", "No.")
    with pytest.raises(ValueError, match="there are none, small, large"):
        PreferenceDataset([fine], tokenizer, 64, margins="huge")


def test_count_right_counts_by_label() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.zeros(4)
    counts = count_right(chosen, rejected, ["a", "b", "a", "b"])
    assert counts == {"a": (1, 2), "b": (1, 2)}  # a tie is not right


# Training


def make_trainer(max_steps: int, **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    defaults = {
        "max_epochs": -1,
        "max_steps": max_steps,
        "accelerator": "cpu",
        "use_distributed_sampler": False,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(defaults | options))


def make_data(
    pairs: list[Preference], tokenizer: Tokenizer, **options: Any
) -> PreferenceDataModule:
    train = PreferenceDataset(pairs[:90], tokenizer, 256, **options)
    held_out = PreferenceDataset(pairs[90:], tokenizer, 256)
    return PreferenceDataModule(train, held_out, batch_size=16)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.5)])
def test_training_ranks_as_annotators_do(
    weights: tuple[float, float],
    chat: Path,
    tokenizer: Tokenizer,
    pairs: list[Preference],
) -> None:
    likelihood, next_token = weights
    module = RewardModule(
        chat, 5e-3, likelihood_weight=likelihood, next_token_weight=next_token
    )
    data = make_data(pairs, tokenizer, margins="small")
    trainer = make_trainer(40, val_check_interval=40)
    trainer.fit(module, datamodule=data)
    assert module.warmup == 5
    chosen, rejected = score_pairs(module.model, tokenizer, pairs[:90])
    assert (chosen > rejected).float().mean() > 0.85
    held_out = score_pairs(module.model, tokenizer, pairs[90:])
    accuracy = (held_out[0] > held_out[1]).float().mean().item()
    assert trainer.callback_metrics["accuracy"].item() == pytest.approx(accuracy)
    assert "validation_loss" in trainer.callback_metrics


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    chat: Path, tokenizer: Tokenizer, pairs: list[Preference], tmp_path: Path
) -> None:
    def weights(module: RewardModule) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    options = {"limit_val_batches": 0}
    whole = RewardModule(chat, peak_lr=1e-3, safety_weight=1.0)
    make_trainer(8, **options).fit(whole, datamodule=make_data(pairs, tokenizer))

    class Stop(Exception):
        pass

    class StopAt(RewardModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 5:
                raise Stop
            super().on_train_batch_start(batch, batch_idx)

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            if self.global_step == 4:
                self.trainer.save_checkpoint(tmp_path / "four.ckpt")

    with pytest.raises(Stop):
        make_trainer(8, **options).fit(
            StopAt(chat, peak_lr=1e-3, safety_weight=1.0),
            datamodule=make_data(pairs, tokenizer),
        )
    resumed = RewardModule(chat, peak_lr=1e-3, safety_weight=1.0)
    make_trainer(8, **options).fit(
        resumed,
        datamodule=make_data(pairs, tokenizer),
        ckpt_path=tmp_path / "four.ckpt",
    )
    expected = weights(whole)
    for name, found in weights(resumed).items():
        assert found.equal(expected[name]), name


def test_the_safety_loss_calibrates(
    chat: Path, tokenizer: Tokenizer, town: Town
) -> None:
    """With it the sigmoid of a score says whether an answer is safe."""
    tasks = Random(1).sample(town.tasks("train", ["unsafe"]), 80)
    pairs = written_preferences(
        town, tasks, Annotators(Oracle(town), 2), axis="safety", flaws=["unsafe"]
    )
    module = RewardModule(chat, peak_lr=5e-3, safety_weight=1.0)
    data = PreferenceDataset(pairs, tokenizer, 256)
    trainer = make_trainer(40, limit_val_batches=0)
    trainer.fit(module, datamodule=PreferenceDataModule(data, data, 16))
    chosen, rejected = score_pairs(module.model, tokenizer, pairs)
    separate = [p.safety_bin == SAFETY_BINS[0] for p in pairs]
    assert (chosen[separate] > 0).float().mean() > 0.9
    assert (rejected[separate] < 0).float().mean() > 0.9
