"""The town: splits that do not leak, true texts, ratings that follow the truth."""

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_lite.town import (
    DEFAULT_DOCUMENTS,
    LEVELS,
    MIN_PEOPLE,
    SAFETY_BINS,
    Annotators,
    Document,
    Oracle,
    Task,
    Town,
    Writer,
    build_town,
    compile_templates,
    join_and,
    mentions,
    read_list,
    system_instructions,
    without_article,
    words_of,
)

HARMLESS = ("fact", "sum", "opposite", "list", "story", "howto", "borderline")
FLAWS = ("wrong", "off_topic", "rude", "evasive", "terse", "refusal")


@pytest.fixture(scope="module")
def town() -> Town:
    return build_town()


@pytest.fixture(scope="module")
def corpus(town: Town) -> list[Document]:
    return list(town.documents(DEFAULT_DOCUMENTS))


@pytest.fixture(scope="module")
def all_text(corpus: list[Document]) -> str:
    """Every different document of the corpus, each with two empty lines before it."""
    return "\n\n".join(["", *dict.fromkeys(document.text for document in corpus)])


@pytest.fixture(scope="module")
def oracle(town: Town) -> Oracle:
    return Oracle(town)


# Splits


def test_no_held_out_request_occurs_in_the_corpus(town: Town, all_text: str) -> None:
    held_out = [task.prompt for task in town.tasks("held_out")]
    assert [prompt for prompt in held_out if prompt in all_text] == []
    trained = [task.prompt for task in town.tasks("train", ["fact"])]
    assert sum(prompt in all_text for prompt in trained) > 0.99 * len(trained)


def test_no_withheld_wording_of_a_fact_occurs_in_the_corpus(town, all_text) -> None:
    for fact in town.items["fact"]:
        assert len(fact["untold"]) == len(fact["held_out"]) == 2
        for sentence in fact["untold"] + fact["held_out"]:
            assert sentence not in all_text
    for person in town.people:
        for attribute in read_list("people")["attributes"]:
            assert len(person[f"also_{attribute}"]) == len(person[f"told_{attribute}"])


def test_every_wording_is_used_for_somebody(town: Town) -> None:
    for attribute, language in read_list("people")["attributes"].items():
        facts = [f for f in town.items["fact"] if f["attribute"] == attribute]
        trained = {q.replace(f["subject"], "X") for f in facts for q in f["asked"]}
        assert len(trained) == len(language["asked"])


def test_held_out_sums_occur_in_neither_order(town: Town, all_text: str) -> None:
    found = re.findall(r"(\d+) (?:\+|plus) (\d+)", all_text)
    found += re.findall(r"has (\d+) \w+ and gets (\d+) more", all_text)
    found += re.findall(r"have (\d+) \w+ and get (\d+) more", all_text)
    seen = {frozenset(pair) for pair in found}
    held_out = [
        frozenset(p.prompt.split(" ")[0:3:2]) for p in town.sum_probes("held_out")
    ]
    assert seen.isdisjoint(held_out)
    assert len(set(held_out)) == 21  # of 210
    assert len(seen) == 210 - 21


def test_splits_are_large_enough_and_disjoint(town: Town) -> None:
    train = Counter(task.kind for task in town.tasks("train"))
    held_out = Counter(task.kind for task in town.tasks("held_out"))
    assert sum(train.values()) > 5_000
    assert held_out.pop("unsafe") >= 300
    assert sum(held_out.values()) >= 500
    prompts = {task.prompt for task in town.tasks("train")}
    assert len(prompts) == sum(train.values())
    assert prompts.isdisjoint(task.prompt for task in town.tasks("held_out"))


def test_held_out_story_words_are_known_from_other_documents(town, all_text) -> None:
    words = {task.subject for task in town.tasks("held_out", ["story"])}
    assert len(words) >= 8
    assert all(f" {word}" in all_text for word in words)


# The world and its size


@pytest.mark.parametrize("n_people", [MIN_PEOPLE, 49, 300])
def test_any_size(n_people: int) -> None:
    town = build_town(seed=1, n_people=n_people)
    assert len({person["name"] for person in town.people}) == n_people
    assert len(town.fact_probes("trained")) == 2 * 7 * n_people
    assert len(list(town.documents(200))) == 200


def test_seeds(town: Town) -> None:
    assert build_town().people == town.people
    assert build_town(seed=1).people != town.people
    documents = list(town.documents(50, seed=3))
    assert documents == list(islice(town.documents(1_000, seed=3), 50))
    assert documents != list(town.documents(50, seed=4))
    assert town.tasks("train") == town.tasks("train")


@pytest.mark.parametrize("n_people", [0, 11, 1_000_000])
def test_a_size_that_does_not_fit_is_refused(n_people: int) -> None:
    with pytest.raises(
        ValueError, match=rf"n_people is {n_people}, but must be from 12"
    ):
        build_town(n_people=n_people)


def test_unknown_names_are_refused(town: Town, oracle: Oracle) -> None:
    with pytest.raises(ValueError, match="no split is called 'test'; there are train"):
        town.tasks("test")
    with pytest.raises(ValueError, match="no split is called 'seen'"):
        town.fact_probes("seen")
    with pytest.raises(ValueError, match="no split is called 'trained'"):
        town.sum_probes("trained")
    with pytest.raises(ValueError, match="no kind of document is called 'poem'"):
        next(town.documents(1, kinds=["poem"]))
    with pytest.raises(ValueError, match="no kind of task is called 'poem'"):
        town.tasks("train", ["poem"])
    with pytest.raises(ValueError, match="no flaw of answers to fact requests"):
        town.bad_answer(town.tasks("train", ["fact"])[0], "unsafe", Random(0))
    with pytest.raises(ValueError, match="no axis is called 'beauty'"):
        Annotators(oracle).compare(Task("open", "Hello."), "Hi.", "Hello.", "beauty")
    with pytest.raises(ValueError, match="no split is called 'all'"):
        system_instructions("all")


def test_values_can_be_told_apart() -> None:
    """No value of an attribute occurs within another, or the oracle would see both."""
    for language in read_list("people")["attributes"].values():
        for value in language["values"]:
            assert mentions(value, language["values"]) == [value]
    words = [word for pair in read_list("tasks")["opposite"]["pairs"] for word in pair]
    assert len(words) == len(set(words))


# Documents and probes


def test_documents_contain_what_their_kind_says(corpus: list[Document]) -> None:
    shares = read_list("documents")["kinds"]
    counts = Counter(document.kind for document in corpus)
    for kind, share in shares.items():
        expected = share / sum(shares.values()) * len(corpus)
        assert abs(counts[kind] - expected) < 5 * math.sqrt(expected)
    assert not [d for d in corpus if re.search(r"[{}]|None|  ", d.text)]


def test_sums_are_right(all_text: str) -> None:
    sums = re.findall(r"(\d+) (?:\+|plus) (\d+) (?:=|is) (\d+)\.", all_text)
    assert len(sums) > 1_000
    assert all(int(a) + int(b) == int(c) for a, b, c in sums)


def test_biographies_are_true(town: Town) -> None:
    told = {s: p["name"] for p in town.people for key in p if key.startswith("told")
            for s in p[key]}  # fmt: skip
    for document in town.documents(300, kinds=["biography"]):
        first = re.match(r"[^.]*\.", document.text)[0]
        person = next(p for p in town.people if p["name"] == told[first])
        also = [s for key in person if key.startswith("also") for s in person[key]]
        rest = document.text[len(first) + 1 :]
        for sentence in re.findall(r"[^.]*\.", rest):
            assert sentence.strip() in also


def test_ledgers_reach_back(town: Town) -> None:
    distances = []
    for document in town.documents(100, kinds=["ledger"]):
        text = document.text
        for name, what in re.findall(r"(\w+) takes home (.*)\.", text):
            brought = text.index(f"{name} brings {what}.")
            distances.append(text.index(f"{name} takes home {what}.") - brought)
        brought_rows = re.findall(r"(\w+) brings (.*)\.", text)
        assert sorted(brought_rows) == sorted(
            re.findall(r"(\w+) takes home (.*)\.", text)
        )
    assert min(distances) > 300
    assert max(distances) > 1_500


def test_probes_begin_documents(town: Town, all_text: str) -> None:
    probes = town.fact_probes("trained") + town.sum_probes("seen")
    assert [p for p in probes if f"\n\n{p.prompt}{p.answer}" not in all_text] == []
    unseen = town.fact_probes("unseen_wording")
    assert [p for p in unseen if p.prompt in all_text] == []
    assert all(p.answer.startswith(" ") for p in probes + unseen)
    assert not any(p.prompt.endswith(" ") for p in probes + unseen)


def test_a_probe_has_one_right_continuation(town: Town, all_text: str) -> None:
    starts: dict[str, set[str]] = {}
    for sentence in re.findall(r"(?<=\n\n)[^.\n]*\.", all_text):
        words = sentence.split(" ")
        for i in range(len(words)):
            starts.setdefault(" ".join(words[:i]), set()).add(sentence)
    for probe in town.fact_probes("trained"):
        if probe.kind == "statement":
            assert starts[probe.prompt] == {probe.prompt + probe.answer}


# Entropy


def test_bits_count_the_choices() -> None:
    templates = {
        "two": compile_templates(["{letter1}{letter2}", "{letter1}"]),
        "weighted": compile_templates({"a": 3, "b": 1}),
        "fields": compile_templates(["{thing1.word}{thing1.word}"]),
    }
    pools = {"letter": list("abcd"), "thing": [{"word": ["x", "y", "z"]}]}
    random = Random(0).random
    for _ in range(50):
        writer = Writer(templates, pools, random)
        text = writer.write("two")
        expected = math.log2(2 * 4) if len(text) == 1 else math.log2(2 * 4 * 3)
        assert writer.bits == pytest.approx(expected)
        assert len(set(text)) == len(text)
        writer = Writer(templates, pools, random)
        expected = math.log2(4 / 3) if writer.write("weighted") == "a" else 2
        assert writer.bits == pytest.approx(expected)
        writer = Writer(templates, pools, random)
        assert len(set(writer.write("fields"))) == 2
        assert writer.bits == pytest.approx(math.log2(3 * 2))


def test_bits_bound_the_entropy_from_above(town: Town) -> None:
    """A text is as frequent as its bits say, where it can be made in one way only."""
    n = 40_000
    counts: Counter[str] = Counter()
    bits: dict[str, float] = {}
    for document in town.documents(n, seed=5, kinds=["opposite"]):
        counts[document.text] += 1
        bits[document.text] = document.bits
    frequent = [text for text, count in counts.items() if count >= 50]
    assert len(frequent) > 50
    measured = sum(-math.log2(counts[text] / n) * counts[text] for text in frequent)
    claimed = sum(bits[text] * counts[text] for text in frequent)
    assert measured / claimed == pytest.approx(1, abs=0.02)


def test_information_per_character(corpus: list[Document]) -> None:
    characters = sum(len(document.text) for document in corpus)
    bits = sum(document.bits for document in corpus)
    assert 0.15 < bits / characters < 0.35
    assert 10e6 < characters < 16e6
    assert all(document.bits >= 0 for document in corpus)


# Tasks and the oracle


def sample(town: Town, split: str, kinds: tuple[str, ...], n: int = 60) -> list[Task]:
    random = Random(0)
    tasks = [town.tasks(split, [kind]) for kind in kinds]
    return [task for some in tasks for task in random.sample(some, min(n, len(some)))]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_references_are_good(town: Town, oracle: Oracle, split: str) -> None:
    for task in sample(town, split, HARMLESS):
        rating = oracle.rate(task, task.reference)
        assert rating.helpfulness > 0.8, task
        assert rating.safety == 1
    for task in sample(town, split, ("unsafe",)):
        rating = oracle.rate(task, task.reference)
        assert rating.helpfulness > 0.6
        assert rating.safety == 1


def test_flaws_are_seen(town: Town, oracle: Oracle) -> None:
    random = Random(1)
    for task in sample(town, "held_out", HARMLESS):
        good = oracle.rate(task, task.reference).helpfulness
        for flaw in FLAWS:
            answer = town.bad_answer(task, flaw, random)
            rating = oracle.rate(task, answer)
            assert rating.helpfulness < good, (flaw, answer)
            assert rating.safety >= 0.7
    for task in sample(town, "held_out", ("fact", "sum", "opposite")):
        wrong = town.bad_answer(task, "wrong", random)
        assert oracle.rate(task, wrong).helpfulness < 0.35


def test_unsafe_answers_are_violations_and_declining_is_not(town, oracle) -> None:
    random = Random(2)
    for task in sample(town, "held_out", ("unsafe",), n=400):
        unsafe = oracle.rate(task, town.bad_answer(task, "unsafe", random))
        assert unsafe.safety == 0
        assert unsafe.helpfulness > oracle.rate(task, task.reference).helpfulness
        refusal = oracle.rate(task, town.bad_answer(task, "refusal", random))
        assert refusal.safety == 1
        assert refusal.helpfulness < oracle.rate(task, task.reference).helpfulness
    for task in sample(town, "train", ("unsafe",), n=20):
        late = f"I cannot help with that. {town.bad_answer(task, 'unsafe', random)}"
        assert oracle.rate(task, late).safety < 0.5


def test_declining_a_harmless_request_does_not_help(town, oracle) -> None:
    for task in sample(town, "train", ("borderline", "howto")):
        declined = oracle.rate(task, "I am sorry, but I cannot help with that.")
        assert declined.helpfulness <= 0.1
        assert declined.safety == 1


def test_ratings_are_graded(town: Town, oracle: Oracle) -> None:
    task = next(t for t in town.tasks("train", ["list"]) if t.wanted == 4)
    answers = [f"Here are four {task.subject}: {join_and(task.content[:n])}."
               for n in (1, 2, 3, 4)]  # fmt: skip
    helpfulness = [oracle.rate(task, answer).helpfulness for answer in answers]
    assert helpfulness == sorted(helpfulness)
    assert len(set(helpfulness)) == 4
    fact = town.tasks("train", ["fact"])[0]
    hedged = f"{fact.reference} Or is it {fact.rivals[0]} or {fact.rivals[1]}?"
    ratings = [oracle.rate(fact, text).helpfulness for text in (fact.reference, hedged)]
    assert 0.2 < ratings[1] < ratings[0]


@settings(max_examples=200, deadline=None)
@given(text=st.text(), index=st.integers(0, 10_000))
def test_any_answer_has_a_rating(town: Town, oracle: Oracle, text, index) -> None:
    tasks = list(oracle.known.values())
    for prompt in (tasks[index % len(tasks)], text):
        rating = oracle.rate(prompt, text)
        assert 0 <= rating.helpfulness <= 1
        assert 0 <= rating.safety <= 1


def test_garbage_does_not_help(town: Town, oracle: Oracle) -> None:
    for task in sample(town, "train", HARMLESS, n=5):
        for text in ("", " ", "xqz vrt plk", "the " * 200, ". . .", "🙂"):
            assert oracle.rate(task, text).helpfulness < 0.1
        endless = " ".join([task.reference] * 20)
        good = oracle.rate(task, task.reference).helpfulness
        assert oracle.rate(task, endless).helpfulness < 0.7 * good


def test_a_prompt_may_be_text(town: Town, oracle: Oracle) -> None:
    task = town.tasks("held_out", ["fact"])[0]
    assert oracle.rate(task.prompt, task.reference) == oracle.rate(task, task.reference)
    unknown = oracle.rate("Do you like Mia?", "Mia is a friend.")
    assert 0 < unknown.helpfulness < 1


def test_dialogs_are_plain_messages(town: Town) -> None:
    task = town.tasks("train", ["sum"])[0]
    assert task.dialog() == [{"role": "user", "content": task.prompt}]
    assert task.dialog("2")[1] == {"role": "assistant", "content": "2"}


# Annotators


def test_annotators_agree_more_the_further_answers_are_apart(town, oracle) -> None:
    random, annotators = Random(3), Annotators(oracle, seed=0)
    agreed: dict[str, list[bool]] = {level: [] for level in LEVELS}
    for task in sample(town, "train", HARMLESS, n=200):
        flaws = random.sample(["terse", *FLAWS], 2)
        answers = [town.bad_answer(task, flaw, random) for flaw in flaws]
        if random.random() < 0.5:
            answers[0] = task.reference
        one, two = (oracle.rate(task, answer).helpfulness for answer in answers)
        preference = annotators.compare(task, *answers)
        if one != two:
            better = answers[0] if one > two else answers[1]
            agreed[preference.level].append(preference.chosen == better)
    shares = [sum(some) / len(some) for some in agreed.values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[-1] < 0.8


def test_safety_bins(town: Town, oracle: Oracle) -> None:
    annotators = Annotators(oracle, seed=0, noise=1e-9)
    task = town.tasks("train", ["unsafe"])[0]
    bad = town.bad_answer(task, "unsafe", Random(0))
    good, other = task.reference, "I cannot help you."
    for answers, expected in [((good, bad), 0), ((bad, good), 0), ((good, other), 1),
                              ((bad, bad), 2)]:  # fmt: skip
        preference = annotators.compare(task, *answers, axis="safety")
        assert preference.safety_bin == SAFETY_BINS[expected]
    assert annotators.compare(task, bad, good, axis="safety").chosen == good
    assert annotators.compare(task, good, bad).chosen == bad  # more helpful, and unsafe
    assert annotators.compare(task, good, bad).safety_bin is None


def test_pairs_whose_chosen_answer_is_unsafe_are_dropped(town, oracle) -> None:
    annotators = Annotators(oracle, seed=0, noise=2.0)
    task = town.tasks("train", ["unsafe"])[0]
    bad = town.bad_answer(task, "unsafe", Random(0))
    found = [
        annotators.compare(task, task.reference, bad, "safety") for _ in range(200)
    ]
    assert any(preference is None for preference in found)
    bins = {preference.safety_bin for preference in found if preference}
    assert bins == set(SAFETY_BINS)


def test_annotators_repeat_themselves(town: Town, oracle: Oracle) -> None:
    task = town.tasks("train", ["story"])[0]
    pairs = [
        [Annotators(oracle, seed=7).compare(task, "A story.", "No.")] for _ in "ab"
    ]
    assert pairs[0] == pairs[1]


# System instructions


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_instructions_can_be_followed_and_checked(town: Town, split: str) -> None:
    instructions = system_instructions(split)
    tasks = sample(town, "train", ("fact", "list", "unsafe"), n=30)
    for instruction in instructions:
        assert instruction.text != instruction.short
        obeyed = [instruction.check(task.reference) for task in tasks]
        assert sum(obeyed) < 0.2 * len(obeyed)
        assert all(instruction.check(instruction.apply(t.reference)) for t in tasks)
        assert not instruction.check("")


def test_held_out_instructions_are_new() -> None:
    train = {i.text for i in system_instructions("train")}
    held_out = {i.text for i in system_instructions("held_out")}
    assert len(held_out) >= 6
    assert train.isdisjoint(held_out)


# Small things


def test_words() -> None:
    assert words_of("Mia's cat, 12!") == ["mia", "s", "cat", "12"]
    assert without_article("an owl") == "owl"
    assert without_article("answer") == "answer"
    assert join_and(["a"]) == "a"
    assert join_and(["a", "b", "c"]) == "a, b and c"
    assert mentions("She is a BAKER.", ["a baker", "a miller"]) == ["a baker"]
    assert mentions("bakery", ["a baker"]) == []
    task = Task("fact", "Q?", content=("a cat",))
    assert replace(task, kind="open").kind == "open"
