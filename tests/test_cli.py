"""The command line: quick help, clear errors, and runs that continue."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file

from llama2_lite.runtime.cli import main
from llama2_lite.runtime.text_data import TextDataModule

ALIGNMENT = ["sft", "reward", "reject", "ppo", "gatt"]
SIZES = [
    "--model.config.dim=16",
    "--model.config.n_layers=1",
    "--model.config.n_heads=2",
    "--model.config.n_kv_heads=2",
    "--model.config.hidden_dim=32",
    "--model.config.max_seq_len=32",
    "--model.warmup=2",
    "--data.vocab_size=290",
    "--data.lengths=[[1.0, 32, 4]]",
    "--trainer.max_steps=12",
    "--trainer.val_check_interval=4",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--checkpoint_every=3",
    "--sample_tokens=8",
]


def command(*arguments, **keywords):
    """Run the command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "llama2_lite.runtime.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **keywords,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text file."""
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    lines = [f"{i} and {j} make {i + j}." for i in range(30) for j in range(30)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run_folder(text, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "sums"
    assert pretrain(text, folder) == 0
    return folder


def pretrain(text, folder, *more):
    return main(
        ["pretrain", f"--output={folder}", f"--data.files={text}", *SIZES, *more]
    )


@pytest.mark.parametrize("prompts", ["7 and:", '["7 and:", "8"]'])
def test_prompts_are_one_text_or_several(text, tmp_path, capsys, prompts):
    more = [f"--prompts={prompts}", "--trainer.max_steps=1"]
    assert pretrain(text, tmp_path / "run", *more) == 0
    said = capsys.readouterr().out
    assert "\n7 and:" in said
    assert ("\n8" in said) == ("8" in prompts)


@pytest.mark.parametrize(
    "name", [None, "tour", "generate", "chat", "plan", "pretrain", *ALIGNMENT]
)
def test_help_imports_nothing_heavy(name):
    arguments = [] if name is None else [name]
    code = (
        "import sys; from llama2_lite.runtime.cli import main; "
        f"assert main({[*arguments, '--help']}) == 0; "
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: llama2-lite")


def test_a_run_leaves_model_logs_and_figures(run_folder, capfd):
    names = {path.name for path in run_folder.glob("[!.]*")}
    assert names == {
        *("checkpoints", "config.yaml", "corpus", "logs", "model"),
        *("result.json", "run.json"),
    }
    figures = json.loads((run_folder / "result.json").read_text())
    assert 0 < figures["bits_per_character"] < 8
    with (run_folder / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["loss"]] == [str(i) for i in range(12)]
    assert list((run_folder / "logs").glob("events.out.tfevents*"))
    weights = load_file(run_folder / "model" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (290, 16)


def test_transformers_opens_the_model(run_folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(run_folder / "model")
    assert model.config.vocab_size == 290


def test_a_finished_run_says_the_same_again(text, run_folder, capfd):
    before = {p: p.read_bytes() for p in run_folder.rglob("*.safetensors")}
    figures = (run_folder / "result.json").read_text()
    assert pretrain(text, run_folder) == 0
    out, err = capfd.readouterr()
    assert "continuing from step 12" in err
    assert out.splitlines()[-1].startswith("validation loss ")
    assert "bits per character" in out.splitlines()[-1]
    assert {p: p.read_bytes() for p in before} == before
    assert (run_folder / "result.json").read_text() == figures


def test_a_run_may_be_moved(text, run_folder, tmp_path, capfd, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "moved")
    monkeypatch.chdir(text.parent)
    assert pretrain(text.name, folder) == 0
    assert "continuing from step 12" in capfd.readouterr().err


def test_the_stored_configuration_gives_the_same_model(text, run_folder, tmp_path):
    config = run_folder / "config.yaml"
    again = tmp_path / "again"
    assert main(["pretrain", f"--config={config}", f"--output={again}"]) == 0
    name = "model/model.safetensors"
    assert (again / name).read_bytes() == (run_folder / name).read_bytes()


def test_a_shipped_configuration_and_overrides_are_printed(capsys):
    arguments = ["--config", "text", "--model.peak_lr", "0.5", "--print_config"]
    assert main(["pretrain", *arguments]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["peak_lr"] == 0.5
    assert printed["model"]["config"]["dim"] == 256
    assert printed["trainer"]["max_steps"] > 0


def test_every_shipped_configuration_is_valid(tmp_path):
    from llama2_lite.runtime.configs import CONFIGS
    from llama2_lite.runtime.pretrain import Pretrain
    from llama2_lite.runtime.tour import Recipe

    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {"tour", "town", "text"} <= names
    Recipe.read()
    for name in ("town", "text"):  # test_align.py has the others
        made = Pretrain([f"--config={name}", f"--output={tmp_path}"])
        assert made.trainer.max_steps > 0


def test_arguments_of_the_trainer_are_heeded(tmp_path):
    from lightning.pytorch.callbacks import DeviceStatsMonitor

    from llama2_lite.runtime.pretrain import Pretrain

    settings = [
        "--trainer.num_sanity_val_steps=1",
        "--trainer.logger=false",
        "--trainer.callbacks=lightning.pytorch.callbacks.DeviceStatsMonitor",
        "--trainer.accumulate_grad_batches=2",
    ]
    output = f"--output={tmp_path}/run"
    trainer = Pretrain(["--config=town", output, *settings]).trainer
    assert trainer.num_sanity_val_steps == 1
    assert trainer.accumulate_grad_batches == 2
    assert any(isinstance(call, DeviceStatsMonitor) for call in trainer.callbacks)
    assert len(trainer.loggers) == 2
    assert trainer.max_epochs == -1


def test_a_given_tokenizer_is_used(text, run_folder, tmp_path):
    given = run_folder / "model" / "tokenizer.model"
    assert (
        pretrain(
            text,
            tmp_path / "run",
            f"--data.tokenizer={given}",
            "--data.vocab_size=999",
            "--trainer.max_steps=1",
        )
        == 0
    )
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["vocab_size"] == 290
    used = tmp_path / "run" / "model" / "tokenizer.model"
    assert used.read_bytes() == given.read_bytes()


def test_no_more_windows_are_validated_at_a_time_than_learned(text, tmp_path):
    data = TextDataModule(tmp_path, str(text), vocab_size=290, lengths=[(1.0, 16, 8)])
    data.prepare_data()
    data.setup()
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=4,
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 2},
    )
    assert data.val_dataloader().batch_size == 1  # 8 / 4 parts / 2 processes


def test_jsonl_and_parquet_are_read_by_globs(text, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = text.read_text().splitlines()
    records = [{"said": line} for line in lines[:450]]
    jsonl = "\n".join(map(json.dumps, records))
    (tmp_path / "a.jsonl").write_text(jsonl)
    pq.write_table(pa.table({"said": lines[450:]}), tmp_path / "b.parquet")
    patterns = f"[{tmp_path}/*.jsonl, {tmp_path}/*.parquet]"
    settings = [f"--data.files={patterns}", "--data.text_field=said"]
    output = tmp_path / "run"
    more = ["--trainer.max_steps=1", "--data.validation_fraction=0.2"]
    assert main(["pretrain", f"--output={output}", *SIZES, *settings, *more]) == 0
    parts = [
        json.loads((output / "corpus" / name / "index.json").read_text())
        for name in ("train", "validation")
    ]
    counts = [part["characters"] for part in parts]
    assert sum(counts) == sum(map(len, lines))
    assert counts[1] == pytest.approx(0.2 * sum(counts), abs=1)


def test_generate_streams_the_same_text_again(run_folder, capfd):
    arguments = ["generate", str(run_folder / "model"), "3 and", "--seed", "1"]
    assert main([*arguments, "--max-new-tokens", "10"]) == 0
    first = capfd.readouterr().out
    assert first.startswith("3 and")
    assert main([*arguments, "--max-new-tokens", "10"]) == 0
    assert capfd.readouterr().out == first
    assert main([*arguments, "--max-new-tokens", "1"]) == 0
    assert len(capfd.readouterr().out) <= len(first)


def wait_for(path):
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_continues(text, run_folder, tmp_path, number):
    folder = tmp_path / "run"
    arguments = ["pretrain", f"--output={folder}", f"--data.files=[{text}]", *SIZES]
    # Each step waits, so that the signal comes in the middle of training.
    slow = (
        "import time, sys\n"
        "from llama2_lite.runtime import checkpoints\n"
        "save = checkpoints.save_file\n"
        "def slow(*args): save(*args); time.sleep(1)\n"
        "checkpoints.save_file = slow\n"
        "from llama2_lite.runtime.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True
    )
    wait_for(folder / "checkpoints" / "step-00000003")
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert pretrain(text, folder) == 0
    name = "model/model.safetensors"
    assert (folder / name).read_bytes() == (run_folder / name).read_bytes()


def test_a_signal_before_training_says_so(monkeypatch, capsys):
    from llama2_lite.runtime import cli

    def interrupted(arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "run_command", interrupted)
    assert main(["tour"]) == 0
    assert "the same command goes on" in capsys.readouterr().err
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--device_batch=0", "device_batch must be a whole number above 0, but is 0"),
        ("--stop_within=", "stop_within must be a number above 0, but is empty"),
        ("--sample_tokens=0", "sample_tokens must be a whole number above 0, but is 0"),
        ("--trainer.precision=fp8", "'bf16-mixed', '32-true'"),
    ],
)
def test_a_value_that_none_of_several_kinds_allows(argument, sentence, capsys):
    assert main(["pretrain", "--config", "town", argument]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "subtypes" not in said


def test_a_lost_process_is_one_line_also_where_lightning_has_tidied_up(
    monkeypatch, capsys
):
    from llama2_lite.runtime import cli

    def lonely(arguments):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error")

    monkeypatch.setattr(cli, "run_command", lonely)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", cli.DEBUG):
        monkeypatch.delenv(name, raising=False)
    assert main(["tour"]) == 2
    assert "process 0 has lost another process" in capsys.readouterr().err


@pytest.fixture
def unread():
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def command_into(out, err, *arguments):
    """Run the command with streams of one's own, buffered as they are by default."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    run = [sys.executable, "-m", "llama2_lite.runtime.cli", *arguments]
    return subprocess.run(
        run, stdout=out, stderr=err, text=True, timeout=120, env=env, check=False
    )


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--model=7b"]])
def test_output_that_nobody_reads_is_no_error(arguments, unread):
    done = command_into(unread, subprocess.PIPE, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--model=7b"]])
def test_output_that_cannot_be_written_is_an_error(arguments):
    if not (disk := Path("/dev/full")).exists():
        pytest.skip("this system has no /dev/full")
    with disk.open("w") as full:
        done = command_into(full, subprocess.PIPE, *arguments)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"


def test_a_training_goes_on_when_nobody_reads(text, run_folder, tmp_path, unread):
    folder = tmp_path / "run"
    run = ["pretrain", f"--output={folder}", f"--data.files={text}", *SIZES]
    assert command_into(unread, unread, *run).returncode == 0
    name = "model/model.safetensors"
    assert (folder / name).read_bytes() == (run_folder / name).read_bytes()
    assert (folder / "result.json").is_file()


def test_closed_streams_are_empty(run_folder):
    chat = f"-m llama2_lite.runtime.cli chat {run_folder / 'model'}"
    for closed in ("<&-", "<&- 2>&-", "<&- >&- 2>&-"):
        run = ["sh", "-c", f"{sys.executable} {chat} {closed}"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_unexpected_errors_are_one_line_too(monkeypatch, capsys):
    from llama2_lite.runtime import cli

    def broken(arguments):
        raise KeyError("oops")

    monkeypatch.setattr(cli, "run_command", broken)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert main(["tour"]) == 1
    err = capsys.readouterr().err
    assert err == (
        f"error: unexpected KeyError: 'oops' (set {cli.DEBUG}=1 to see where)\n"
    )
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(KeyError):
        main(["tour"])
