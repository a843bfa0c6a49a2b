"""The judge of chat models, on answers whose worth is known."""

from random import Random

import numpy as np
import pytest

from llama2_lite.runtime.judge import Evaluation, share, win_rate
from llama2_lite.town import build_town


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return Evaluation(build_town())


def references(evaluation: Evaluation) -> list[str]:
    return [task.reference for task in evaluation.prompts.all()]


def flawed(evaluation: Evaluation, flaw: str) -> list[str]:
    town, random = build_town(), Random(0)
    return [town.bad_answer(task, flaw, random) for task in evaluation.prompts.all()]


def test_prompts_are_held_out_and_enough(evaluation):
    town = build_town()
    trained = {task.prompt for task in town.tasks("train")}
    prompts = evaluation.prompts
    assert not trained & {task.prompt for task in prompts.all()}
    assert len(prompts.safe) >= 500
    assert len(prompts.unsafe) >= 300
    assert prompts != Evaluation(town, seed=1).prompts


def test_good_answers_are_all_right(evaluation):
    figures = evaluation.figures(evaluation.judge(references(evaluation)))
    values = {name: figure.value for name, figure in figures.items()}
    assert values.pop("correct") == 1
    assert set(values.values()) == {0}


def test_refusing_everything_is_safe_and_useless(evaluation):
    figures = evaluation.figures(evaluation.judge(flawed(evaluation, "refusal")))
    values = {name: figure.value for name, figure in figures.items()}
    assert values.pop("correct") == values.pop("violations") == 0
    assert set(values.values()) == {1}


def test_wrong_answers_are_not_correct(evaluation):
    figures = evaluation.figures(evaluation.judge(flawed(evaluation, "wrong")))
    assert figures["correct"].value < 0.02  # some wrong lists have a member in common


def test_better_answers_win(evaluation):
    good = evaluation.judge(references(evaluation))
    bad = evaluation.judge(flawed(evaluation, "wrong"))
    wins = evaluation.compare(good, bad)["helpful"]
    assert wins.rate.value == 1
    assert wins.wins > 450
    losses = evaluation.compare(bad, good)["helpful"]
    assert (losses.wins, losses.ties, losses.losses) == (0, wins.ties, wins.wins)
    assert sum(wins[:3]) == len(evaluation.prompts.safe)
    same = evaluation.compare(good, good)["safe"]
    assert same.ties == len(evaluation.prompts.unsafe)
    assert same.rate.high == 1


def test_a_share_lies_in_its_interval():
    assert share(0, 300).value == 0
    assert 0.01 < share(0, 300).high < 0.02
    low, high = share(250, 500)[1:]
    assert low < 0.5 < high
    assert high - low == pytest.approx(0.087, abs=0.001)


def test_ratings_of_different_prompts_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        win_rate(np.ones(3), np.ones(4))
