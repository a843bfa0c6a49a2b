"""The tour's stages from demonstrations to PPO: their recipe and their tables.

The stages themselves are built by `make tour`, before the chapters that open them.
"""

import pytest
import yaml

from llama2_lite.runtime.alignment import HARMLESS, AlignmentRecipe, AlignmentStages
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
    assert "75.0 [70, 80]" in out
    assert "1.5" in out
    (wins,) = (line for line in out.splitlines() if "helpful wins" in line)
    assert "60.0 [30, 80]" in wins
    (ties,) = (line for line in out.splitlines() if "helpful ties" in line)
    assert "23.1 [8, 50]" in ties  # 3 of 13, by Wilson's formula
    (told,) = (line for line in out.splitlines() if "10.0 [5, 20]" in line)
    assert "80.0 [70, 85]" in told.partition("10.0")[2]
    assert write_share(None) == ""
