"""Chapter 09: the loss, the schedule, the loop, and going on where a run stopped."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch import Callback
from torch import Tensor, nn

from llama2_lite.corpus import TokenDataset, write_shards
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import (
    MixedLengthLoader,
    PretrainingModule,
    TokenDataModule,
    best_precision,
    configure_optimizer,
    learning_rate,
    next_token_loss,
    on_one_device,
    vocabulary_loss,
)
from llama2_lite.tokenizer import train_tokenizer
from llama2_lite.town import build_town

CONFIG = LlamaConfig(32, 2, 2, 2, vocab_size=400, hidden_dim=48, max_seq_len=64)
LENGTHS = [(0.5, 16, 8), (0.5, 64, 2)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    town = build_town(n_people=12)
    texts = [document.text for document in town.documents(400)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 400)
    write_shards(texts, tokenizer, folder / "train")
    held_out = [document.text for document in town.documents(60, seed=1)]
    write_shards(held_out, tokenizer, folder / "validation")
    return folder


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, *rest: Any
    ) -> None:
        self.values.append(outputs["loss"].item())


def make_trainer(max_steps: int = 6, *callbacks: Callback, **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    defaults = {
        "max_epochs": -1,
        "max_steps": max_steps,
        "accelerator": "cpu",
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "check_val_every_n_epoch": None,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def make_module(**options: Any) -> PretrainingModule:
    return PretrainingModule(CONFIG, **({"peak_lr": 3e-3, "warmup": 2} | options))


def make_data(shards: Path, lengths: list[Any] = LENGTHS, **options: Any) -> Any:
    return TokenDataModule(shards / "train", shards / "validation", lengths, **options)


def fit(shards: Path, lengths: list[Any] = LENGTHS, **options: Any) -> list[float]:
    watched = Losses()
    trainer = make_trainer(6, watched, **options)
    trainer.fit(make_module(), make_data(shards, lengths))
    return watched.values


# The loss


def test_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0], [6.0, 3.0, 1.0]]])
    logits[0, 1] = logits[0, 1].log()
    expected = -(math.log(1 / 3) + math.log(0.3)) / 2
    loss = next_token_loss(logits, torch.tensor([[2, 1]]))
    assert loss.item() == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 2),
    vocabulary=st.integers(1, 9),
    piece=st.integers(1, 40),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 100),
)
def test_loss_in_pieces_equals_the_plain_one(
    shape: tuple[int, int], vocabulary: int, piece: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(*shape, 5, requires_grad=True)
    weight = torch.randn(vocabulary, 5, requires_grad=True)
    targets = torch.randint(vocabulary, shape)
    plain = next_token_loss(hidden @ weight.T, targets)
    expected = torch.autograd.grad(scale * plain, (hidden, weight))
    loss = vocabulary_loss(hidden, weight, targets, piece)
    torch.testing.assert_close(loss, plain)
    actual = torch.autograd.grad(scale * loss, (hidden, weight))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_loss_in_pieces_on_a_model(tied: bool, backend: str | None) -> None:
    def run(in_pieces: bool, dtype: torch.dtype | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = Llama(LlamaConfig(32, 2, 4, 2, 60, 48, tie_embeddings=tied))
        windows = torch.randint(60, (3, 12))

        def loss_of(windows: Tensor) -> Tensor:
            if not in_pieces:
                return next_token_loss(model(windows[:, :-1]), windows[:, 1:])
            hidden = model(windows[:, :-1], return_hidden=True)
            return vocabulary_loss(hidden, model.output.weight, windows[:, 1:], 10)

        if backend:
            loss_of = torch.compile(loss_of, backend=backend)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_of(windows)
        loss.backward()
        assert loss.dtype == torch.float32
        return [loss.detach(), *(p.grad for p in model.parameters())]

    torch.testing.assert_close(run(True, None), run(False, None))
    exact, rough = run(False, None), run(True, torch.bfloat16)
    plain = run(False, torch.bfloat16)
    for x, y, z in zip(exact, rough, plain, strict=True):
        allowed = 1.5 * (x - z).norm() + 1e-3 * x.norm()  # as good as plain bf16
        assert (x - y).norm() <= allowed


def test_loss_in_pieces_without_gradients() -> None:
    hidden, weight = torch.randn(2, 3, 4), nn.Parameter(torch.randn(7, 4))
    targets = torch.randint(7, (2, 3))
    with torch.no_grad():
        loss = vocabulary_loss(hidden, weight, targets, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, next_token_loss(hidden @ weight.T, targets).data)
    vocabulary_loss(hidden, weight, targets, 4).backward()  # a frozen model, a head
    assert weight.grad is not None


# Optimizer and schedule


@pytest.mark.parametrize("tied", [False, True])
def test_decay_is_for_matrices_of_layers_only(tied: bool) -> None:
    model = Llama(LlamaConfig(32, 2, 4, 2, 60, 48, tie_embeddings=tied))
    optimizer = configure_optimizer(model, 1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names.pop(id(parameter)): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert not names  # each parameter in exactly one group
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-5
    for name, value in decay.items():
        is_kept = "norm" in name or name == "tok_embeddings.weight"
        assert value == (0.0 if is_kept else 0.1), name


@given(
    n_steps=st.integers(2, 300),
    warmup_share=st.floats(0, 1),
    peak=st.floats(1e-5, 1),
    floor=st.floats(0, 1),
)
def test_schedule_rises_falls_and_ends_at_the_floor(
    n_steps: int, warmup_share: float, peak: float, floor: float
) -> None:
    warmup = int(warmup_share * (n_steps - 1))
    rates = [
        learning_rate(t, n_steps, peak=peak, warmup=warmup, floor=floor)
        for t in range(n_steps + 5)
    ]
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(peak)
    assert rates[n_steps - 1] == pytest.approx(floor * peak)
    assert rates[-1] == pytest.approx(floor * peak)


# The loop and the trainer


@pytest.mark.parametrize("precision", sorted({"32-true", best_precision()}))
def test_trainer_equals_a_plain_loop_to_the_last_bit(
    shards: Path, precision: Any
) -> None:
    model, plain = Llama(CONFIG), []
    model.init_weights(seed=0)
    optimizer = configure_optimizer(model, 3e-3)
    dataset = TokenDataset(shards / "train", 16)
    for step in range(6):
        windows = dataset.batch(step, batch_size=8)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, peak=3e-3, warmup=2)
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision):
            hidden = model(windows[:, :-1], return_hidden=True)
            loss = vocabulary_loss(hidden, model.output.weight, windows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plain.append(loss.item())
    watched, module = Losses(), make_module()
    trainer = make_trainer(6, watched, precision=precision)
    trainer.fit(module, make_data(shards, [(1.0, 16, 8)]))
    assert watched.values == plain
    for mine, other in zip(module.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_accumulating_equals_a_larger_batch(shards: Path) -> None:
    whole = fit(shards, [(1.0, 32, 8)])
    parts = fit(shards, [(1.0, 32, 8)], accumulate_grad_batches=2)
    summed = torch.tensor(parts).view(6, 2).sum(1)
    torch.testing.assert_close(summed, torch.tensor(whole), rtol=1e-5, atol=0)


def test_the_same_seed_gives_the_same_losses(shards: Path) -> None:
    assert fit(shards) == fit(shards)


def test_what_is_logged(shards: Path) -> None:
    module, data = make_module(), make_data(shards, validation_windows=7)
    trainer = make_trainer(
        4, limit_val_batches=1.0, val_check_interval=2, log_every_n_steps=1
    )
    trainer.fit(module, data)
    logged = trainer.callback_metrics
    assert logged["learning_rate"] == pytest.approx(3e-4)
    assert logged["tokens_per_second"] > 0
    assert logged["gradient_norm"] > 0
    assert logged["loss"].isfinite()
    held_out = TokenDataset(shards / "validation", 64)
    windows = torch.stack([held_out[i] for i in range(7)])
    with torch.no_grad():
        loss = next_token_loss(module.model(windows[:, :-1]), windows[:, 1:])
    torch.testing.assert_close(logged["validation_loss"], loss)
    bits = loss / math.log(2) * held_out.n_tokens / held_out.n_characters
    torch.testing.assert_close(logged["bits_per_character"], bits)


def test_the_model_is_laid_out_by_the_function_given(shards: Path) -> None:
    seen: list[Any] = []

    def lay_out(build: Any, fill: Any) -> Llama:
        seen.append(on_one_device(build, fill))
        return seen[0]

    module = make_module(lay_out=lay_out, peak_lr=0.0)
    make_trainer(1).fit(module, make_data(shards))
    assert seen == [module.model]
    expected = Llama(CONFIG)
    expected.init_weights(seed=0)
    assert torch.equal(module.model.output.weight, expected.output.weight)


# Lengths, and going on


def batches(loader: MixedLengthLoader, n: int) -> list[Tensor]:
    return [batch for _, batch in zip(range(n), loader, strict=False)]


def make_loader(
    shards: Path, rank: int = 0, world_size: int = 1, n_parts: int = 1
) -> MixedLengthLoader:
    datasets = [TokenDataset(shards / "train", n, seed=3) for n in (16, 64)]
    place = (rank, world_size, n_parts)
    return MixedLengthLoader(datasets, [0.75, 0.25], [8, 4], *place)


def test_lengths_are_mixed_evenly(shards: Path) -> None:
    seen = batches(make_loader(shards), 40)
    for start in range(0, 40, 4):
        shapes = sorted(tuple(batch.shape) for batch in seen[start : start + 4])
        assert shapes == [(4, 65)] + [(8, 17)] * 3
    for length, size in ((16, 8), (64, 4)):
        mine = [batch for batch in seen if batch.shape[1] == length + 1]
        dataset = TokenDataset(shards / "train", length, seed=3)
        for step, batch in enumerate(mine):
            assert torch.equal(batch, dataset.batch(step, size))


def test_processes_share_what_one_would_see(shards: Path) -> None:
    alone = batches(make_loader(shards), 8)
    shared = [batches(make_loader(shards, rank, 2), 8) for rank in (0, 1)]
    for whole, *parts in zip(alone, *shared, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_parts_of_all_processes_are_the_batch_and_others_go_on(shards: Path) -> None:
    alone = batches(make_loader(shards), 8)
    loaders = [make_loader(shards, rank, 2, n_parts=2) for rank in (0, 1)]
    first, second = (batches(loader, 8) for loader in loaders)
    for step in range(4):
        places = slice(2 * step, 2 * step + 2)
        parts = [*first[places], *second[places]]
        assert torch.equal(torch.cat(parts), alone[step])
    four = [make_loader(shards, rank, 4) for rank in range(4)]
    for loader in four:
        loader.load_state_dict(loaders[0].state_dict())
    for step, parts in enumerate(zip(*(batches(x, 4) for x in four), strict=True), 4):
        assert torch.equal(torch.cat(parts), alone[step])


def test_a_batch_that_cannot_be_divided_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"batch of 4 .* 2 processes x 4 parts .* = 8"):
        make_loader(shards, world_size=2, n_parts=4)


@settings(deadline=None, max_examples=20)
@given(stop=st.integers(0, 9))
def test_a_loader_goes_on_where_it_stopped(shards: Path, stop: int) -> None:
    whole = batches(make_loader(shards), 10)
    stopped = make_loader(shards)
    iterator = iter(stopped)
    for _ in range(stop):
        next(iterator)
    fresh = make_loader(shards)
    fresh.load_state_dict(stopped.state_dict())
    for mine, other in zip(batches(fresh, 10 - stop), whole[stop:], strict=True):
        assert torch.equal(mine, other)


def test_a_loader_refuses_the_position_of_another(shards: Path) -> None:
    state = make_loader(shards).state_dict()
    datasets = [TokenDataset(shards / "train", n, seed=4) for n in (16, 64)]
    with pytest.raises(ValueError, match="seed = 3, not 4"):
        MixedLengthLoader(datasets, [0.75, 0.25], [8, 4]).load_state_dict(state)
    datasets = [TokenDataset(shards / "train", n, seed=3) for n in (16, 32)]
    with pytest.raises(ValueError, match="lengths"):
        MixedLengthLoader(datasets, [0.75, 0.25], [8, 2]).load_state_dict(state)


class SaveAndStop(Callback):
    def __init__(self, batch: int, path: Path):
        self.batch, self.path = batch, path

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize(("step", "parts"), [(1, 1), (2, 1), (4, 1), (3, 2)])
def test_stopped_and_resumed_is_never_stopped(
    shards: Path, tmp_path: Path, step: int, parts: int
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": parts}
    whole = fit(shards, **options)
    before, path = Losses(), tmp_path / "stopped.ckpt"
    callback = SaveAndStop(step * parts - 1, path)
    make_trainer(6, before, callback, **options).fit(make_module(), make_data(shards))
    after = Losses()
    trainer = make_trainer(6, after, **options)
    trainer.fit(make_module(), make_data(shards), ckpt_path=path)
    assert len(before.values) == step * parts
    assert before.values + after.values == whole


# What goes wrong


class BreakAt(Callback):
    """Makes the loss or only the gradient infinite, and saves after each step."""

    def __init__(self, step: int, what: str, path: Path):
        self.step, self.what, self.path = step, what, path

    def on_train_batch_start(self, trainer: Trainer, module: Any, *rest: Any) -> None:
        if trainer.global_step == self.step and self.what == "loss":
            module.model.norm.weight.data[0] = math.nan

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_step == self.step and self.what == "gradient":
            module.model.output.weight.grad[0, 0] = math.inf

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run(
    shards: Path, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "last.ckpt"
    trainer = make_trainer(6, BreakAt(3, what, path))
    with pytest.raises(FloatingPointError, match="at step 3 the loss or its gradient"):
        trainer.fit(make_module(), make_data(shards))
    kept = torch.load(path, weights_only=True)
    assert kept["global_step"] == 3  # after steps 0, 1 and 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_schedule_needs_a_length(shards: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(-1, max_epochs=1).fit(make_module(), make_data(shards))


def test_clipping_is_set_in_one_place(shards: Path) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        make_trainer(gradient_clip_val=1.0).fit(make_module(), make_data(shards))


@pytest.mark.parametrize("shares", [(0.5, 0.4), (1.5, -0.5)])
def test_shares_add_up(shards: Path, shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="the shares of the lengths"):
        make_data(shards, [(shares[0], 16, 8), (shares[1], 64, 2)])
