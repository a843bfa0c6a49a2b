"""Every layout of a model over processes trains the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_layouts import outcome, run_cases, write_inputs

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.runtime.convert import convert
from llama2_lite.runtime.strategy import LayoutStrategy, divide
from llama2_lite.scaling import Layout

LAYOUTS = {
    "copies": Layout(shard=1),
    "sharded": Layout(),
    "both": Layout(shard=2),
    "tensor": Layout(tensor=2),
    "recomputed": Layout(checkpoint_activations=True),
}
STAGES = {
    "pretraining": ("copies", "sharded", "both", "tensor", "recomputed"),
    "sft": ("copies", "tensor", "recomputed"),
    "reward": ("copies", "tensor", "recomputed"),
    "gatt": ("copies", "tensor", "recomputed"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def by_four(folder: Path) -> dict[str, Any]:
    cases: dict[str, Any] = {
        f"{stage} {name}": (stage, LAYOUTS[name], {})
        for stage, names in STAGES.items()
        for name in names
    }
    saved, again = {"run": folder / "four"}, {"resume": folder / "four/step-00000006"}
    cases["pretraining saved"] = ("pretraining", Layout(tensor=2), saved)
    cases["pretraining both"] = (
        "pretraining",
        Layout(shard=2),
        {"run": folder / "both"},
    )
    cases["pretraining resumed"] = ("pretraining", Layout(tensor=2), again)
    cases["sft in parts"] = ("sft", Layout(), {"accumulate_grad_batches": 2})
    return run_cases(4, folder, cases)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return {stage: outcome(stage, folder, run=folder / stage) for stage in STAGES}


@pytest.fixture(scope="module")
def by_two(folder: Path, by_four: Any, alone: Any) -> dict[str, Any]:
    fours, both, one = (
        folder / run / "step-00000006" for run in ("four", "both", "pretraining")
    )
    compiled = Layout(checkpoint_activations=True, compile=True)
    parts = {"resume": fours, "accumulate_grad_batches": 2}
    cases = {
        "from four": ("pretraining", Layout(), {"resume": fours}),
        "from four in parts": ("pretraining", Layout(tensor=2), parts),
        "from copies": ("pretraining", Layout(), {"resume": both}),
        "from one": ("pretraining", Layout(shard=1), {"resume": one}),
        "tensor compiled": ("pretraining", Layout(tensor=2, compile=True), {}),
    }
    cases |= {f"{stage} compiled": (stage, compiled, {}) for stage in STAGES}
    return run_cases(2, folder, cases)


@pytest.mark.parametrize("stage", STAGES)
def test_four_processes_train_what_one_trains(stage, alone, by_four):
    assert len(alone[stage]["losses"]) == 10
    for name in STAGES[stage]:
        assert_same(by_four[f"{stage} {name}"], alone[stage])


def test_parts_of_a_batch_are_the_batch(folder, alone, by_four):
    assert_same(by_four["sft in parts"], alone["sft"])
    assert_same(outcome("sft", folder, accumulate_grad_batches=2), alone["sft"])


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_and_recomputed_is_the_same(stage, alone, by_two):
    assert_same(by_two[f"{stage} compiled"], alone[stage])


def test_compiled_where_a_group_shares_products_is_the_same(alone, by_two):
    assert_same(by_two["tensor compiled"], alone["pretraining"])


def last_losses(found: Any) -> Any:
    return found | {"losses": found["losses"][-4:]}


def test_resumed_is_never_interrupted(by_four):
    resumed, straight = (by_four[f"pretraining {how}"] for how in ("resumed", "saved"))
    assert len(resumed["losses"]) == 4
    for name, tensor in last_losses(straight).items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize(
    "case", ["from four", "from four in parts", "from copies", "from one"]
)
def test_a_run_goes_on_in_another_layout(case, by_two, alone):
    assert_same(by_two[case], last_losses(alone["pretraining"]))


def test_one_process_goes_on_where_four_stopped(folder, by_four, alone):
    resumed = outcome("pretraining", folder, resume=folder / "four/step-00000006")
    assert_same(resumed, last_losses(alone["pretraining"]))


def test_a_checkpoint_of_four_becomes_a_model(folder, by_four, tmp_path):
    convert(folder / "four", tmp_path / "model", folder / "tokenizer.model")
    model = Llama.from_pretrained(tmp_path / "model")
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, by_four["pretraining saved"][f"model.{name}"])
    assert (tmp_path / "model" / "tokenizer.model").is_file()


CONFIG = LlamaConfig(32, 2, 4, 2, 400, hidden_dim=48)


@pytest.mark.parametrize(
    ("devices", "layout", "batch", "problem"),
    [
        (3, Layout(tensor=2), 8, "3 processes cannot be divided into groups of"),
        (4, Layout(tensor=4), 8, "layout.tensor = 4 does not divide n_kv_heads = 2"),
        (4, Layout(shard=3), 8, "4 groups, which layout.shard = 3 does not divide"),
        (3, Layout(), 8, "8 windows / 3 groups of processes = 2.67 windows for each"),
    ],
)
def test_what_cannot_be_divided_is_refused(devices, layout, batch, problem):
    given = {"accelerator": "cpu", "devices": devices}
    with pytest.raises(ValueError, match=problem):
        divide(given, layout, CONFIG, [(16, batch)], None)


def test_parts_follow_from_what_a_device_can_take():
    given = {"accelerator": "cpu", "devices": 2, "val_check_interval": 5}
    made = divide(given, Layout(), CONFIG, [(16, 64), (64, 16)], device_batch=2)
    assert made["accumulate_grad_batches"] == 4  # 16 / 2 processes / 2, and 64 / 2 / 8
    assert made["val_check_interval"] == 20
    assert isinstance(made["strategy"], LayoutStrategy)
    alone = divide({"accelerator": "cpu"}, Layout(), CONFIG, [(16, 64)], None)
    assert "strategy" not in alone
