"""Best of K: the expectations, the picks, the rounds, and the errors."""

import math
from itertools import combinations
from statistics import fmean, median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.rejection import (
    Pick,
    best_of,
    best_of_all_rounds,
    best_temperature,
    expected_best,
    expected_median,
    rejection_sample,
    sample_answers,
    score_answers,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


PROMPTS = [ask("Who keeps a goat?"), ask("What is 3 + 4?"), ask("Tell me a story.")]


def count_letters(prompts, answers) -> torch.Tensor:
    """A reward that can be checked by eye."""
    return torch.tensor([float(len(text)) for text in answers])


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 300}
    sizes |= {"multiple_of": 16, "max_seq_len": 128}
    return Llama(LlamaConfig.from_params(sizes)).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = ["Ida feeds the goats.", "Once upon a time Otto met a snail."]
    return train_tokenizer(texts, path, vocab_size=300)


# Expectations over all ways of drawing n of N

few_scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7)


@given(scores=few_scores, data=st.data())
def test_expectations_are_means_over_all_subsets(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    subsets = list(combinations(scores, n))
    found = expected_best(torch.tensor(scores), n)
    assert found.item() == pytest.approx(fmean(map(max, subsets)), abs=1e-12)
    found = expected_median(torch.tensor(scores), n)
    assert found.item() == pytest.approx(fmean(map(median, subsets)), abs=1e-12)


@given(scores=few_scores, data=st.data())
def test_values_of_the_best_with_ties_broken_by_chance(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    integers = st.lists(st.integers(-9, 9), min_size=len(scores), max_size=len(scores))
    values = data.draw(integers)
    means = []
    for subset in combinations(range(len(scores)), n):
        highest = max(scores[i] for i in subset)
        means.append(fmean(values[i] for i in subset if scores[i] == highest))
    found = expected_best(
        torch.tensor(scores), n, torch.tensor(values, dtype=torch.double)
    )
    assert found.item() == pytest.approx(fmean(means), abs=1e-12)


def test_expectations_work_on_many_prompts_and_stay_exact_for_many_samples():
    torch.manual_seed(0)
    scores = torch.randn(5, 3, 400)
    for function in (expected_best, expected_median):
        together = function(scores, 100)
        assert together.shape == (5, 3)
        assert together[4, 2] == function(scores[4, 2], 100)
    assert torch.equal(expected_best(scores, 400), scores.amax(-1).double())
    torch.testing.assert_close(
        expected_best(scores, 1), scores.double().mean(-1), rtol=0, atol=1e-12
    )
    shuffled = scores[..., torch.randperm(400)]
    torch.testing.assert_close(expected_best(shuffled, 7), expected_best(scores, 7))


def test_answers_that_were_never_scored_count_only_where_they_may_be_the_best():
    scores = torch.tensor([0.5, -math.inf, 1.0])
    best = [expected_best(scores, n).item() for n in (1, 2, 3)]
    assert best == [-math.inf, pytest.approx((2 * 1.0 + 0.5) / 3), 1.0]
    middle = [expected_median(scores, n).item() for n in (1, 2, 3)]
    assert middle == [-math.inf, -math.inf, 0.5]


@given(n_samples=st.integers(2, 30))
def test_the_best_grows_with_n_and_the_median_of_symmetric_scores_does_not(n_samples):
    scores = torch.arange(n_samples, dtype=torch.double)
    best = [expected_best(scores, n).item() for n in range(1, n_samples + 1)]
    # of 0 .. N - 1, known in closed form
    expected = [n * (n_samples + 1) / (n + 1) - 1 for n in range(1, n_samples + 1)]
    assert best == pytest.approx(expected)
    for n in range(1, n_samples + 1):
        middle = expected_median(scores, n).item()
        assert middle == pytest.approx((n_samples - 1) / 2)


@pytest.mark.parametrize("function", [expected_best, expected_median])
@pytest.mark.parametrize("n", [0, 4])
def test_more_samples_than_there_are_cannot_be_drawn(function, n):
    with pytest.raises(ValueError, match=f"cannot draw {n} of 3 samples"):
        function(torch.zeros(3), n)


# Samples


def test_the_first_answers_stay_when_k_grows(model, tokenizer):
    how = {"max_new_tokens": 8, "seed": 3}
    two = sample_answers(model, tokenizer, PROMPTS, 2, **how)
    five = sample_answers(model, tokenizer, PROMPTS, 5, batch_size=4, **how)
    assert [len(texts) for texts in five] == [5, 5, 5]
    assert [texts[:2] for texts in five] == two
    assert len(set(five[0])) > 1, "the answers of a prompt differ"
    assert sample_answers(model, tokenizer, PROMPTS, 5, max_new_tokens=8) != five
    assert sample_answers(model, tokenizer, [], 5) == []
    with pytest.raises(ValueError, match="k must be at least 1, but is 0"):
        sample_answers(model, tokenizer, PROMPTS, 0)


def test_answers_drawn_twice_are_scored_once():
    calls = []

    def score(prompts, answers):
        calls.append(
            [(p[0]["content"], text) for p, text in zip(prompts, answers, strict=True)]
        )
        return count_letters(prompts, answers)

    answers = [["a", "bb", "a"], ["bb", "bb", "bb"], ["ccc", "a", "dd"]]
    scores = score_answers(score, PROMPTS, answers)
    assert scores.tolist() == [[1, 2, 1], [2, 2, 2], [3, 1, 2]]
    (pairs,) = calls
    assert len(pairs) == len(set(pairs)) == 6


def test_answers_without_a_place_in_a_dialogue_are_never_scored_or_picked():
    def score(prompts, answers):
        assert all(text.strip() and "[/INST]" not in text for text in answers)
        return count_letters(prompts, answers)

    answers = [["", "a", "[/INST] ccc"], [" ", "[/INST]", ""]]
    scores = score_answers(score, PROMPTS[:2], answers)
    none = -math.inf
    assert scores.tolist() == [[none, 1, none], [none, none, none]]
    (pick,) = best_of(PROMPTS[:2], answers, scores)
    assert (pick.prompt, pick.answer) == (PROMPTS[0], "a")


def test_scores_do_not_depend_on_the_batches():
    prompts = PROMPTS * 5
    answers = [[f"{'a' * (i * 7 % 5 + 1)}{j}" for j in range(3)] for i in range(15)]
    sizes = []

    def score(prompts, answers):
        sizes.append(len(answers))
        return count_letters(prompts, answers)

    whole = score_answers(count_letters, prompts, answers)
    assert torch.equal(score_answers(score, prompts, answers, batch_size=4), whole)
    assert max(sizes) == 4
    assert sum(sizes) == sum(len(set(texts)) for texts in answers)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_names_its_answer(bad):
    def score(prompts, answers):
        return torch.tensor([bad if text == "bb" else 0.0 for text in answers])

    with pytest.raises(ValueError, match=r"'bb' to 'What is 3 \+ 4\?' has the score"):
        score_answers(score, PROMPTS[:2], [["a", "c"], ["a", "bb"]])


def test_scores_in_a_column_are_refused():
    with pytest.raises(ValueError, match=r"2 answers got scores of shape \(2, 1\)"):
        score_answers(lambda p, a: torch.zeros(len(a), 1), PROMPTS[:1], [["a", "b"]])


def test_unequal_numbers_of_answers_are_refused():
    with pytest.raises(ValueError, match="the same number of answers"):
        score_answers(count_letters, PROMPTS[:2], [["a", "b"], ["a"]])
    with pytest.raises(ValueError, match="the same number of answers"):
        score_answers(count_letters, PROMPTS, [["a"], ["a"]])
    with pytest.raises(ValueError, match="there are no prompts"):
        score_answers(count_letters, [], [])


# Picks


def test_the_best_is_kept_with_its_score_and_can_be_trained_on():
    answers = [["a", "bbb", "cc"], ["dd", "e", "ff"]]
    scores = score_answers(count_letters, PROMPTS[:2], answers)
    picks = best_of(PROMPTS[:2], answers, scores, version=3)
    assert [pick.answer for pick in picks] == ["bbb", "dd"]  # the first of equals
    assert [pick.score for pick in picks] == [3, 2]
    assert {pick.version for pick in picks} == {3}
    assert picks[0].dialog() == [
        *PROMPTS[0],
        {"role": "assistant", "content": "bbb"},
    ]
    assert PROMPTS[0] == ask("Who keeps a goat?"), "the prompt stays what it was"


def test_a_constant_reward_stops():
    with pytest.raises(ValueError, match=r"all 4 answers have the score 0\.5"):
        best_of(PROMPTS[:2], [["a", "b"], ["c", "d"]], torch.full((2, 2), 0.5))


def test_all_rounds_keep_what_only_an_older_one_asked_and_score_anew():
    story, goat = PROMPTS[2], PROMPTS[0]
    old = [Pick(story, "long ago", 99.0, 1), Pick(goat, "Ida keeps a goat.", -9.0, 1)]
    new = [Pick(goat, "Ida.", 50.0, 2)]
    picks = best_of_all_rounds([old, new], count_letters)
    assert {(pick.answer, pick.version, pick.score) for pick in picks} == {
        ("long ago", 1, 8.0),
        ("Ida keeps a goat.", 1, 17.0),
    }
    assert best_of_all_rounds([[], new], count_letters) == [new[0]._replace(score=4.0)]


def test_a_prompt_is_known_by_all_its_messages():
    other = [{"role": "system", "content": "Be brief."}, *PROMPTS[0]]
    rounds = [[Pick(PROMPTS[0], "Ida does.", 0.0)], [Pick(other, "Ida.", 0.0, 1)]]
    assert len(best_of_all_rounds(rounds, count_letters)) == 2


# Together


def test_rejection_sampling_picks_the_best_of_its_samples(model, tokenizer):
    how = {"temperature": 1.3, "max_new_tokens": 60, "seed": 5}
    picks = rejection_sample(
        model, tokenizer, PROMPTS, count_letters, 60, version=2, **how
    )
    drawn = sample_answers(model, tokenizer, PROMPTS, 60, keep_cut=False, **how)
    assert [pick.score for pick in picks] == [max(map(len, texts)) for texts in drawn]
    assert all(pick.answer in texts for pick, texts in zip(picks, drawn, strict=True))
    assert [pick.prompt for pick in picks] == PROMPTS
    again = rejection_sample(
        model, tokenizer, PROMPTS, count_letters, 60, version=2, **how
    )
    assert again == picks


def test_an_answer_that_was_cut_is_never_picked(model, tokenizer):
    how = {"max_new_tokens": 8, "seed": 5}
    drawn = sample_answers(model, tokenizer, PROMPTS, 200, **how)
    whole = sample_answers(model, tokenizer, PROMPTS, 200, keep_cut=False, **how)
    # the longest answers, which the reward likes best, are those without an end
    assert max(map(len, drawn[0])) > max(map(len, whole[0])) > 0
    picks = rejection_sample(model, tokenizer, PROMPTS, count_letters, 200, **how)
    assert [pick.answer for pick in picks] == [max(t, key=len) for t in whole]


def test_the_best_temperature_is_the_one_with_the_highest_best_of_k(model, tokenizer):
    temperatures = [0.5, 1.0, 2.0]
    rewards = {}
    for temperature in temperatures:
        drawn = sample_answers(model, tokenizer, PROMPTS, 4, temperature=temperature)
        rewards[temperature] = fmean(max(map(len, texts)) for texts in drawn)
    found = best_temperature(model, tokenizer, PROMPTS, count_letters, 4, temperatures)
    assert rewards[found] == max(rewards.values())
