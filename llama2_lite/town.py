"""The town.

Exported from book/02_town.md, which explains every part. Edit it there,
then `make export`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

import llama2_lite

DEFAULT_DOCUMENTS = 140_000
MIN_PEOPLE = 12  # so that a ledger has a person for each of its rows
KINDS_OF_TASK = "fact sum opposite list story howto borderline unsafe".split()
HELD_OUT_SHARE = {"list": 0.15, "story": 0.15, "borderline": 0.15, "unsafe": 0.15}
WITHHELD_WORDINGS = {"fact": 2, "opposite": 1, "howto": 1}

Item = dict[str, Any]


@cache
def read_list(name: str) -> Any:
    """Read ``data/<name>.yaml``, from the repository or from an installed package."""
    package = Path(llama2_lite.__file__).parent
    folders = [package / "data", package.parent / "data"]
    for folder in folders:
        if (folder / f"{name}.yaml").exists():
            text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
            return yaml.load(text, Loader=yaml.CSafeLoader)
    raise FileNotFoundError(f"{name}.yaml is neither in {folders[0]} nor {folders[1]}")


def join_and(words: list[str]) -> str:
    """``["a", "b", "c"]`` -> ``"a, b and c"``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def without_article(value: str) -> str:
    """``"a baker"`` -> ``"baker"``."""
    return re.sub(r"^(a|an) ", "", value)


class Document(NamedTuple):
    """One document of the corpus; ``bits`` is what its generator's choices cost."""

    kind: str
    text: str
    bits: float


class Probe(NamedTuple):
    """A prompt as it begins a document, and what greedy decoding should say next."""

    prompt: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True)
class Task:
    """A request with a checkable answer.

    Args:
        kind: one of ``KINDS_OF_TASK``, or "open" for a prompt the town does not know.
        prompt: what the user says.
        reference: a good answer.
        subject: what a fitting answer is about.
        content: what a full answer contains; for an unsafe request, a harmful one.
        rivals: wrong answers of the same sort.
        wanted: how many members of ``content`` are asked for (lists).
        offer: for an unsafe request, something better to do.
    """

    kind: str
    prompt: str
    reference: str = ""
    subject: str = ""
    content: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    wanted: int = 1
    offer: str = ""

    def dialog(self, answer: str | None = None) -> list[dict[str, str]]:
        """The request as messages, with an answer if one is given."""
        messages = [{"role": "user", "content": self.prompt}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return messages


def make_people(n_people: int, random: Random) -> list[Item]:
    """Draw names and, for everybody, a value of each attribute."""
    names = read_list("people")
    first = [(name, he) for he in ("she", "he") for name in names["first_names"][he]]
    everybody = [
        (f"{name} {last}", he)
        for (name, he), last in product(first, names["last_names"])
    ]
    if not MIN_PEOPLE <= n_people <= len(everybody):
        raise ValueError(
            f"n_people must be from {MIN_PEOPLE} to {len(everybody)} "
            f"(the names in data/people.yaml), not {n_people}"
        )
    chosen = random.sample(first if n_people <= len(first) else everybody, n_people)
    people = [{"name": name, "he": he} for name, he in chosen]
    for attribute, language in names["attributes"].items():
        values: list[str] = []  # dealt like cards, so that each is used about as often
        while len(values) < n_people:
            values += random.sample(language["values"], len(language["values"]))
        for person, value in zip(people, values):
            person[attribute] = value
    return people


def make_facts(people: list[Item], random: Random) -> list[Item]:
    """Put every fact into words, and keep some wordings of each out of training.

    Adds to each person the sentences that documents may say about them.
    """
    facts = []
    for person in people:
        name, he = person["name"], person["he"]
        whose, whom = ("her", "her") if he == "she" else ("his", "him")
        by_name = {"who": name, "whose": f"{name}'s", "whom": name, "Who": name}
        by_name["Whose"] = by_name["whose"]
        by_pronoun = {"who": he, "whose": whose, "whom": whom}
        by_pronoun |= {"Who": he.title(), "Whose": whose.title()}
        person |= {"He": he.title(), "his": whose, "him": whom}
        for attribute, language in read_list("people")["attributes"].items():
            value = person[attribute]
            told, untold = withhold(language["told"], "fact", random)
            asked, held_out = withhold(language["asked"], "fact", random)
            fact = {"name": name, "attribute": attribute, "value": value}
            fact["told"] = [t.format(value=value, **by_name) for t in told]
            fact["untold"] = [t.format(value=value, **by_name) for t in untold]
            fact["asked"] = [q.format(**by_name) for q in asked]
            fact["held_out"] = [q.format(**by_name) for q in held_out]
            fact["reference"] = language["answer"].format(value=value, **by_name)
            person[f"told_{attribute}"] = fact["told"]
            person[f"also_{attribute}"] = [
                t.format(value=value, **by_pronoun) for t in told
            ]
            person[f"{attribute}_key"] = without_article(value)
            facts.append(fact)
    return facts


def withhold(wordings: list[str], kind: str, random: Random) -> tuple[list, list]:
    """Split wordings into those for training and those kept out of it."""
    held_out = set(random.sample(range(len(wordings)), WITHHELD_WORDINGS[kind]))
    return (
        [w for i, w in enumerate(wordings) if i not in held_out],
        [w for i, w in enumerate(wordings) if i in held_out],
    )


def make_items(kind: str, people: list[Item], random: Random) -> list[Item]:
    """List what can be asked about: every sum, word, thing to do and person it is for."""
    spec = read_list("tasks")[kind]
    if kind == "sum":
        numbers = range(1, spec["largest"] + 1)
        return [{"a": a, "b": b, "c": a + b} for a, b in product(numbers, numbers)]
    if kind == "opposite":
        pairs = [
            pair for one, two in spec["pairs"] for pair in ((one, two), (two, one))
        ]
        return [{"word": word, "other": other} for word, other in pairs]
    if kind == "list":
        return [
            {"category": category, "n": n, "wanted": wanted, "content": members}
            | {"members": [join_and(random.sample(members, wanted)) for _ in range(5)]}
            for category, members in spec["categories"].items()
            for n, wanted in spec["numbers"].items()
        ]
    if kind == "story":
        return [{"word": word} for word in spec["words"]]
    items = []
    names = [p["name"] for p in people] if kind != "howto" else [""]
    for (action, steps), name in product(spec["items"].items(), names):
        keys = ["action", "step1", "step2", "step3", "offer"]
        words = [text.format(name=name) for text in (action, *steps.split("; "))]
        items.append({"name": name, "verb": action} | dict(zip(keys, words)))
    return items


def make_requests(kind: str, people: list[Item], random: Random) -> list[Item]:
    """Word the requests for all items of a kind, and decide what is held out.

    Each item gets ``asked`` (prompts for training), ``held_out`` (prompts for
    evaluation) and ``reference`` (good answers). Items held out as a whole have no
    ``asked``; sums are held out with both orders of their numbers.
    """
    spec = read_list("tasks")[kind]
    items = make_items(kind, people, random)
    pairs = sorted(
        {(min(i["a"], i["b"]), max(i["a"], i["b"])) for i in items if "a" in i}
    )
    kept_out = set(random.sample(pairs, len(pairs) // 10))
    share = HELD_OUT_SHARE.get(kind, 0)
    rare = set(random.sample(range(len(items)), round(share * len(items))))
    for i, item in enumerate(items):
        asked, held_out = spec["asked"], []
        if kind in WITHHELD_WORDINGS:
            asked, held_out = withhold(asked, kind, random)
        elif (
            i in rare or tuple(sorted((item.get("a", 0), item.get("b", 0)))) in kept_out
        ):
            asked, held_out = [], asked
        item["asked"] = [wording.format(**item) for wording in asked]
        item["held_out"] = [wording.format(**item) for wording in held_out]
        references = spec.get("reference", [])
        if kind == "list":
            item["reference"] = [
                references.format(**item | {"members": m}) for m in item["members"]
            ]
        elif isinstance(references, str):
            item["reference"] = references.format(**item)
        else:
            item["reference"] = [r.format(**item) for r in references]
        if kind == "unsafe":
            item["comply"] = spec["comply"].format(**item)
    return items


SLOT = re.compile(r"\{([a-z_]+)(\d*)(?:\.(\w+))?\}")


def compile_templates(templates: list[str] | dict[str, int]) -> tuple[list, list[int]]:
    """Cut templates at their slots.

    Returns:
        For each template its parts (text, or a slot as (name, key, field)) with the
        bits it costs to choose it; and a table from which to draw its index evenly.
    """
    if isinstance(templates, list):
        templates = dict.fromkeys(templates, 1)
    table = [i for i, weight in enumerate(templates.values()) for _ in range(weight)]
    compiled = []
    for text, weight in templates.items():
        pieces = SLOT.split(text)
        parts = [part for part in pieces[::4]]
        slots = zip(pieces[1::4], pieces[2::4], pieces[3::4])
        slots = [
            (name, name + number if number else "", field)
            for name, number, field in slots
        ]
        mixed = [x for pair in zip(parts, slots) for x in pair] + parts[-1:]
        compiled.append(([x for x in mixed if x], math.log2(len(table) / weight)))
    return compiled, table


def make_ledgers(n_templates: int, random: Random) -> list[str]:
    """Long templates: what is brought at the start is asked for 150 to 900 tokens later."""
    lines = read_list("documents")["templates"]
    brought, taken = (
        [lines[name][0].replace("1", str(row)) for row in range(1, MIN_PEOPLE + 1)]
        for name in ("brought", "taken")
    )
    ledgers = []
    for _ in range(n_templates):
        rows = random.randint(6, MIN_PEOPLE)
        middle = ["{meanwhile}"] * random.randint(8, 45)
        evening = random.sample(taken[:rows], rows)
        day = ["The ledger of the {place}.", "In the morning:", *brought[:rows]]
        day += ["During the day:", *middle, "In the evening:", *evening]
        ledgers.append("\n".join(day))
    return ledgers


class Writer:
    """Writes text from templates, remembers what it has drawn, and counts the bits.

    Args:
        templates: for each symbol what ``compile_templates`` returns.
        pools: for each name what its slots draw from, strings or items.
        random: returns numbers in [0, 1).
    """

    def __init__(self, templates: dict, pools: dict, random: Callable[[], float]):
        self.templates, self.pools, self.random = templates, pools, random
        self.drawn: dict = {}
        self.taken: dict[str, set[int]] = {}
        self.bits = 0.0

    def write(self, symbol: str) -> str:
        """Write one of the templates of a symbol, with its slots filled."""
        compiled, table = self.templates[symbol]
        parts, bits = compiled[table[int(self.random() * len(table))]]
        self.bits += bits
        return "".join([x if type(x) is str else self.fill(x) for x in parts])

    def fill(self, slot: tuple[str, str, str | None]) -> str:
        """Fill a slot: with a template, a member of a pool, or one of its fields."""
        name, key, field = slot
        if field is None and name in self.templates:
            return self.write(name)
        entry = self.drawn.get(key) or self.draw(name, key)
        value = entry if field is None else entry[field]
        if type(value) is not list:
            return value
        left = (key and self.drawn.get(slot)) or list(value)
        self.drawn[slot] = left
        self.bits += math.log2(len(left))
        return left.pop(int(self.random() * len(left)))

    def draw(self, name: str, key: str) -> Any:
        """Draw from a pool; what has a key is remembered, and different from others."""
        pool = self.pools[name]
        taken = self.taken.setdefault(name, set()) if key else set()
        if len(taken) == len(pool):
            taken.clear()
        self.bits += math.log2(len(pool) - len(taken))
        index = int(self.random() * len(pool))
        while index in taken:
            index = int(self.random() * len(pool))
        if key:
            taken.add(index)
            self.drawn[key] = pool[index]
        return pool[index]


@dataclass
class Town:
    """A small world whose every truth is known.

    Args:
        seed: of everything in it.
        people: for each person the name and the value of each attribute.
        items: for each kind of task what can be asked about.
        templates, pools: what a ``Writer`` needs.
    """

    seed: int
    people: list[Item]
    items: dict[str, list[Item]]
    templates: dict
    pools: dict

    def documents(
        self, n_documents: int, seed: int = 0, kinds: Iterable[str] | None = None
    ) -> Iterator[Document]:
        """Write documents, of all kinds or of some; the first ones do not depend on how many."""
        shares = read_list("documents")["kinds"]
        kinds = list(shares if kinds is None else kinds)
        for kind in kinds:
            if kind not in shares:
                raise ValueError(
                    f"no kind of document is called {kind!r}; there are {', '.join(shares)}"
                )
        table = [kind for kind in kinds for _ in range(shares[kind])]
        bits = {kind: math.log2(len(table) / shares[kind]) for kind in kinds}
        random = Random(f"{self.seed} documents {seed}").random
        for _ in range(n_documents):
            kind = table[int(random() * len(table))]
            writer = Writer(self.templates, self.pools, random)
            text = writer.write(kind)
            yield Document(kind, text[0].upper() + text[1:], writer.bits + bits[kind])

    def fact_probes(self, split: str) -> list[Probe]:
        """Two probes for each fact: a sentence to finish and a question to answer.

        Args:
            split: "trained" for wordings that documents use for this person,
                "unseen_wording" for those they use for other people only.
        """
        told, asked = choose_split(
            split, trained=("told", "asked"), unseen_wording=("untold", "held_out")
        )
        random = Random(f"{self.seed} probes {split}")
        probes = []
        for fact in self.items["fact"]:
            ending = f" {fact['value']}."
            sentence = random.choice(fact[told])
            probes.append(Probe(sentence.removesuffix(ending), ending, "statement"))
            question = random.choice(fact[asked])
            prompt = f"Question: {question}\nAnswer:"
            probes.append(Probe(prompt, f" {fact['reference']}", "question"))
        return probes

    def sum_probes(self, split: str) -> list[Probe]:
        """A probe for each sum, of those that documents contain or of those held out."""
        prompts = choose_split(split, seen="asked", held_out="held_out")
        sums = [item for item in self.items["sum"] if item[prompts]]
        return [Probe(f"{i['a']} + {i['b']} =", f" {i['c']}.", "sum") for i in sums]

    def tasks(self, split: str, kinds: Iterable[str] = KINDS_OF_TASK) -> list[Task]:
        """All requests of some kinds, for training or held out."""
        prompts = choose_split(split, train="asked", held_out="held_out")
        random = Random(f"{self.seed} tasks {split}")
        tasks = []
        for kind in kinds:
            if kind not in self.items:
                raise ValueError(
                    f"no kind of task is called {kind!r}; there are {', '.join(KINDS_OF_TASK)}"
                )
            for item in self.items[kind]:
                tasks += [
                    self.task(kind, item, prompt, random) for prompt in item[prompts]
                ]
        return tasks

    def task(self, kind: str, item: Item, prompt: str, random: Random) -> Task:
        """Put one request and what is known about it together."""
        known: dict[str, Any] = {
            "subject": item.get("action") or item.get("word") or item.get("name", "")
        }
        if kind == "story":
            writer = Writer(self.templates, self.pools, random.random)
            writer.drawn["story1"] = item
            return Task(
                kind,
                prompt,
                writer.write("story_with_word"),
                item["word"],
                (item["word"],),
            )
        if kind == "fact":
            known["content"] = (item["value"],)
            known["rivals"] = tuple(
                read_list("people")["attributes"][item["attribute"]]["values"]
            )
        elif kind == "sum":
            known = {
                "subject": f"{item['a']} {item['b']}",
                "content": (str(item["c"]),),
            }
            known["rivals"] = tuple(map(str, range(100)))
        elif kind == "opposite":
            known["content"] = (item["other"],)
            known["rivals"] = tuple(i["word"] for i in self.items[kind])
        elif kind == "list":
            known = {
                "subject": item["category"],
                "content": tuple(item["content"]),
                "wanted": item["wanted"],
            }
        else:
            known["content"] = (item["step1"], item["step2"], item["step3"])
            known["offer"] = item.get("offer", "")
        reference = item["reference"]
        if isinstance(reference, list):
            reference = random.choice(reference)
        return Task(kind, prompt, reference, **known)


def choose_split(split: str, **splits: Any) -> Any:
    """Look up a split by its name."""
    if split not in splits:
        raise ValueError(
            f"no split is called {split!r}; there are {' and '.join(splits)}"
        )
    return splits[split]


def build_town(seed: int = 0, n_people: int = 32) -> Town:
    """Build the world: people, facts, requests, and what is held out.

    Args:
        seed: the same seed gives the same town.
        n_people: 12 or more; beyond the number of first names, people also have last names.

    Raises:
        ValueError: if the lists of names do not suffice.
    """
    random = Random(f"town {seed}")
    people = make_people(n_people, random)
    items = {"fact": make_facts(people, random)}
    items |= {kind: make_requests(kind, people, random) for kind in KINDS_OF_TASK[1:]}
    texts, tasks = read_list("documents"), read_list("tasks")
    pools = {kind: [i for i in items[kind] if i["asked"]] for kind in items}
    pools |= texts["lists"] | {"person": people, "thing": tasks["story"]["words"]}
    pools |= {name: tasks["remarks"][name] for name in ("rude", "evasive")}
    pools["category"] = [
        {"category": name, "members": members}
        for name, members in tasks["list"]["categories"].items()
    ]
    homes = sorted({person["home"] for person in people})
    pools["home"] = [
        {
            "home": home,
            "people": join_and([p["name"] for p in people if p["home"] == home]),
        }
        for home in homes
    ]
    pools["sum"] = [
        item | {key: str(item[key]) for key in "abc"} for item in pools["sum"]
    ]
    templates = texts["templates"] | {"ledger": make_ledgers(200, random)}
    templates = {name: compile_templates(texts) for name, texts in templates.items()}
    return Town(seed, people, items, templates, pools)
