"""The tour, end to end, in a size of seconds."""

import json
import math
import os
import shutil
import signal

import pytest
import yaml
from tiny_tour import BASE
from tiny_training import KILLED, in_process

from llama2_lite.runtime.cli import main

TINY = BASE | {"model_overrides": BASE["model_overrides"] | {"max_seq_len": 128}}


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


def write_changed(path, **values):
    path.write_text(yaml.safe_dump(TINY | values))
    return path


def test_what_depends_on_a_change_is_made_again(toured, tmp_path, capfd):
    from llama2_lite.runtime.tour import tour

    folder = shutil.copytree(toured, tmp_path / "tour")
    changed = write_changed(tmp_path / "changed.yaml", max_steps=4)
    capfd.readouterr()
    tour(folder, recipe=changed)
    err = capfd.readouterr().err
    assert "base: pretraining" in err
    assert "tokenizer: learning" not in err
    before, after = (
        json.loads((path / "report.json").read_text()) for path in (toured, folder)
    )
    assert after["training_tokens"] < before["training_tokens"]


@pytest.mark.parametrize(
    ("seed", "values", "words"),
    [
        (1, {}, "seed 0, not 1"),
        (0, {"max_steps": 4}, "max_steps 12, not 4"),
        (0, {"documents": 9}, "documents 1500, not 9"),
        (0, {"model_overrides": {"dim": 32}}, "dim 16, not 32"),
        (0, {"lengths": [[1, 8, 4]]}, "lengths [[0.75, 32, 4], [0.25, 128, 1]], not"),
    ],
)
def test_another_tour_is_not_replaced(toured, tmp_path, seed, values, words, capsys):
    files = {path: path.stat() for path in toured.rglob("*")}
    other = write_changed(tmp_path / "other.yaml", **values)
    options = [f"--folder={toured}", f"--config={other}", f"--seed={seed}"]
    assert main(["tour", "--base-only", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {toured} holds a tour with {words}")
    assert err.endswith("; choose another --folder\n")
    assert {path: path.stat() for path in toured.rglob("*")} == files


def test_a_tour_of_other_code_is_made_anew(toured, recipe, tmp_path, capfd):
    folder = shutil.copytree(toured, tmp_path / "tour")
    record = folder / "base" / "artifact.json"
    made = json.loads(record.read_text())
    record.write_text(json.dumps(made | {"key": "of other code"}))
    capfd.readouterr()
    assert (
        main(["tour", "--base-only", f"--folder={folder}", f"--config={recipe}"]) == 0
    )
    err = capfd.readouterr().err
    assert "base: pretraining" in err
    assert "tokenizer: learning" not in err
    assert json.loads(record.read_text()) == made


def test_what_later_stages_have_won_is_kept(toured, recipe, tmp_path):
    folder = shutil.copytree(toured, tmp_path / "tour")
    gains = {"stages": {"sft": 1}, "accuracy": {"safety": 2}, "adherence": {}}
    key = json.loads((folder / "base" / "artifact.json").read_text())["key"]
    for name, file, content in (
        ("judgement", "artifact.json", {"key": "", "inputs": {"base": key}}),
        ("judgement", "stages.json", gains),
        ("sft", "seconds.json", 90),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text(json.dumps(content))
    command = ["tour", "--base-only", f"--folder={folder}", f"--config={recipe}"]
    assert main(command) == 0
    report = json.loads((folder / "report.json").read_text())
    of_base = json.loads((toured / "report.json").read_text())
    minutes = of_base["minutes"] | {"sft": 1.5}
    assert report == of_base | gains | {"minutes": minutes}

    judgement = {"key": "", "inputs": {"base": "another"}}
    (folder / "judgement" / "artifact.json").write_text(json.dumps(judgement))
    assert main(command) == 0
    assert json.loads((folder / "report.json").read_text()) == of_base


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"documents": 0}, "documents must be a whole number above 0, but is 0"),
        ({"validation_documents": -5}, "validation_documents must be a whole number"),
        ({"max_steps": 0}, "max_steps must be a whole number above 0, but is 0"),
        ({"validate_every": 0}, "validate_every must be a whole number above 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number above 0"),
        ({"peak_lr": -1}, "peak_lr must be a number above 0, but is -1"),
        ({"peak_lr": math.nan}, "peak_lr must be a number above 0, but is nan"),
        ({"warmup": -1}, "warmup must be 0 or more, but is -1"),
        ({"model": "3b"}, "model: no preset '3b'; there are 7b, "),
        ({"model_overrides": {"dmi": 16}}, "model_overrides has no key 'dmi'; it has "),
        ({"model_overrides": {"vocab_size": 16}}, "has no key 'vocab_size'; it has "),
        ({"model_overrides": {"dim": "a"}}, "dim must be a whole number above 0, but"),
        ({"model_overrides": {"dim": 16.5}}, "dim must be a whole number above 0"),
        ({"model_overrides": {"multiple_of": 0}}, "multiple_of must be a whole"),
        ({"model_overrides": {"tie_embeddings": 2}}, "must be true or false, but is 2"),
        ({"model_overrides": {"dim": 17}}, "model: n_heads = 2 does not divide dim"),
        ({"lengths": []}, "lengths: the shares must add up to 1, but are []"),
        ({"lengths": [[0.5, 32, 4]]}, "lengths: the shares must add up to 1, but are"),
        ({"lengths": [[1.0, 32]]}, "all above 0; [1.0, 32] is not one"),
        ({"lengths": [[1.0, "a", 1]]}, "all above 0; [1.0, 'a', 1] is not one"),
        ({"lengths": [[1.0, 32, 0]]}, "all above 0; [1.0, 32, 0] is not one"),
        ({"lengths": [[1.0, 1025, 1]]}, "longer than max_seq_len of the model, 1024"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_made(
    tmp_path, values, words, capsys
):
    folder, path = tmp_path / "tour", tmp_path / "bad.yaml"
    write_changed(path, **{"model_overrides": {}} | values)
    assert main(["tour", "--base-only", f"--folder={folder}", f"--config={path}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: ")
    assert words in err
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("seed", [-3, 2**32])
def test_a_bad_seed_is_refused_before_anything_is_made(recipe, tmp_path, seed, capsys):
    folder = tmp_path / "tour"
    options = [f"--folder={folder}", f"--config={recipe}", f"--seed={seed}"]
    assert main(["tour", "--base-only", *options]) == 2
    assert f"from 0 to 4,294,967,295, but is {seed}" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(("more", "least"), [([], 1000), (["--rounds=2"], 256)])
def test_later_stages_need_a_context(recipe, tmp_path, more, least, capsys):
    folder = tmp_path / "tour"
    assert main(["tour", f"--folder={folder}", f"--config={recipe}", *more]) == 2
    err = capsys.readouterr().err
    assert f"{recipe}: max_seq_len of the model must be at least {least} for" in err
    assert not folder.exists()


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
