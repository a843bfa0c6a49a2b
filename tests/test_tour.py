"""The tour, end to end, in a size of seconds."""

import json
import math
import os
import shutil
import signal

import pytest
import yaml
from tiny_training import KILLED, in_process

from llama2_lite.runtime.cli import main

TINY = {
    "documents": 1500,
    "validation_documents": 200,
    "vocab_size": 400,
    "model": "town-small",
    "model_overrides": {"dim": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 128},
    "max_steps": 12,
    "peak_lr": 4e-3,
    "warmup": 2,
    "lengths": [[0.75, 32, 4], [0.25, 128, 1]],
    "validate_every": 6,
    "checkpoint_every": 4,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def toured(recipe, tmp_path_factory):
    """A finished tour."""
    folder = tmp_path_factory.mktemp("runs") / "tour"
    assert (
        main(["tour", "--base-only", f"--folder={folder}", f"--config={recipe}"]) == 0
    )
    return folder


def test_report(toured):
    report = json.loads((toured / "report.json").read_text())
    assert set(report["right"]) == {
        *("facts_trained_wording", "facts_unseen_wording"),
        *("sums_seen", "sums_held_out"),
    }
    assert all(0 <= share <= 1 for share in report["right"].values())
    assert report["training_tokens"] == 9 * 32 * 4 + 3 * 128
    bits = report["loss"] / math.log(2)
    assert 1 < bits / report["bits_per_character"] < 5  # characters in a token
    assert 0 < report["estimate"] < report["bits_per_character"] < 8
    assert set(report["minutes"]) == {"tokenizer", "corpus", "base", "evaluation"}
    assert report["tokens_per_second"] > 0


def test_nothing_is_made_twice(toured, recipe, capfd):
    files = [path for path in toured.rglob("*") if path.is_file()]
    times = {
        path: path.stat().st_mtime_ns for path in files if "report" not in path.name
    }
    assert (
        main(["tour", "--base-only", f"--folder={toured}", f"--config={recipe}"]) == 0
    )
    out, err = capfd.readouterr()
    assert "facts recalled" in out
    assert "pretraining" not in err
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_depends_on_a_change_is_made_again(toured, recipe, tmp_path, capfd):
    folder = shutil.copytree(toured, tmp_path / "tour")
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(TINY | {"max_steps": 4}))
    capfd.readouterr()
    assert (
        main(["tour", "--base-only", f"--folder={folder}", f"--config={changed}"]) == 0
    )
    err = capfd.readouterr().err
    assert "base: pretraining" in err
    assert "tokenizer: learning" not in err
    before, after = (
        json.loads((path / "report.json").read_text()) for path in (toured, folder)
    )
    assert after["training_tokens"] < before["training_tokens"]


def test_the_seed_matters(toured, recipe, tmp_path):
    from llama2_lite.runtime.tour import Recipe, Stages

    keys = {
        Stages(tmp_path, Recipe.read(recipe), seed).tokenizer().key for seed in (0, 1)
    }
    assert len(keys) == 2


def test_the_base_model_speaks(toured, capfd):
    assert main(["generate", str(toured / "base"), "Question:"]) == 0
    assert capfd.readouterr().out.startswith("Question:")


def die_in_training(folder, recipe, name, nth):
    from llama2_lite.runtime import checkpoints, tour

    module = {"save_file": checkpoints, "write_shards": tour, "note_seconds": tour}[
        name
    ]
    original, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, counted)
    tour.tour(folder, recipe=recipe)


def finish_tour(folder, recipe):
    from llama2_lite.runtime.tour import tour

    tour(folder, recipe=recipe)


def test_a_killed_tour_continues(toured, recipe, tmp_path):
    folder = tmp_path / "tour"
    for name, nth in [
        ("write_shards", 2),
        ("save_file", 1),
        ("save_file", 2),
        ("note_seconds", 1),
    ]:
        assert in_process(die_in_training, folder, recipe, name, nth) == KILLED
    assert in_process(finish_tour, folder, recipe) == 0
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        made, expected = folder / "base" / name, toured / "base" / name
        assert made.read_bytes() == expected.read_bytes()
    assert not list(folder.glob("*.partial"))
    assert not (folder / "base" / "checkpoints").exists()
