"""`sft`, `reward`, `reject`, `ppo`, `gatt` on files, and `chat` with the result."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import KILLED, in_process

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.reward import RewardConfig, RewardModel
from llama2_lite.runtime.cli import main
from llama2_lite.runtime.command import held
from llama2_lite.runtime.dialogs import read_dialogs
from llama2_lite.runtime.file_data import DialogFiles, PreferenceFiles
from llama2_lite.runtime.rewards import open_reward
from llama2_lite.runtime.sampled_data import GhostData, read_records, write_lines
from llama2_lite.runtime.talk import (
    Conversation,
    open_model,
    printable,
    read_lines,
    talk,
)
from llama2_lite.runtime.usage import usage
from llama2_lite.tokenizer import Tokenizer, train_tokenizer

RECORDS = [
    {
        "prompt": f"What is {a} + {b}?",
        "chosen": f"It is {a + b}.",
        "rejected": f"No, {a}!",
    }
    for a in range(1, 7)
    for b in range(1, 7)
]
TRAINER = [
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--checkpoint_every=2",
]
COMMANDS = ["sft", "reward", "reject", "ppo", "gatt"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, two tiny reward models and files to learn from."""
    folder = tmp_path_factory.mktemp("world")
    texts = [
        f"[INST] {r['prompt']} [/INST] {r['chosen']} {r['rejected']}" for r in RECORDS
    ]
    tokenizer = train_tokenizer([*texts, "<<SYS>> <</SYS>>"], folder / "t.model", 320)
    torch.manual_seed(0)
    config = LlamaConfig(16, 1, 2, 2, 320, 32, max_seq_len=64)
    Llama(config).save_pretrained(folder / "start", tokenizer)
    for name in ("helpful", "safe"):
        model = RewardModel(RewardConfig(**vars(config)))
        torch.nn.init.normal_(model.head.weight)
        model.save_pretrained(folder / name, tokenizer)
    lines = "\n".join(map(json.dumps, RECORDS))
    (folder / "pairs.jsonl").write_text(lines)
    turns = [
        {"role": role, "content": record[key]}
        for record in RECORDS
        for role, key in (("user", "prompt"), ("assistant", "chosen"))
    ]
    dialogs = [{"dialog": turns[i : i + 4]} for i in range(0, len(turns), 4)]
    (folder / "dialogs.jsonl").write_text("\n".join(map(json.dumps, dialogs)))
    (folder / "told.jsonl").write_text('{"text": "Be kind."}\n{"text": "Be it."}')
    (folder / "safety.jsonl").write_text('{"prompt": "Where is the key?"}')
    return folder


def arguments(world: Path, name: str, output: Path) -> list[str]:
    """A tiny run of a command; what samples starts from what `sft` leaves."""
    start = world / ("start" if name in ("sft", "reward") else "runs/sft/model")
    shared = [f"--start={start}", f"--output={output}", *TRAINER]
    files = f"--data.files={world}/pairs.jsonl"
    safety = f"--data.safety_files={world}/safety.jsonl"
    more = {
        "sft": [
            *("--data.batch_size=2", "--data.epochs=16", "--model.peak_lr=0.01"),
            *("--trainer.val_check_interval=40", "--checkpoint_every=40"),
        ],
        "reward": ["--data.batch_size=8", "--data.epochs=2", "--model.peak_lr=0.01"],
        "reject": [
            *(f"--data.helpfulness={world}/helpful", f"--data.safety={world}/safe"),
            *(safety, "--data.k=3", "--data.max_new_tokens=8", "--data.batch_size=4"),
        ],
        "ppo": [
            *(f"--model.helpfulness={world}/helpful", f"--model.safety={world}/safe"),
            *(safety, "--data.validation_prompts=8", "--data.batch_size=8"),
            *("--model.settings.minibatch_size=4", "--trainer.max_steps=6"),
            *("--model.settings.max_new_tokens=12", "--model.settings.lr=0.001"),
        ],
        "gatt": [
            *(f"--data.files={world}/dialogs.jsonl", "--data.batch_size=4"),
            *(f"--data.instructions={world}/told.jsonl", "--data.max_new_tokens=12"),
            *("--data.plain=0.3", "--data.context=1"),
        ],
    }
    return [name, *shared, files, *more[name]]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(world: Path) -> dict[str, Path]:
    """A finished run of each command."""
    folders = {name: world / "runs" / name for name in COMMANDS}
    for name, folder in folders.items():
        assert main(arguments(world, name, folder)) == 0
    return folders


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_leaves_a_model_and_figures(
    finished: dict[str, Path], world: Path, name: str
) -> None:
    folder = finished[name]
    figures = json.loads((folder / "result.json").read_text())
    assert figures["steps"] > 3
    assert figures["held_out"] > 0
    assert (folder / "logs" / "metrics.csv").is_file()
    kind = RewardModel if name == "reward" else Llama
    model = kind.from_pretrained(folder / "model")
    assert model.config.dim == 16
    tokenizer = Tokenizer(folder / "model" / "tokenizer.model")
    assert tokenizer.sha256 == Tokenizer(world / "t.model").sha256
    before = (world / "start" / "model.safetensors").read_bytes()
    assert weights(folder) not in (before, name != "sft" and weights(finished["sft"]))


def test_pairs_that_are_reported_on_chose_nothing(world: Path) -> None:
    data = PreferenceFiles(str(world / "start"), str(world / "pairs.jsonl"), seed=3)
    reported = {pair.prompt[-1]["content"] for pair in data.held_out_pairs}
    rows = [ids for pair in data.held_out.rows for ids in pair]
    texts = [data.opened.decode(ids) for ids in rows]
    assert reported
    assert texts
    assert not any(
        f"[INST] {prompt} [/INST]" in t for prompt in reported for t in texts
    )


def test_what_was_learned_is_measured(finished: dict[str, Path], capsys) -> None:
    figures = json.loads((finished["reward"] / "result.json").read_text())
    parts = [figures[part] for part in ("pairs", "validation", "held_out")]
    assert sum(parts) == len(RECORDS)
    assert parts[1] == parts[2] > 0
    assert 0.9 <= figures["accuracy"] <= 1  # "It is" against "No" is easy
    figures = json.loads((finished["sft"] / "result.json").read_text())
    assert figures["validation_loss"] < 2.5  # log 320 is 5.8
    figures = json.loads((finished["ppo"] / "result.json").read_text())
    assert figures["better"] + figures["worse"] <= figures["held_out"] == 8
    assert figures["reward"] != figures["reward_before"]


def test_rejection_keeps_the_best_answers(
    finished: dict[str, Path], world: Path
) -> None:
    file = finished["reject"] / "sampled" / "dialogs.jsonl"
    dialogs = read_dialogs([str(file)]).items
    prompts = [dialog[0]["content"] for dialog in dialogs]
    assert len(prompts) == len(set(prompts)) > len(RECORDS) / 2
    assert "Where is the key?" in prompts
    (drawn,) = (file.parent).glob("answers-*.json")
    kept = json.loads(drawn.read_text())
    best = [
        texts[max(range(3), key=lambda i: scores[i])]
        for texts, scores in zip(kept["answers"], kept["scores"], strict=True)
        if max(scores) > float("-inf")
    ]
    assert [dialog[1]["content"] for dialog in dialogs] == [
        text.strip() for text in best
    ]


def test_best_answers_that_are_too_long_are_counted(
    finished: dict[str, Path], world: Path, tmp_path: Path, capfd
) -> None:
    figures = json.loads((finished["reject"] / "result.json").read_text())
    assert figures["too_long"] == 0
    folder = shutil.copytree(finished["reject"], tmp_path / "run")
    long = [("user", "What is 1 + 2?"), ("assistant", "It is 3. " * 20)]
    dialog = [{"role": role, "content": text} for role, text in long]
    with (folder / "sampled" / "dialogs.jsonl").open("a") as file:
        file.write(json.dumps({"dialog": dialog, "score": 1.0}) + "\n")
    assert main(arguments(world, "reject", folder)) == 0
    again = json.loads((folder / "result.json").read_text())
    assert again == figures | {"too_long": 1}
    said = capfd.readouterr().out
    assert said.endswith("best answers left out, longer than 64 tokens: 1\n")


def test_prompts_without_an_answer_are_counted(
    finished: dict[str, Path], world: Path, tmp_path: Path, capfd
) -> None:
    folder = shutil.copytree(finished["reject"], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    (folder / "sampled" / "dialogs.jsonl").unlink()
    (path,) = (folder / "sampled").glob("answers-*.json")
    sampled = json.loads(path.read_text())
    sampled["answers"][0], sampled["scores"][0] = [""] * 3, [float("-inf")] * 3
    path.write_text(json.dumps(sampled))
    assert main(arguments(world, "reject", folder)) == 0
    assert json.loads((folder / "result.json").read_text())["unanswered"] == 1
    said = capfd.readouterr().out
    assert said.endswith("prompts without an answer of an end and content: 1\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_finished_run_says_the_same_again(
    finished: dict[str, Path], world: Path, name: str, capfd
) -> None:
    folder = finished[name]
    before = weights(folder), (folder / "result.json").read_text()
    assert main(arguments(world, name, folder)) == 0
    assert "continuing from step" in capfd.readouterr().err
    assert (weights(folder), (folder / "result.json").read_text()) == before


def test_ppo_samples_from_the_policy_itself_as_from_a_copy(
    finished: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    given = arguments(world, "ppo", tmp_path / "own")
    assert main([*given, "--model.rollout=unshard"]) == 0
    assert weights(tmp_path / "own") == weights(finished["ppo"])


def run_and_die(arguments: list[str], module: str, function: str, nth: int) -> None:
    """Be killed at the n-th call of a function."""
    import importlib

    place = importlib.import_module(f"llama2_lite.runtime.{module}")
    original, calls = getattr(place, function), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(place, function, counted)
    main(arguments)


@pytest.mark.parametrize(
    ("name", "module", "function", "nth"),
    [
        ("sft", "checkpoints", "save_file", 2),
        ("reward", "checkpoints", "complete_checkpoint", 2),
        ("ppo", "checkpoints", "save_file", 2),
        ("reject", "sampled_data", "write_lines", 2),
        ("reject", "checkpoints", "save_file", 2),
        ("gatt", "sampled_data", "write_lines", 2),
        ("gatt", "checkpoints", "complete_checkpoint", 2),
    ],
)
def test_killed_and_continued_is_never_killed(
    finished: dict[str, Path],
    world: Path,
    tmp_path: Path,
    name: str,
    module: str,
    function: str,
    nth: int,
) -> None:
    run = arguments(world, name, tmp_path / "run")
    assert in_process(run_and_die, run, module, function, nth) == KILLED
    assert main(run) == 0
    assert weights(tmp_path / "run") == weights(finished[name])


def test_a_later_round_takes_the_best_of_all(
    finished: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    earlier = finished["reject"] / "sampled" / "dialogs.jsonl"
    run = arguments(world, "reject", tmp_path / "run")
    more = [f"--data.earlier={earlier}", "--seed=1", "--data.temperatures=[0.7, 1.3]"]
    assert main([*run, *more]) == 0
    before, after = (
        {
            record["dialog"][0]["content"]: record["score"]
            for record in map(json.loads, path.read_text().splitlines())
        }
        for path in (earlier, tmp_path / "run" / "sampled" / "dialogs.jsonl")
    )
    assert before.keys() <= after.keys()
    assert all(after[prompt] >= before[prompt] - 1e-4 for prompt in before)
    assert any(after[prompt] > before[prompt] + 1e-4 for prompt in before)


@pytest.fixture
def fails(capfd):
    """Run a command that must fail, and return its sentence."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        assert main([*arguments]) == 2
        err = capfd.readouterr().err
        assert "Traceback" not in err
        last = [line for line in err.splitlines() if line][-1]
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return run


BAD = {"prompt": "Hi", "chosen": "a", "rejected": "a"}


def test_bad_samples_are_named_or_dropped_and_counted(
    world: Path, tmp_path: Path, fails, capfd
) -> None:
    path, folder = tmp_path / "pairs.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, [*RECORDS, BAD])))
    run = [*arguments(world, "reward", folder), f"--data.files={path}"]
    sentence = fails(*run)
    assert sentence.startswith(f"{path}, line 37: the two answers are identical; ")
    assert "--skip-bad" in sentence
    assert not folder.exists()
    assert main([*run, "--skip-bad", "--trainer.max_steps=1"]) == 0
    assert (
        f"dropped 1 bad samples, the first: {path}, line 37" in capfd.readouterr().err
    )
    assert json.loads((folder / "result.json").read_text())["dropped"] == 1


LONG = RECORDS[0] | {"chosen": "It is 2. " * 99}


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
BAD_RECORDS = {
    "no common prompt": (
        "reward",
        {
            side: f"\n\nHuman: {side}?\n\nAssistant: a"
            for side in ("chosen", "rejected")
        },
    ),
    "take turns": ("sft", {"dialog": [USER, USER, ANSWER]}),
    "ends with a question": ("sft", {"dialog": [USER, ANSWER, USER]}),
    "the context is 64": (
        "sft",
        {"dialog": [USER, ANSWER | {"content": "and so on " * 60}]},
    ),
    "(user) is empty": ("reject", {"prompt": ""}),
    "message 1 (user) is empty": ("ppo", {"prompt": " "}),
}


@pytest.mark.parametrize("words", BAD_RECORDS)
def test_bad_records_of_a_command_are_named_or_dropped_and_counted(
    finished: dict[str, Path], world: Path, tmp_path: Path, fails, words: str
) -> None:
    name, record = BAD_RECORDS[words]
    lines = [*RECORDS[:30], record]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    run = arguments(world, name, tmp_path / "run")
    run = [*run, f"--data.files={path}"]
    error = fails(*run)
    assert f"{path}, line 31" in error
    assert words in error
    assert not (tmp_path / "run" / "model").exists()
    assert main([*run, "--skip-bad"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["dropped"] == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "Hi', "line 2: not JSON"),
        (json.dumps(LONG), "line 2: the dialogue has .* but the context of .*/helpful"),
    ],
)
def test_earlier_rounds_are_looked_at_before_sampling(
    finished: dict[str, Path],
    world: Path,
    tmp_path: Path,
    fails,
    capfd,
    line: str,
    sentence: str,
) -> None:
    path, folder = tmp_path / "earlier.jsonl", tmp_path / "run"
    path.write_text(f"{json.dumps(RECORDS[0])}\n{line}\n")
    run = [*arguments(world, "reject", folder), f"--data.earlier={path}"]
    assert re.match(f"{path}, {sentence}", fails(*run))
    assert not folder.exists()
    assert main([*run, "--skip-bad", "--trainer.max_steps=1"]) == 0
    assert f"dropped 1 bad samples, the first: {path}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("told", "more", "sentence"),
    [
        ({"text": "Be \ud800 kind."}, [], "{path}, line 1: character 3 of the text, "),
        (
            {"text": "Be kind. " * 99},
            [],
            r"{path}, line 1: the instruction has \d+ tokens, but the context is 64, "
            "less 12 for the answer",
        ),
        (
            {"text": "Be kind."},
            ["--data.combined=1"],
            r"data.combined is 1\.0, but data.instructions has no two that can be",
        ),
        (
            {"text": "Be kind.", "pattern": "ZZZZ"},
            [],
            r"there is no reply to learn: of \d\d sampled replies 0 ended within "
            "data.max_new_tokens=12 and obeyed",
        ),
    ],
)
def test_instructions_of_no_use_are_named(
    finished: dict[str, Path],
    world: Path,
    tmp_path: Path,
    fails,
    told: dict[str, str],
    more: list[str],
    sentence: str,
) -> None:
    path = tmp_path / "told.jsonl"
    path.write_text(json.dumps(told))
    run = [*arguments(world, "gatt", tmp_path / "run"), f"--data.instructions={path}"]
    assert re.match(sentence.format(path=path), fails(*run, *more))


def test_a_single_instruction_is_enough(
    finished: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    path = tmp_path / "told.jsonl"
    path.write_text('{"text": "Be kind."}')
    run = [*arguments(world, "gatt", tmp_path / "run"), f"--data.instructions={path}"]
    assert main([*run, "--trainer.max_steps=1"]) == 0


def test_answers_without_content_are_named(
    finished: dict[str, Path], world: Path, tmp_path: Path, fails
) -> None:
    folder = shutil.copytree(finished["reject"], tmp_path / "run")
    (folder / "sampled" / "dialogs.jsonl").unlink()
    n_prompts = len(RECORDS) + 1
    empty = {"answers": [[""] * 3], "scores": [[float("-inf")] * 3]}
    (path,) = (folder / "sampled").glob("answers-*.json")
    path.write_text(json.dumps({key: row * n_prompts for key, row in empty.items()}))
    assert fails(*arguments(world, "reject", folder)) == (
        "no answer to any of 37 prompts has an end and content, with data.k=3 and "
        "data.max_new_tokens=8: give larger ones, or another data.sampler"
    )


def test_what_is_sampled_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = [{"text": f"a{chr(code)}b"} for code in (*range(256), 0x2028, 0x2029)]
    write_lines(tmp_path / "a.jsonl", records)
    assert read_records(tmp_path / "a.jsonl") == records


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("sft", ["--start=/nowhere"], ["/nowhere", "no config.json"]),
        ("sft", ["--data.files=/nowhere/*.jsonl"], ["no file matches /nowhere"]),
        ("sft", ["--data.sequence_length=100"], ["100", "context", "64 tokens"]),
        ("sft", ["--data.sequence_length=8"], ["line 1", "data.sequence_length is 8"]),
        ("sft", ["--data.train_on=some"], ["train_on", "'some'"]),
        ("sft", ["--data.validation_fraction=1"], ["validation_fraction"]),
        ("sft", ["--data.epchs=1"], ["'data.epchs'", "did you mean data.epochs"]),
        ("sft", ["--model.folder=x"], ["model.folder"]),
        ("reward", ["--data.margins=huge"], ["'huge'", "none, small, large"]),
        ("reward", ["--data.axis=kindness"], ["'kindness'", "helpfulness, safety"]),
        ("reject", ["--data.k=0"], ["data.k must be a whole number above 0"]),
        ("reject", ["--data.temperatures=[]"], ["data.temperatures is empty"]),
        ("reject", ["--data.temperatures=[-1]"], ["data.temperatures must be"]),
        ("reject", ["--data.temperatures=[0, 1]"], ["holds 0", "all data.k=3 answers"]),
        ("reject", ["--data.safety="], ["data.safety_files", "give data.safety"]),
        ("ppo", ["--model.safety="], ["data.safety_files", "give model.safety"]),
        ("reward", ["--data.own_share=0.9"], ["data.own_share", "data.other_files"]),
        (
            "reward",
            ["--data.other_files={files}", "--data.own_share=0"],
            ["data.own_share must be above 0 and at most 1, not 0"],
        ),
        ("reward", ["--model.safety_weight=1"], ["model.safety_weight", "safety_bin"]),
        ("reward", ["--model.likelihood_weight=-1"], ["weight must not be negative"]),
        *(
            ("reward", [f"--model.{name}=-1"], [f"model.{name} must be 0 or more"])
            for name in ("safety_weight", "next_token_weight")
        ),
        ("sft", ["--data.epochs=inf"], ["data.epochs must be a finite number"]),
        ("gatt", ["--model.peak_lr=-1"], ["model.peak_lr must be above 0, but is -1"]),
        *(
            (name, [f"--data.{key}=0"], [f"data.{key} must be a", "above 0, but is 0"])
            for name in COMMANDS
            for key in ("epochs", "batch_size", "sequence_length")
            if name != "ppo" or key == "batch_size"
        ),
        *(
            ("gatt", [f"--data.{key}={value}"], [f"data.{key} must be a", value])
            for key, value in (
                ("context", "0"),
                ("context", "-1"),
                ("plain", "7"),
                ("combined", "-0.5"),
                ("temperature", "-1"),
                ("max_new_tokens", "0"),
            )
        ),
        *(
            ("ppo", [f"--model.settings.{key}={value}"], [f"settings.{key} must be"])
            for key, value in (
                ("minibatch_size", "0"),
                ("max_new_tokens", "-5"),
                ("clip", "-0.2"),
                ("lr", "0"),
                ("critic_lr", ".nan"),
                ("clip_norm", "0"),
                ("kl_weight", "-1"),
                ("cut_penalty", "-1"),
                ("weight_decay", "-1"),
                ("gamma", "1.5"),
                ("lam", "-0.1"),
            )
        ),
        (
            "reject",
            ["--data.sequence_length=20"],
            ["tokens, but data.sequence_length is 20, less 8 for the answer"],
        ),
        (
            "gatt",
            ["--data.context=2"],
            ["line 1", "told at every turn", "but the context is 64"],
        ),
        ("gatt", ["--data.sequence_length=60"], ["but data.sequence_length is 60"]),
        ("ppo", ["--data.validation_prompts=37"], ["validation_prompts", "37 prompts"]),
        ("ppo", ["--model.settings.max_new_tokens=60"], ["less 60 for the answer"]),
        (
            "ppo",
            ["--model.settings.minibatch_size=3"],
            ["data.batch_size is 8", "model.settings.minibatch_size, which is 3"],
        ),
        *(
            (
                "ppo",
                ["--model.settings.critic=false", f"--model.settings.{key}=0.5"],
                [f"model.settings.{key} is of use to a value model only"],
            )
            for key in ("critic_lr", "lam")
        ),
        *(
            ("sft", [f"--trainer.{key}=0"], [f"trainer.{key} must be above 0"])
            for key in (
                "val_check_interval",
                "log_every_n_steps",
                "limit_train_batches",
            )
        ),
        ("sft", ["--config=reward"], ["'reward' is one for llama2-lite reward, not "]),
        ("sft", ["--seed=-1"], ["seed must be a whole number from 0", "but is -1"]),
        ("sft", ["--start={helpful}"], ["holds a reward model; a language model"]),
        ("ppo", ["--model.safety={start}"], ["holds a language model; a reward model"]),
    ],
)
def test_bad_settings(
    finished: dict[str, Path],
    world: Path,
    tmp_path: Path,
    fails,
    name: str,
    more: list[str],
    words: list[str],
) -> None:
    places = {"files": "pairs.jsonl", "helpful": "helpful", "start": "start"}
    places = {key: world / name for key, name in places.items()}
    more = [argument.format(**places) for argument in more]
    sentence = fails(*arguments(world, name, tmp_path / "run"), *more)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name", [*COMMANDS, "chat", "generate"])
def test_the_folder_of_a_run_says_where_its_model_is(
    finished: dict[str, Path], world: Path, tmp_path: Path, fails, name: str
) -> None:
    folder = finished["sft"]
    if name in COMMANDS:
        run = [*arguments(world, name, tmp_path / "run"), f"--start={folder}"]
    else:
        run = [name, str(folder), *(["Hi"] if name == "generate" else [])]
    sentence = fails(*run)
    assert sentence == (
        f"{folder} is no model folder: no config.json in it; this run has its model "
        f"in {folder / 'model'}"
    )


@pytest.mark.parametrize("name", ["sft", "reject"])
@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("", "prompts: '': message 1 (user) is empty"),
        ('["Hi", "a [/INST] b"]', "prompts: 'a [/INST] b': message 1 (user) contains"),
        ("Hi " * 40, "tokens, but the context is 64, less 1 for the answer"),
    ],
)
def test_prompts_are_looked_at_before_training(
    finished: dict[str, Path],
    world: Path,
    tmp_path: Path,
    fails,
    name: str,
    prompts: str,
    sentence: str,
) -> None:
    folder = tmp_path / "run"
    said = fails(*arguments(world, name, folder), f"--prompts={prompts}")
    assert said.startswith("prompts: ")
    assert sentence in said
    assert not folder.exists()


def test_what_is_required_is_named(fails) -> None:
    assert "start is missing" in fails("sft", "--data.files=a.jsonl")
    assert "data.files: give each" in fails("sft", "--start=/nowhere")
    assert "did you mean reward" in fails("rewrd", "--start=/nowhere")


@pytest.mark.parametrize("name", ["reject", "ppo"])
def test_reward_models_must_fit(
    finished: dict[str, Path], world: Path, tmp_path: Path, fails, name: str
) -> None:
    part = "data" if name == "reject" else "model"
    run = arguments(world, name, tmp_path / "run")
    other = shutil.copytree(world / "safe", tmp_path / "other")
    train_tokenizer(["other words " * 9], other / "tokenizer.model", 270)
    sentence = fails(*run, f"--{part}.safety={other}")
    assert f"{other} has another tokenizer than the policy" in sentence
    names = f"--{part}.helpfulness", f"--{part}.safety="
    without = [argument for argument in run if not argument.startswith(names)]
    assert "there is no reward model" in fails(*without)
    assert "no config.json" in fails(*run, f"--{part}.safety=/nowhere")
    sentence = fails(*run, f"--{part}.safety={finished['reward']}")
    assert sentence.endswith(f"this run has its model in {finished['reward']}/model")
    sentence = fails(*run, f"--{part}.safety={world}/start")
    assert "holds a language model; a reward model is needed here" in sentence


BOTH = ["helpfulness", "safety"]
NOT_FINITE = r"the reward model {broken} gives \d+ of \d+ answers a score such as nan, "


@pytest.mark.parametrize(
    ("name", "value", "broken", "sentence"),
    [
        ("reject", 0.0, BOTH, r"all \d+ answers have the score 0: there is no best"),
        ("ppo", 0.0, BOTH, r"all \d+ rewards are equal: nothing can be learnt"),
        *(
            (name, float("nan"), broken, NOT_FINITE)
            for name in ("reject", "ppo")
            for broken in (BOTH, ["helpfulness"], ["safety"])
        ),
    ],
)
def test_useless_rewards_stop_the_run(
    finished: dict[str, Path],
    world: Path,
    tmp_path: Path,
    fails,
    name: str,
    value: float,
    broken: list[str],
    sentence: str,
) -> None:
    part = "data" if name == "reject" else "model"
    folder = shutil.copytree(world / "safe", tmp_path / "broken")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["score.weight"] = torch.full_like(tensors["score.weight"], value)
    save_file(tensors, path, {"format": "pt"})
    run = arguments(world, name, tmp_path / "run")
    # where a prompt is tagged, a broken safety model shows even without a check
    run = [argument for argument in run if "safety_files" not in argument]
    said = fails(*run, *(f"--{part}.{axis}={folder}" for axis in broken))
    assert re.match(sentence.format(broken=folder), said), said


def test_a_single_reward_model_reads_each_answer_once(world: Path, monkeypatch) -> None:
    folder, texts = world / "helpful", ["It is 3.", "No, 1!"]
    prompt = {"role": "user", "content": "What is 1 + 2?"}
    sizes, place = RewardConfig.read(folder), torch.device("cpu")
    score = open_reward(None, str(folder), folder, sizes, [], place)
    dialogs = [[prompt, {"role": "assistant", "content": text}] for text in texts]
    expected = RewardModel.from_pretrained(folder).score(
        Tokenizer(world / "t.model"), dialogs
    )
    forward, read = RewardModel.forward, []

    def counted(self: RewardModel, *batch: torch.Tensor) -> torch.Tensor:
        read.append(len(batch[0]))
        return forward(self, *batch)

    monkeypatch.setattr(RewardModel, "forward", counted)
    torch.testing.assert_close(score([[prompt]] * 2, texts), expected)
    assert read == [2]


def test_a_folder_with_another_run_is_left_alone(
    finished: dict[str, Path], world: Path, fails
) -> None:
    folder = finished["sft"]
    before = weights(folder)
    sentence = fails(*arguments(world, "sft", folder), "--model.peak_lr=0.5")
    assert "holds a run with model.peak_lr = 0.01, not 0.5" in sentence
    for name in ("reward", "reject", "ppo", "gatt"):
        assert "holds a run of `sft`;" in fails(*arguments(world, name, folder))
    assert weights(folder) == before


@pytest.mark.parametrize("key", ["start", "data.files"])
def test_force_does_not_delete_what_is_read(
    finished: dict[str, Path], world: Path, fails, key: str
) -> None:
    folder = finished["reject"]
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    inside = {"start": folder / "model", "data.files": folder / "sampled/dialogs.jsonl"}
    run = [*arguments(world, "sft", folder), f"--{key}={inside[key]}", "--force"]
    assert f"{key} {inside[key]} is in {folder}, where" in fails(*run)
    assert files == {path: path.read_bytes() for path in files}


def test_sampled_answers_are_not_lost_to_other_settings(
    world: Path, finished: dict[str, Path], tmp_path: Path, fails
) -> None:
    run = arguments(world, "reject", tmp_path)
    shutil.copytree(finished["reject"] / "sampled", tmp_path / "sampled")
    shutil.copy(finished["reject"] / "run.json", tmp_path)
    assert "holds a run with model.peak_lr" in fails(*run, "--model.peak_lr=0.5")
    assert any((tmp_path / "sampled").glob("answers-*.json"))


def test_a_folder_is_for_one_process_at_a_time(
    world: Path, tmp_path: Path, fails
) -> None:
    with held(tmp_path / "run"):
        sentence = fails(*arguments(world, "sft", tmp_path / "run"))
    assert f"another process is at work in {tmp_path / 'run'}" in sentence
    assert not (tmp_path / "run" / "run.json").exists()


def test_keys_count_wherever_a_configuration_is_named(
    world: Path, tmp_path: Path
) -> None:
    run = arguments(world, "sft", tmp_path / "run")
    run += ["--data.sequence_length=64", "--trainer.max_steps=1", "--config", "sft"]
    assert main(run) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 1


def test_ppo_says_what_a_device_batch_is_called_there(
    world: Path, tmp_path: Path, fails
) -> None:
    run = arguments(world, "ppo", tmp_path / "run")
    assert "model.settings.minibatch_size" in fails(*run, "--device_batch=2")
    assert "--device_batch" in usage("sft")
    assert "--device_batch" not in usage("ppo")


def test_no_more_pairs_are_validated_at_a_time_than_learned(world: Path) -> None:
    data = PreferenceFiles(
        f"{world}/start", f"{world}/pairs.jsonl", validation_fraction=0.3, batch_size=8
    )
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=4, distributed_sampler_kwargs=None
    )
    sizes = [len(batch.lengths) // 2 for batch in data.val_dataloader()]
    assert max(sizes) == 2
    assert sum(sizes) == data.counts["validation"]
    assert data.batch_size == 8


def test_no_more_windows_are_validated_at_a_time_than_learned(world: Path) -> None:
    data = DialogFiles(
        f"{world}/start", f"{world}/pairs.jsonl", validation_fraction=0.5, batch_size=8
    )
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=4,
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 2},
    )
    assert data.val_dataloader().batch_size == 1  # 8 / 4 parts / 2 processes
    assert data.batch_size == 8


def test_no_more_trees_are_validated_at_a_time_than_learned(
    world: Path, finished: dict[str, Path]
) -> None:
    data = GhostData(
        finished["gatt"],
        f"{world}/runs/sft/model",
        f"{world}/dialogs.jsonl",
        f"{world}/told.jsonl",
        context=1,
        max_new_tokens=12,
        batch_size=8,
        validation_fraction=0.5,
    )
    seen = []
    for parts, place in ((1, None), (2, {"rank": 1, "num_replicas": 2})):
        data.trainer = SimpleNamespace(
            max_steps=1, accumulate_grad_batches=parts, distributed_sampler_kwargs=place
        )
        data.setup("fit")
        batches = list(data.val_dataloader())
        assert max(len(batch.tokens) for batch in batches) <= 8 // parts**2
        seen.append(sum(int(batch.loss_mask.sum()) for batch in batches))
    assert len(data.held_out) >= 4
    assert seen[0] == seen[1]


def test_every_shipped_configuration_of_these_commands_is_valid(
    world: Path, tmp_path: Path
) -> None:
    from llama2_lite.runtime.align import COMMANDS as CLASSES

    for name in COMMANDS:
        run = arguments(world, name, tmp_path / name)[1:]
        short = [] if name == "ppo" else ["--data.sequence_length=64"]
        made = CLASSES[name]([f"--config={name}", *short, *run])
        assert made.trainer.log_every_n_steps == 1  # what comes later wins
        assert made.config.output == tmp_path / name


def test_chat_streams_and_remembers(world: Path) -> None:
    model, tokenizer = open_model(world / "start")
    conversation = Conversation(model, tokenizer, max_new_tokens=5, seed=3)
    first = "".join(conversation.reply("Hi"))
    assert conversation.dialog[-1]["content"] == first.strip()
    assert [m["role"] for m in conversation.dialog] == ["user", "assistant"]
    pieces = list(conversation.reply("What?"))
    assert len(pieces) > 1
    again = Conversation(model, tokenizer, max_new_tokens=5, seed=3)
    assert "".join(again.reply("Hi")) == first
    conversation.begin("Be kind.")
    assert conversation.dialog == [{"role": "system", "content": "Be kind."}]
    list(conversation.reply("Hi"))
    conversation.reset()
    assert conversation.dialog == [{"role": "system", "content": "Be kind."}]


def test_chat_answers_as_in_training(world: Path) -> None:
    from llama2_lite.chat import answer

    model, tokenizer = open_model(world / "start")
    dialog = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    settings = {"max_new_tokens": 9, "temperature": 0.0}
    conversation = Conversation(model, tokenizer, system="Be kind.", **settings)
    said = "".join(conversation.reply("Hi")).strip()
    assert [said] == answer(model, tokenizer, [dialog], **settings)


def test_chat_obeys_commands_and_refuses_tags(world: Path, capfd) -> None:
    shown: list[str] = []
    conversation = Conversation(*open_model(world / "start"), max_new_tokens=4)
    lines = ["Hi", "[INST] x", "/system <<SYS>>", "/frobnicate", "", "/system Be kind."]
    talk(conversation, lines, shown.append)
    text = "".join(shown)
    assert "contains [INST]" in text
    assert "contains <<SYS>>" in text
    assert "there is no command /frobnicate" in text
    assert conversation.dialog == [{"role": "system", "content": "Be kind."}]
    shown.clear()
    talk(conversation, ["Hi " * 60, "/reset", "/help", "/quit", "never"], shown.append)
    text = "".join(shown)
    assert "no room in the context of 64; shorten it, or begin anew" in text
    assert "/system TEXT" in text
    assert len(conversation.dialog) == 1


def test_a_system_message_without_room_is_refused_at_once(world: Path) -> None:
    shown: list[str] = []
    conversation = Conversation(*open_model(world / "start"), system="Be kind.")
    talk(conversation, [f"/system {'Hi ' * 60}"], shown.append)
    assert "no room in the context of 64; shorten the system message" in shown[0]
    assert conversation.dialog == [{"role": "system", "content": "Be kind."}]


def test_an_answer_without_an_end_is_marked(world: Path, monkeypatch) -> None:
    from llama2_lite.runtime import talk as module

    shown: list[str] = []
    conversation = Conversation(*open_model(world / "start"), max_new_tokens=4)
    talk(conversation, ["Hi"], shown.append)
    assert shown[-1] == "[cut after 4 tokens]\n"
    conversation.max_new_tokens = 100
    talk(conversation, ["/reset", "Hi"], shown.append)  # to the end of the context
    assert shown[-1] == f"[cut after {conversation.cut_after} tokens]\n"
    assert 4 < conversation.cut_after < 64
    ids = [*conversation.tokenizer.encode("Yes."), conversation.tokenizer.eos_id]
    monkeypatch.setattr(module, "stream", lambda *_, **__: iter(ids))
    shown.clear()
    talk(conversation, ["/reset", "Hi"], shown.append)
    assert "".join(shown) == "[begun anew]\nYes.\n"


def test_bytes_that_are_no_text_do_not_end_a_chat(monkeypatch) -> None:
    import io
    import sys

    typed = io.BytesIO(b"Caf\xe9\n/quit\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, "utf-8"))
    assert list(read_lines()) == ["Caf\ufffd\n", "/quit\n"]


def test_an_answer_can_be_cut_short(world: Path) -> None:
    conversation = Conversation(*open_model(world / "start"), max_new_tokens=20)
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    talk(conversation, ["Hi"], write)
    said = "".join(shown[:3]).strip()
    assert printable(conversation.dialog[-1]["content"]) == said
    shown.clear()
    conversation.reset()

    def terminated(text: str) -> None:
        raise KeyboardInterrupt("terminated")

    with pytest.raises(KeyboardInterrupt):
        talk(conversation, ["Hi"], terminated)


def test_control_characters_are_not_shown(world: Path, monkeypatch) -> None:
    from llama2_lite.runtime import talk as module

    monkeypatch.setattr(module, "stream_text", lambda *_: iter([" a\x1b[31mb", "\nc"]))
    shown: list[str] = []
    conversation = Conversation(*open_model(world / "start"))
    talk(conversation, ["Hi"], shown.append)
    assert "".join(shown) == "a[31mb\nc\n"


def test_chat_is_a_command(world: Path, monkeypatch, capfd, fails) -> None:
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/quit\n"))
    run = ["chat", str(world / "start"), "--max-new-tokens=4", "--system=Be kind."]
    assert main(run) == 0
    assert capfd.readouterr().out.endswith("\n")
    assert "contains [INST]" in fails(*run[:2], "--system=[INST]")
    assert "leaves no room" in fails(*run[:2], f"--system={'Hi ' * 60}")
    assert "temperature must be" in fails(*run[:2], "--temperature=-1")
    assert "top_p must be" in fails(*run[:2], "--top-p=7")
    assert "max_new_tokens must be" in fails(*run[:2], "--max-new-tokens=0")
    assert "there is no folder" in fails("chat", "/nowhere")
    assert "holds a reward model" in fails("chat", str(world / "safe"))


@pytest.fixture(scope="module")
def real_start(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has learned nothing, with a tokenizer of the real text."""
    folder = tmp_path_factory.mktemp("real")
    dialogs = read_dialogs([str(shared_data / "instructions_with_preference_900.json")])
    texts = [message["content"] for dialog in dialogs.items for message in dialog]
    tags = "[INST] [/INST] <<SYS>> <</SYS>>"
    tokenizer = train_tokenizer([*texts, tags], folder / "tokenizer.model", 1024)
    torch.manual_seed(0)
    config = LlamaConfig(32, 1, 2, 2, 1024, 64, max_seq_len=512)
    Llama(config).save_pretrained(folder / "start", tokenizer)
    return folder / "start"


def train_real(
    name: str, start: Path, file: Path, output: Path, *more: str
) -> dict[str, float]:
    """Figures of a short run on real data."""
    run = [name, f"--config={name}", f"--start={start}", f"--output={output}"]
    cpu = "--trainer.accelerator=cpu"
    assert main([*run, f"--data.files={file}", cpu, "--skip-bad", *more]) == 0
    return json.loads((output / "result.json").read_text())


def test_real_instructions_train_sft_and_a_helpfulness_model(
    shared_data: Path, real_start: Path, tmp_path: Path
) -> None:
    file = shared_data / "instructions_with_preference_900.json"
    figures = train_real("sft", real_start, file, tmp_path / "sft", "--data.epochs=6")
    assert figures["dropped"] == 0
    assert figures["validation_loss"] < 6.5  # log 1024 is 6.93
    figures = train_real(
        "reward", tmp_path / "sft" / "model", file, tmp_path / "reward"
    )
    assert figures["dropped"] == 6
    assert figures["held_out"] > 80
    assert figures["validation"] > 80
    assert figures["accuracy"] > 0.55


def test_real_transcripts_train_a_safety_model(
    shared_data: Path, real_start: Path, tmp_path: Path
) -> None:
    file = shared_data / "hh_harmless_1500.jsonl.gz"
    more = ["--data.axis=safety", "--trainer.max_steps=6"]
    figures = train_real("reward", real_start, file, tmp_path / "safety", *more)
    held_out = figures["held_out"] + figures["validation"]
    assert figures["pairs"] + held_out + figures["dropped"] == 1500
    assert figures["pairs"] > 900
    assert figures["validation_loss"] < 0.8  # log 2 is 0.69
    assert 0.3 < figures["accuracy"] < 0.8  # these few steps teach next to nothing
