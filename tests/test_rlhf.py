"""The loop of RLHF: its order, its figures, and two small rounds on the town."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_tour import BASE, shrink
from tiny_training import KILLED, in_process

from llama2_lite.reward import Preference
from llama2_lite.rlhf import (
    Round,
    Version,
    accuracy_by_round,
    plan_rounds,
    run_rounds,
)
from llama2_lite.runtime.alignment import AlignmentRecipe
from llama2_lite.runtime.cli import main
from llama2_lite.runtime.configs import find_config
from llama2_lite.runtime.rounds import RoundsRecipe
from llama2_lite.runtime.versions import count_wins, histogram, mean_share

# The loop


def test_the_schedule_is_the_papers():
    assert plan_rounds(5) == [
        Round(1, False, False),
        Round(2, False, False),
        Round(3, False, False),
        Round(4, True, False),
        Round(5, True, True),
    ]
    assert plan_rounds(2, all_from=2, ppo_from=1) == [
        Round(1, False, True),
        Round(2, True, True),
    ]


@pytest.mark.parametrize("n_rounds", [0, -1])
def test_no_rounds_are_refused(n_rounds):
    with pytest.raises(ValueError, match=f"at least one round, not {n_rounds}"):
        plan_rounds(n_rounds)


class Recorder:
    """Steps that note their arguments; what they make is named after them."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, step):
        def call(number, *arguments):
            copied = [list(a) if isinstance(a, list) else a for a in arguments]
            self.calls.append((step, number, *copied))
            return f"{step}{number}"

        return call


def test_each_step_gets_what_the_ones_before_have_made():
    steps = Recorder()
    rounds = [Round(1, False, False), Round(2, True, True), Round(3, False, False)]
    versions = list(run_rounds("start", steps, rounds))
    assert steps.calls == [
        ("collect", 1, "start"),
        ("learn", 1, ["collect1"]),
        ("sample", 1, "start", "learn1"),
        ("tune", 1, "start", ["sample1"], "learn1"),
        ("collect", 2, "tune1"),
        ("learn", 2, ["collect1", "collect2"]),
        ("sample", 2, "tune1", "learn2"),
        ("tune", 2, "tune1", ["sample1", "sample2"], "learn2"),
        ("reinforce", 2, "tune2", "learn2"),
        ("collect", 3, "reinforce2"),
        ("learn", 3, ["collect1", "collect2", "collect3"]),
        ("sample", 3, "reinforce2", "learn3"),
        ("tune", 3, "reinforce2", ["sample3"], "learn3"),
    ]
    assert versions == [
        Version(1, "tune1", "learn1", "tune1"),
        Version(2, "tune2", "learn2", "reinforce2"),
        Version(3, "tune3", "learn3", "tune3"),
    ]


def test_a_version_is_there_before_the_next_round_begins():
    steps = Recorder()
    versions = run_rounds("start", steps, plan_rounds(5))
    assert next(versions).number == 1
    assert {number for _, number, *_ in steps.calls} == {1}


# Figures


def pair(chosen: str, rejected: str) -> Preference:
    return Preference([{"role": "user", "content": "Say ha."}], chosen, rejected)


def count_letters(pairs):
    sides = [[p.chosen for p in pairs], [p.rejected for p in pairs]]
    return tuple(torch.tensor([float(len(text)) for text in side]) for side in sides)


def test_accuracy_by_round_counts_pairs_and_a_tie_is_not_right():
    rounds = [[pair("aa", "a"), pair("a", "aaa")], [pair("aa", "bb")]]

    def reverse(pairs):
        return count_letters(pairs)[::-1]

    table = accuracy_by_round([count_letters, reverse, count_letters], rounds)
    assert table.tolist() == [[0.5, 0.0], [0.5, 0.0], [0.5, 0.0]]
    with pytest.raises(ValueError, match="without pairs"):
        accuracy_by_round([count_letters], [rounds[0], []])


def test_wins_by_score():
    ours, theirs = np.array([1.0, 2.0, 2.0, 0.5]), np.array([0.0, 2.0, 1.0, 1.0])
    wins = count_wins(ours, theirs)
    assert (wins.wins, wins.ties, wins.losses) == (2, 1, 1)
    assert wins.rate.value == pytest.approx(2 / 3)
    assert count_wins(ours, ours).rate == (0.5, 0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_an_interval_lies_around_its_mean(values):
    found = mean_share(np.array(values))
    assert found.low <= found.value + 1e-12
    assert found.high - found.value == pytest.approx(found.value - found.low)


def test_the_interval_of_a_mean_by_hand():
    found = mean_share(np.array([0.0, 0.5, 1.0]))
    half = 1.96 * 0.5 / 3**0.5
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half))


@given(st.lists(st.floats(-40, 40), max_size=50))
def test_a_histogram_counts_every_score_once(scores):
    counts = histogram(np.array(scores), np.array([-1.0, 3.0]))
    assert sum(counts) == len(scores)
    assert histogram(np.array([-9.0, 1.1]), np.array([-1.0, 3.0]))[::12] == [1, 1]


# Two rounds on the town


def tiny_rounds() -> dict:
    recipe = yaml.safe_load(find_config("rounds").read_text())
    recipe |= {"all_from": 2, "ppo_from": 2, "general": {"requests": 40, "written": 20}}
    shrink(recipe)
    return recipe


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name, recipe in (("base", BASE), ("rounds", tiny_rounds())):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return [f"--config={folder}/base.yaml", f"--rounds-config={folder}/rounds.yaml"]


def few_demonstrations() -> None:
    """Make fine-tuning a matter of seconds."""
    content = yaml.safe_load(find_config("alignment").read_text())
    content["sft"]["demonstrations"] = 1000
    read = AlignmentRecipe.read

    def read_less(path=None):
        from tempfile import NamedTemporaryFile

        with NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(content, file)
            file.flush()
            return read(path or file.name)

    AlignmentRecipe.read = read_less  # type: ignore[method-assign]


def note_prompts(path) -> None:
    """Write down what PPO asks, which it keeps nowhere."""
    from llama2_lite.runtime import alignment

    original = alignment.PromptDataset

    def noted(dialogs, *rest):
        with path.open("a") as file:
            file.writelines(f"{json.dumps(dialog)}\n" for dialog in dialogs)
        return original(dialogs, *rest)

    alignment.PromptDataset = noted


def run_tour(folder, *arguments) -> int:
    few_demonstrations()
    note_prompts(folder.with_name(f"{folder.name}.asked"))
    return main(["tour", f"--folder={folder}", "--rounds=2", *arguments])


def die_in_rounds(folder, arguments, label: str) -> None:
    """Be killed when a step has been trained, before it is complete."""
    from llama2_lite.runtime import alignment

    original = alignment.note_seconds

    def note_seconds(made, seconds):
        if made.name == f"{label}.partial":
            os.kill(os.getpid(), signal.SIGKILL)
        original(made, seconds)

    alignment.note_seconds = note_seconds
    run_tour(folder, *arguments)


@pytest.fixture(scope="module")
def toured(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tour"
    assert in_process(run_tour, folder, *recipes) == 0
    return folder


STEPS = ["pairs", "helpfulness", "safety", "picks", "v"]
MADE = [f"{step}{n}" for n in (1, 2) for step in STEPS] + ["ppo2", "general"]


def test_two_rounds_make_two_versions(toured):
    rounds = toured / "rounds"
    assert all((rounds / name / "artifact.json").is_file() for name in MADE)
    report = json.loads((rounds / "report.json").read_text())
    assert list(report["versions"]) == ["sft", "v1", "v2", "v2 with PPO"]
    assert report["rounds"] == 2
    for found in report["versions"].values():
        assert sum(found["histograms"]["general"]["helpfulness"]) == 500
        assert sum(found["histograms"]["newest"]["safety"]) == 300
        wins, ties, losses, _ = found["wins"]["sft"]["oracle"]["helpful"]
        assert wins + ties + losses == 500
    assert np.shape(report["accuracy"]["helpfulness"]["shares"]) == (2, 2)
    assert report["versions"]["sft"]["wins"]["sft"]["newest"]["safe"][:3] == [0, 300, 0]


TRAINED = [
    *(f"pairs*/{name}.json" for name in ("train_*", "written_*", "refusals")),
    *("picks*/picks.json", "general/pairs.json"),
]


def test_no_evaluation_prompt_is_trained_on(toured):
    from llama2_lite.runtime.judge import evaluation_prompts
    from llama2_lite.town import build_town

    judged = {task.prompt for task in evaluation_prompts(build_town()).all()}
    lines = toured.with_name("tour.asked").read_text().splitlines()
    asked = {"ppo": [json.loads(line) for line in lines]}
    for pattern in TRAINED:
        paths = (toured / "rounds").glob(pattern)
        records = [record for path in paths for record in json.loads(path.read_text())]
        asked[pattern] = [
            record["prompt"] if isinstance(record, dict) else record[0]
            for record in records
        ]
    for stage, prompts in asked.items():
        contents = {prompt[-1]["content"] for prompt in prompts}
        assert len(contents) > 15, stage
        assert not contents & judged, stage


def test_killed_and_resumed_is_never_killed(toured, recipes, tmp_path):
    folder = shutil.copytree(toured, tmp_path / "tour")
    again = ["picks2", "v2", "ppo2", "judgement"]
    for name in again:
        shutil.rmtree(folder / "rounds" / name)
    for name in again[:3]:
        assert in_process(die_in_rounds, folder, recipes, name) == KILLED
    assert in_process(run_tour, folder, *recipes) == 0
    for name in ("v2/model.safetensors", "ppo2/model.safetensors", "picks2/picks.json"):
        made, expected = folder / "rounds" / name, toured / "rounds" / name
        assert made.read_bytes() == expected.read_bytes()
    versions = [
        json.loads((f / "rounds" / "judgement" / "versions.json").read_text())
        for f in (folder, toured)
    ]
    assert versions[0] == versions[1]
    assert not list((folder / "rounds").glob("*.partial"))


# Bad input


def test_rounds_on_the_command_line(capsys):
    assert main(["tour", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1, but is 0" in capsys.readouterr().err
    assert main(["tour", "--rounds", "5", "--base-only"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main(["tour", "--rounds-config", "x.yaml"]) == 2
    assert "is the recipe of --rounds N: give both" in capsys.readouterr().err


def test_a_mistake_in_the_recipe_is_found_before_anything_is_trained(tmp_path, capsys):
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(tiny_rounds() | {"round": 3}))
    folder = tmp_path / "tour"
    recipe = f"--rounds-config={path}"
    assert main(["tour", f"--folder={folder}", "--rounds=2", recipe]) == 2
    assert "there is no key 'round'" in capsys.readouterr().err
    assert not folder.exists()


def test_an_unknown_key_of_the_recipe_is_named(tmp_path):
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(tiny_rounds() | {"round": 3}))
    with pytest.raises(ValueError, match="round"):
        RoundsRecipe.read(path)
