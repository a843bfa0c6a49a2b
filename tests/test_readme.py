"""The commands of the README that use the package, run as they stand there."""

import io
import json
import shlex
from base64 import b64decode
from pathlib import Path

import pytest

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.runtime.cli import main
from llama2_lite.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ".venv/bin/llama2-lite pretrain --config text --data.files my.txt"
FEW_STEPS = "--trainer.max_steps=2 --model.config.n_layers=1 --data.vocab_size=512"


def run(command: str, more: str = "") -> int | str | None:
    """What a command of the README answers, 0 if all is well."""
    _, *arguments = shlex.split(f"{command} {more}")
    return main(arguments)


def test_own_text_becomes_a_model_that_continues_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chapters = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))
    Path("my.txt").write_text("\n".join(path.read_text() for path in chapters))
    assert run(PRETRAIN, FEW_STEPS) == 0
    capsys.readouterr()
    ask = '.venv/bin/llama2-lite generate runs/text/model "Once upon a time"'
    assert run(ask, "--seed=1") == 0
    assert capsys.readouterr().out.startswith("Once upon a time")


# Each on one line, so that it can be found as it stands there.
SFT = ".venv/bin/llama2-lite sft --config sft --start runs/text/model --data.files dialogs.jsonl"  # noqa: E501
REWARD = ".venv/bin/llama2-lite reward --config reward --start runs/sft/model --data.files pairs.jsonl"  # noqa: E501
CHAT = ".venv/bin/llama2-lite chat runs/sft/model"


def test_a_model_learns_from_dialogues_and_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sums = [(a, b) for a in range(20) for b in range(5)]
    pairs = [
        {"prompt": f"Add {a} and {b}", "chosen": f"{a + b}", "rejected": "No"}
        for a, b in sums
    ]
    lines = [json.dumps(pair) for pair in pairs]
    Path("pairs.jsonl").write_text("\n".join(lines))
    fields = {"prompt": "instruction", "chosen": "output"}
    alpaca = [{fields[key]: pair[key] for key in fields} for pair in pairs]
    Path("dialogs.jsonl").write_text("\n".join(map(json.dumps, alpaca)))
    tokenizer = train_tokenizer(lines, tmp_path / "t.model", 300)
    config = LlamaConfig(16, 1, 2, 2, 300, 32, max_seq_len=512)
    Llama(config).save_pretrained("runs/text/model", tokenizer)
    assert run(SFT, "--trainer.max_steps=2") == 0
    assert run(REWARD, "--trainer.max_steps=2") == 0
    assert "held-out pairs" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    assert run(CHAT) == 0


def test_the_tour_can_be_asked(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if not Path("runs/tour/base").exists():
        pytest.skip("`make tour` has not been run")
    ask = '.venv/bin/llama2-lite generate runs/tour/base "Question: What is 3 + 4?"'
    assert run(ask) == 0
    assert "Question: What is 3 + 4?" in capsys.readouterr().out
    if not Path("runs/tour/chat").exists():
        pytest.skip("`make tour` has made the base model only")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 + 4?\n/quit\n"))
    assert run(".venv/bin/llama2-lite chat runs/tour/chat") == 0
    assert "3 + 4" in capsys.readouterr().out


def test_help_lists_the_settings(capsys):
    assert run(".venv/bin/llama2-lite pretrain --help") == 0
    assert "--data.files" in capsys.readouterr().out


def test_the_picture_is_the_one_that_chapter_01_draws():
    notebook = json.loads((ROOT / "book" / "01_pipeline.ipynb").read_text())
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    drawn = ["".join(part["image/png"]) for part in data if "image/png" in part]
    shown = (ROOT / "book" / "_static" / "road.png").read_bytes()
    assert shown in [b64decode(image) for image in drawn]


PLAN = ".venv/bin/llama2-lite plan --model 70b --gpus 2048 --gpu a100-80gb --tp 8"


def test_a_larger_model_is_planned(capsys):
    assert PLAN in (ROOT / "README.md").read_text()
    assert run(PLAN) == 0
    assert "fits" in capsys.readouterr().out
