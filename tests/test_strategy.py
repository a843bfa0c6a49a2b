"""Every layout of a model over processes trains the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_layouts import outcome, run_cases, write_inputs

from llama2_lite.scaling import Layout

LAYOUTS = {
    "copies": Layout(shard=1),
    "sharded": Layout(),
    "both": Layout(shard=2),
    "tensor": Layout(tensor=2),
    "recomputed": Layout(checkpoint_activations=True),
}
STAGES = ("pretraining", "sft", "reward", "gatt")


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
    cases = {
        f"{stage} {name}": (stage, layout, {})
        for stage in STAGES
        for name, layout in LAYOUTS.items()
    }
    return run_cases(4, folder, cases)


@pytest.mark.parametrize("stage", STAGES)
def test_four_processes_train_what_one_trains(stage, folder, by_four):
    alone = outcome(stage, folder)
    assert len(alone["losses"]) == 10
    for name in LAYOUTS:
        assert_same(by_four[f"{stage} {name}"], alone)
