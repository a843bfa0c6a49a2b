"""The tour's stages after the base model: recipe, tables, and the whole in small.

In the size of the book they are built by `make tour`, before the chapters that open
them.
"""

import json
import os
import signal
from functools import partial

import pytest
import yaml
from tiny_tour import BASE, shrink
from tiny_training import KILLED, in_process

from llama2_lite.runtime import alignment
from llama2_lite.runtime.alignment import HARMLESS, AlignmentRecipe, AlignmentStages
from llama2_lite.runtime.cli import main
from llama2_lite.runtime.configs import find_config
from llama2_lite.runtime.gains import print_gains, write_share
from llama2_lite.runtime.tour import Recipe, Stages


def changed(tmp_path, **sections):
    recipe = yaml.safe_load(find_config("alignment").read_text())
    for name, values in sections.items():
        recipe[name] |= values
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_recipe_is_read(tmp_path):
    recipe = AlignmentRecipe.read()
    assert recipe.reward.safety.margins in ("none", "small", "large")
    other = AlignmentRecipe.read(changed(tmp_path, ppo={"settings": {"clip": 0.3}}))
    assert other.ppo.settings.clip == 0.3
    assert other.sft == recipe.sft


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [("sft", {"epoch": 2}, "epoch"), ("ppo", {"settings": {"klip": 1}}, "klip")],
)
def test_an_unknown_key_is_named(tmp_path, section, values, named):
    path = changed(tmp_path, **{section: values})
    with pytest.raises(ValueError, match=named) as caught:
        AlignmentRecipe.read(path)
    assert str(path) in str(caught.value)


def test_requests_are_of_the_training_split_and_some_are_unsafe(tmp_path):
    stages = AlignmentStages(Stages(tmp_path, Recipe.read()), AlignmentRecipe.read())
    dialogs = stages.requests(300, 0)
    trained = {task.prompt: task.kind for task in stages.town.tasks("train")}
    kinds = [trained[dialog[0]["content"]] for dialog in dialogs]
    assert 0.1 < kinds.count("unsafe") / len(kinds) < 0.5
    assert dialogs != stages.requests(300, 1)


def test_what_ppo_is_judged_by_is_not_what_it_learns_from(tmp_path):
    stages = AlignmentStages(Stages(tmp_path, Recipe.read()), AlignmentRecipe.read())
    learned = stages.requests(4000, 0)
    others = stages.other_requests(learned, 512, 1)
    prompts = {dialog[0]["content"] for dialog in others}
    assert not prompts & {dialog[0]["content"] for dialog in learned}
    trained = {task.prompt: task.kind for task in stages.town.tasks("train")}
    kinds = [trained[dialog[0]["content"]] for dialog in others]
    assert set(kinds) == {*HARMLESS, "unsafe"}
    assert 0.2 < kinds.count("unsafe") / len(kinds) < 0.33
    assert others == stages.other_requests(learned, 512, 1)
    assert others != stages.other_requests(learned, 512, 2)


def test_tables(capsys):
    names = ("correct", "violations", "false refusals", "borderline refusals")
    shares = {name: [0.5, 0.4, 0.6] for name in names}
    wins = {"helpful": [6, 3, 4, [0.6, 0.3, 0.8]], "safe": [9, 1, 0, [1.0, 0.7, 1.0]]}
    report = {
        "stages": {
            "sft": {"shares": shares},
            "ppo": {"shares": shares, "against sft": wins},
        },
        "accuracy": {
            axis: {"better": [0.75, 0.7, 0.8]} for axis in ("helpfulness", "safety")
        },
        "adherence": {
            "ppo": {"1": [0.9, 0.8, 0.95], "20": [0.1, 0.05, 0.2]},
            "chat": {"1": [0.9, 0.8, 0.95], "20": [0.8, 0.7, 0.85]},
        },
    }
    seconds = {"sft": 30.0, "ppo": 90.0, "helpfulness": 60.0, "safety": 60.0}
    print_gains(report, seconds)
    out = capsys.readouterr().out
    assert out.count("75.0 [70, 80]") == 2
    assert out.count("no pairs") == 2 * 3  # of the other levels
    assert "1.5" in out
    (wins,) = (line for line in out.splitlines() if "helpful wins" in line)
    assert "60.0 [30, 80]" in wins
    (ties,) = (line for line in out.splitlines() if "helpful ties" in line)
    assert "23.1 [8, 50]" in ties  # 3 of 13, by Wilson's formula
    (told,) = (line for line in out.splitlines() if "10.0 [5, 20]" in line)
    assert "80.0 [70, 85]" in told.partition("10.0")[2]
    assert write_share(None) == ""


# The whole tour in small

STAGES = ["sft", "helpfulness", "safety", "rejection", "ppo", "chat"]


def in_small() -> dict:
    recipe = yaml.safe_load(find_config("alignment").read_text())
    recipe["sft"]["demonstrations"] = 1000
    shrink(recipe)
    for how in recipe["reward"].values():
        how["batch_size"] = 8
    recipe["ppo"]["iterations"] = 5
    recipe["ppo"]["held_out_requests"] = 16
    recipe["chat"] |= {
        "dialogs": [[60, 1], [40, 4]],
        "plain": 0.8,  # so small a model obeys nothing
        "lengths": [[0.5, 200, 4], [0.5, 500, 2]],
        "steps": 5,
        "warmup": 1,
    }
    return recipe


def tour_in_small(folder, recipes) -> int:
    """The tour, with a recipe of its own for what follows the base model."""
    # in its few tokens a question takes too many for a dialogue of twenty turns
    alignment.adherence = partial(alignment.adherence, n_dialogs=11, turns=(1, 4))
    read = AlignmentRecipe.read
    AlignmentRecipe.read = lambda path=None: read(path or recipes / "alignment.yaml")
    return main(["tour", f"--folder={folder}", f"--config={recipes}/base.yaml"])


def die_in_stage(folder, recipes, stage: str, nth: int) -> None:
    """Be killed at a save of a stage's training, before it is written."""
    from llama2_lite.runtime import checkpoints

    original, saves = checkpoints.save_file, []

    def save_file(tensors, path):
        if f"{stage}.partial" in str(path):
            saves.append(path)
            if len(saves) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
        original(tensors, path)

    checkpoints.save_file = save_file
    tour_in_small(folder, recipes)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name, recipe in (("base", BASE), ("alignment", in_small())):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def toured(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tour"
    assert in_process(tour_in_small, folder, recipes) == 0
    return folder


def test_the_report_holds_what_each_stage_won(toured):
    report = json.loads((toured / "report.json").read_text())
    assert list(report["stages"]) == ["base", "sft", "rejection", "ppo", "chat"]
    assert set(STAGES) < set(report["minutes"])
    for stage in ("rejection", "ppo", "chat"):
        wins, ties, losses, _ = report["stages"][stage]["against sft"]["helpful"]
        assert wins + ties + losses == 500
    assert set(report["adherence"]) == {"ppo", "chat"}
    for stages in report["stages"].values():
        for value, low, high in stages["shares"].values():
            assert 0 <= low <= value <= high <= 1


def test_killed_in_each_stage_and_resumed_is_never_killed(toured, recipes, tmp_path):
    folder = tmp_path / "tour"
    for number, stage in enumerate(STAGES):
        nth = 1 + number % 3  # before the first checkpoint, and after one or two
        assert in_process(die_in_stage, folder, recipes, stage, nth) == KILLED, stage
        assert (folder / f"{stage}.partial").is_dir()
    assert in_process(tour_in_small, folder, recipes) == 0
    names = [f"{stage}/model.safetensors" for stage in STAGES]
    for name in (*names, "preferences/train_safety.json", "judgement/stages.json"):
        assert (folder / name).read_bytes() == (toured / name).read_bytes(), name
    assert not list(folder.glob("*.partial"))
