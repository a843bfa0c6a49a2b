"""Dialogues, preference pairs and prompts from files, in all the published layouts."""

import codecs
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_lite.runtime.dialogs import (
    answered,
    context_limit,
    dialog_key,
    read_dialogs,
    read_preferences,
    read_prompts,
    split_by_prompt,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import LEVELS, SAFETY_BINS, Preference


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_lines(path: Path, *records: object) -> str:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Key?\n\nAssistant: No.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Key?\n\nAssistant: Yes.",
}
HH_PROMPT = [user("Hi"), assistant("Hello."), user("Key?")]
ALPACA = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
SAFE_RLHF = {
    "prompt": "A key?",
    "response_0": "Ask the owner.",
    "response_1": "Pick the lock with a pin.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}


def reply(role: str, text: str, rank: int | None = None, *replies: dict) -> dict:
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


TREE = {
    "message_tree_id": "1",
    "prompt": reply(
        "prompter",
        "Hi",
        None,
        reply("assistant", "What?", 1),
        reply("assistant", "Spam", 2) | {"deleted": True},
        reply(
            "assistant",
            "Hello.",
            0,
            reply("prompter", "Bye", None, reply("assistant", "See you.")),
        ),
        reply("assistant", "Unranked."),
    ),
}


def flatten(node: dict, parent: str | None = None) -> list[dict]:
    """The messages of a tree, as OpenAssistant's flat files have them."""
    kept = {key: value for key, value in node.items() if key != "replies"}
    mine = kept | {"message_id": f"id of {node['text']}", "parent_id": parent}
    rows = [mine | {"deleted": node.get("deleted", False)}]
    for child in node["replies"]:
        rows += flatten(child, mine["message_id"])
    return rows


def test_our_own_layout(tmp_path: Path) -> None:
    dialog = [
        {"role": "system", "content": "Be kind."},
        user("Hi"),
        assistant("Hello."),
    ]
    prompt = dialog[:2]
    path = write_lines(
        tmp_path / "a.jsonl",
        {"dialog": dialog},
        {"messages": dialog},
        {"prompt": prompt, "chosen": " Hello. ", "rejected": "What?"},
    )
    assert read_dialogs([path]).items == [dialog] * 3
    assert read_prompts([path]).items == [prompt]
    table = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"dialog": dialog}] * 2), table)
    assert read_dialogs([table]).items == [dialog] * 2
    level, safety_bin = next(iter(LEVELS)), SAFETY_BINS[1]
    texts = {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}
    path = write_lines(
        tmp_path / "b.jsonl",
        texts,
        texts | {"level": level, "safety_bin": safety_bin},
        texts | {"level": None},
    )
    plain = Preference([user("Hi")], "Hello.", "What?")
    known = Preference([user("Hi")], "Hello.", "What?", level, safety_bin)
    assert read_preferences([path]).items == [plain, known, plain]
    path = write_lines(tmp_path / "c.jsonl", {"prompt": "Hi"}, {"prompt": prompt})
    assert read_prompts([path]).items == [[user("Hi")], prompt]


def test_hh_rlhf(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", HH)
    assert read_preferences([path]).items == [Preference(HH_PROMPT, "No.", "Yes.")]
    assert read_dialogs([path]).items == [[*HH_PROMPT, assistant("No.")]]
    assert read_prompts([path]).items == [HH_PROMPT]
    both = {
        "chosen": [*HH_PROMPT, assistant("No.")],
        "rejected": [*HH_PROMPT, assistant("Yes.")],
    }
    path = write_lines(tmp_path / "lists.jsonl", both)
    assert read_preferences([path]).items == [Preference(HH_PROMPT, "No.", "Yes.")]


def test_alpaca(tmp_path: Path) -> None:
    question = [user("Add.\n\n1 + 2")]
    pair = {"chosen": "It is 3.", "rejected": "3, of course"}
    for number, more in enumerate(({}, {"input": ""}, {"input": None})):
        name = tmp_path / f"{number}.jsonl"
        record = {"instruction": "Say hi.", "output": "Hi."} | more
        dialogs = read_dialogs([write_lines(name, record)]).items
        assert dialogs == [[user("Say hi."), assistant("Hi.")]]
    path = write_lines(tmp_path / "a.jsonl", ALPACA, ALPACA | pair)
    assert read_dialogs([path]).items == [
        [*question, assistant("3")],
        [*question, assistant("It is 3.")],
    ]
    assert read_prompts([path]).items == [question]
    path = write_lines(tmp_path / "b.jsonl", ALPACA | pair)
    wanted = Preference(question, "It is 3.", "3, of course")
    assert read_preferences([path]).items == [wanted]


def test_safe_rlhf_has_two_judgements(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", SAFE_RLHF)
    safe, unsafe = SAFE_RLHF["response_0"], SAFE_RLHF["response_1"]
    prompt = [user("A key?")]
    assert read_preferences([path]).items == [Preference(prompt, unsafe, safe)]
    assert read_preferences([path], axis="safety").items == [
        Preference(prompt, safe, unsafe, None, SAFETY_BINS[0])
    ]
    for flags, safety_bin in (((True, True), 1), ((False, False), 2)):
        names = ("is_response_0_safe", "is_response_1_safe")
        record = SAFE_RLHF | dict(zip(names, flags, strict=True))
        path = write_lines(tmp_path / "b.jsonl", record)
        (pair,) = read_preferences([path], axis="safety").items
        assert pair.safety_bin == SAFETY_BINS[safety_bin]
    path = write_lines(tmp_path / "c.jsonl", SAFE_RLHF | {"safer_response_id": 1})
    with pytest.raises(ValueError, match=r"line 1: the chosen answer is unsafe"):
        read_preferences([path], axis="safety")
    with pytest.raises(ValueError, match="'kindness' is none of helpfulness, safety"):
        read_preferences([path], axis="kindness")


@pytest.mark.parametrize("layout", ["tree", "messages", "shuffled", "parquet"])
def test_open_assistant(tmp_path: Path, layout: str) -> None:
    rows = flatten(TREE["prompt"])
    if layout == "shuffled":
        rows.reverse()
    if layout == "parquet":
        path = str(tmp_path / "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        records = [TREE] if layout == "tree" else rows
        path = write_lines(tmp_path / "a.jsonl", *records)
    dialog = [user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")]
    assert read_dialogs([path]).items == [dialog]
    assert read_prompts([path]).items == [dialog[:3]]
    wanted = Preference([user("Hi")], "Hello.", "What?")
    assert read_preferences([path]).items == [wanted]


def test_a_tree_ends_with_its_last_answer(tmp_path: Path) -> None:
    question = reply("prompter", "And?")
    tree = {
        "prompt": reply("prompter", "Hi", None, reply("assistant", "Yo", 0, question))
    }
    path = write_lines(tmp_path / "a.jsonl", tree)
    assert read_dialogs([path]).items == [[user("Hi"), assistant("Yo")]]
    assert read_prompts([path]).items == [[user("Hi"), assistant("Yo"), user("And?")]]


def test_a_reply_to_nothing_is_named(tmp_path: Path) -> None:
    rows = flatten(TREE["prompt"])
    path = write_lines(
        tmp_path / "a.jsonl", *rows[1:], *flatten(reply("prompter", "x"))
    )
    with pytest.raises(ValueError, match=r"line 1: the message that it replies to"):
        read_dialogs([path])


def test_every_kind_of_file(tmp_path: Path) -> None:
    records = [ALPACA, {"instruction": "Say hi.", "input": "", "output": "Hi."}]
    lines = "\n\n".join(map(json.dumps, records)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "d.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "e.json").write_bytes(lines)
    (tmp_path / "f.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "g.parquet")
    for name in ("a.jsonl", "d.json", "e.json"):  # as Windows saves them
        marked = codecs.BOM_UTF8 + (tmp_path / name).read_bytes()
        (tmp_path / f"marked-{name}").write_bytes(marked)
    one = read_dialogs([str(tmp_path / "a.jsonl")]).items
    assert len(one) == 2
    for path in tmp_path.iterdir():
        assert read_dialogs([str(path)]).items == one, path
    assert (
        read_dialogs([str(tmp_path / "*"), str(tmp_path / "a.jsonl")]).items == one * 10
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(), json_values), min_size=1), st.booleans())
@settings(max_examples=40)
def test_lists_in_json_are_read_with_their_lines(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict], indents: bool
) -> None:
    from llama2_lite.runtime.dialogs import _places

    path = tmp_path_factory.getbasetemp() / "list.json"
    path.write_text(json.dumps(records, indent=1 if indents else None))
    places = list(_places(path))
    assert [load() for _, load in places] == records
    lines = path.read_text().splitlines()
    for (where, _), record in zip(places, records, strict=True):
        line = lines[int(where.removeprefix(f"{path}, line ")[:-1]) - 1]
        assert not indents or line.strip().startswith("{}" if not record else "{")


MESSAGES = [user("Hi"), assistant("Hello.")]
NO_REPLIES = "line 1: the field 'replies' is not a list of messages"


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (
            [{"dialog": [user("a"), user("b"), assistant("c")]}],
            "line 1: message 2 is fr",
        ),
        (
            [{"dialog": MESSAGES}, {"dialog": [user("a")]}],
            "line 2: .* ends with a quest",
        ),
        ([{"dialog": [user(" "), assistant("b")]}], "line 1: message 1 .* is empty"),
        ([{"dialog": []}], "line 1: the dialogue has no message of the user"),
        (
            [{"dialog": [user("[INST]"), assistant("b")]}],
            r"line 1: .*contains \[INST\]",
        ),
        (
            [{"dialog": [{"role": "user"}]}],
            "line 1: message 1 of 'dialog' has no content",
        ),
        ([{"dialog": "Hi"}], "line 1: the field 'dialog' is not a list"),
        ([{"dialog": ["Hi"]}], "line 1: message 1 of 'dialog' has no role"),
        ([{"instruction": "Hi"}], "line 1: no field 'output', only instruction"),
        (
            [{"instruction": 3, "output": "x"}],
            "line 1: .*'instruction' is not a string",
        ),
        (
            [{"question": "Hi", "answer": "x"}],
            "line 1: .*known has the fields: question, answer",
        ),
        ([{}], "line 1: .* the fields: nothing"),
        ([[1]], "line 1: not a JSON object"),
        (
            [{"prompt": {"role": "x", "text": "Hi"}}],
            "line 1: the role 'x' is not prompter",
        ),
        *(
            ([{"prompt": reply("prompter", "Hi") | {"replies": replies}}], NO_REPLIES)
            for replies in (5, [3], {"role": "assistant"})
        ),
        (
            [{"prompt": reply("prompter", "Hi", None, reply("assistant", "a", [1]))}],
            r"line 1: the rank \[1\] is not a number",
        ),
        (
            [{"message_id": ["a"], "parent_id": None}],
            "line 1: the field 'message_id' is not a string",
        ),
        (
            [{"message_id": "a", "parent_id": ["b"]}],
            "line 1: the field 'parent_id' is not a string",
        ),
    ],
)
def test_bad_dialogs_are_named(tmp_path: Path, records: list, sentence: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", *records)
    with pytest.raises(ValueError, match=rf"a\.jsonl, {sentence}") as info:
        read_dialogs([path])
    assert "--skip-bad drops" in str(info.value)
    assert "\n" not in str(info.value)
    good = write_lines(tmp_path / "good.jsonl", {"dialog": MESSAGES})
    read = read_dialogs([path, good], skip_bad=True)
    assert read.items[-1] == MESSAGES
    assert len(read.bad) == 1
    assert read.bad[0].startswith(f"{path}, line {len(records)}: ")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": " a"}, "answers are identical"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "message 1 .* is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": ""}, "message 2 .* is empty"),
        ({"prompt": "Hi", "chosen": "a"}, "no field 'rejected'"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "level": "much"},
            "level 'much' is none of: significantly better",
        ),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "safety_bin": "ok"},
            "bin 'ok' is none of",
        ),
        (HH | {"chosen": HH["chosen"].replace("Hi", "Ho")}, "have no common prompt"),
        (HH | {"chosen": "Hi"}, "'chosen' does not begin with 'Human:'"),
        (
            HH | {"rejected": "\n\nHuman: Hi"},
            "the rejected dialogue does not end with an answer",
        ),
        (HH | {"rejected": HH["chosen"]}, "answers are identical"),
        (SAFE_RLHF | {"better_response_id": 2}, "'better_response_id' is not 0 or 1"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, record: dict, sentence: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", HH, record)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{sentence}"):
        read_preferences([path])
    read = read_preferences([path], skip_bad=True)
    assert read.items == [Preference(HH_PROMPT, "No.", "Yes.")]
    assert len(read.bad) == 1


LAYOUTS = {
    "our own": [{"prompt": HH_PROMPT, "chosen": "a", "rejected": "b", "level": None}],
    "dialogue": [{"dialog": [*HH_PROMPT, assistant("No.")]}],
    "HH-RLHF": [HH],
    "Alpaca": [ALPACA],
    "PKU-SafeRLHF": [SAFE_RLHF],
    "OpenAssistant": [TREE],
    "OpenAssistant's messages": flatten(TREE["prompt"]),
}


def places_in(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to all that a record holds."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inside:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places_in(item, (*path, key))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@given(st.data())
@settings(max_examples=60)
def test_whatever_stands_in_a_field_no_other_record_is_lost(
    tmp_path_factory: pytest.TempPathFactory, layout: str, data: st.DataObject
) -> None:
    records = json.loads(json.dumps(LAYOUTS[layout]))
    *above, key = data.draw(st.sampled_from(places_in(records)))
    place = records
    for step in above:
        place = place[step]
    place[key] = data.draw(json_values | st.sampled_from([[[]], [{}], [3], 1e999]))
    file = tmp_path_factory.getbasetemp() / "strange.jsonl"
    good = {"prompt": "And this one?", "chosen": "a", "rejected": "b"}
    path = write_lines(file, *records, good)
    for read, axis in (
        (read_dialogs, {}),
        (read_prompts, {}),
        (read_preferences, {"axis": "helpfulness"}),
        (read_preferences, {"axis": "safety"}),
    ):
        found = read([path], skip_bad=True, **axis)
        assert any("And this one?" in str(item) for item in found.items)
        lines = [sentence.removeprefix(f"{path}, line ") for sentence in found.bad]
        assert all(line.split(":")[0].isdigit() for line in lines)


def test_rows_of_parquet_are_named(tmp_path: Path) -> None:
    rows = [ALPACA] * 1500 + [ALPACA | {"output": None}]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1500: .*'output'"):
        read_dialogs([path])


def test_values_that_python_cannot_hold_are_dropped_if_asked(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    table = pa.Table.from_pylist([ALPACA] * 3)
    years = pa.array([0, 2**62, 0], pa.timestamp("us"))
    pq.write_table(table.append_column("when", years), path)
    assert len(read_dialogs([path]).items) == 3  # no layout has dates
    pq.write_table(
        table.append_column("n", pa.StructArray.from_arrays([years], ["w"])), path
    )
    with pytest.raises(
        ValueError, match="row 1: the field 'n' cannot be read: date val"
    ):
        read_dialogs([path])
    read = read_dialogs([path], skip_bad=True)
    assert len(read.items) == 2
    assert len(read.bad) == 1


def test_too_long_for_the_context(tmp_path: Path) -> None:
    texts = [f"{i} and {j} make {i + j}." for i in range(9) for j in range(9)]
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer.model", 280)
    limit = context_limit(tokenizer, 60)
    long = {"dialog": [user("1 and 2 make 3. " * 20), assistant("Yes.")]}
    path = write_lines(tmp_path / "a.jsonl", {"dialog": MESSAGES}, long)
    assert len(read_dialogs([path]).items) == 2
    with pytest.raises(ValueError, match=r"line 2: .* tokens, but the context is 60"):
        read_dialogs([path], limit=limit)
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "1 and 2 make 3. " * 20}
    path = write_lines(tmp_path / "b.jsonl", pair, pair | {"rejected": "b"})
    assert len(read_preferences([path], limit=limit, skip_bad=True).items) == 1


LONG = b"1" * 5000


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prom', "line 2: not JSON"),
        ("a.json", b'[{"prompt": "x"},\n{"prom', "line 2: not JSON"),
        ("a.json", b'[{"prompt": "x"}\n{"prompt": "y"}]', "line 1: neither a comma"),
        ("a.json", b'[{"prompt": "x"}', "line 1: neither a comma"),
        ("a.json", b'[{"prompt": "x"},', "line 1: not JSON"),
        ("a.json", b'[{"prompt": "x"}, 3]', "line 1: not a JSON object"),
        ("a.json", b'[{"prompt": "\xe9"}]', "is not UTF-8 at byte 13"),
        ("a.json", b'[{"prompt": "x"},\n{"n": %s}]' % LONG, "line 2: a number has"),
        ("a.jsonl", b'{"n": %s}' % LONG, "line 1: a number has too many digits"),
        ("a.jsonl.gz", b"PK", "is not a whole gzip file"),
        ("a.jsonl.xz", b"PK", "is not a whole xz file"),
        ("a.parquet", b"PK", "is not a Parquet file"),
        ("a.csv", b"a,b", r"is none of \.jsonl"),
        ("a.json", b"[]", "there is no prompt in"),
        ("a.jsonl", b"", "is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_prompts([str(path)])


def test_nothing_left_says_why(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"dialog": []})
    with pytest.raises(ValueError, match=r"no dialogue in .*line 1: the dialogue has"):
        read_dialogs([path], skip_bad=True)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_dialogs([str(tmp_path / "none.jsonl")])


@given(
    st.lists(st.integers(0, 20), min_size=2).filter(lambda x: len(set(x)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_a_split_shares_no_prompt(
    numbers: list[int], fraction: float, seed: int
) -> None:
    def prompt_of(item: tuple[int, int]) -> list[dict[str, str]]:
        return [user(str(item[1]))]

    items = list(enumerate(numbers))
    train, held_out = split_by_prompt(items, prompt_of, fraction, seed)
    assert sorted(train + held_out) == items
    assert train
    assert held_out
    assert not {n for _, n in train} & {n for _, n in held_out}
    assert (train, held_out) == split_by_prompt(items, prompt_of, fraction, seed)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="3 samples with one prompt"):
        split_by_prompt([1, 2, 3], lambda _: [user("Hi")], 0.5)


def test_real_hh_rlhf(shared_data: Path) -> None:
    path = str(shared_data / "hh_harmless_1500.jsonl.gz")
    with pytest.raises(ValueError, match=r"gz, line 87: message 4 .* is empty; --skip"):
        read_preferences([path], axis="safety")
    read = read_preferences([path], axis="safety", skip_bad=True)
    assert len(read.items) + len(read.bad) == 1500
    assert 0 < len(read.bad) < 15
    turns = [len(pair.prompt) for pair in read.items]
    assert max(turns) > 5
    assert all(turn % 2 for turn in turns)
    assert any("no common prompt" in sentence for sentence in read.bad)
    tokenizer = Tokenizer(shared_data / "llama2_tokenizer.model")
    limit = context_limit(tokenizer, 512)
    short = read_preferences([path], limit=limit, skip_bad=True)
    assert 0.8 * len(read.items) < len(short.items) < len(read.items)
    train, held_out = split_by_prompt(read.items, lambda pair: pair.prompt, 0.2)
    prompts = [{dialog_key(pair.prompt) for pair in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]


def test_real_instructions_with_preferences(shared_data: Path) -> None:
    path = str(shared_data / "instructions_with_preference_900.json")
    with pytest.raises(ValueError, match=r"json, line 856: the two answers are ident"):
        read_preferences([path])
    text = Path(path).read_text()
    assert json.loads(text)[0]["instruction"] in text.splitlines()[2]
    read = read_preferences([path], skip_bad=True)
    assert len(read.items) == 894
    assert len(read.bad) == 6
    dialogs = read_dialogs([path]).items
    assert len(dialogs) == 900
    pair = read.items[0]
    assert dialogs[0] == answered(pair, pair.chosen)
