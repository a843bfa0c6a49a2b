"""`llama2-lite plan`, and the configurations by size."""

import re

import pytest
import yaml

from llama2_lite.model import LlamaConfig
from llama2_lite.runtime.cli import main
from llama2_lite.runtime.configs import CONFIGS
from llama2_lite.scaling import Layout, accumulation, training_memory

PEAK_LR = {"7b": 3e-4, "13b": 3e-4, "34b": 1.5e-4, "70b": 1.5e-4}  # paper §2.2
# how many of 80 GB each configuration is laid out for
GPUS = {"15m": 1, "110m": 1, "1b": 8, "7b": 64, "13b": 128, "34b": 512, "70b": 2048}
SIZES = list(GPUS)
PAPER = {  # Table 2: GPU hours, watts, tonnes of CO2eq
    "7b": (184_320, 400, 31.22),
    "13b": (368_640, 400, 62.44),
    "34b": (1_038_336, 350, 153.90),
    "70b": (1_720_320, 400, 291.42),
}


def run(capsys, arguments):
    """What the command prints, and what it complains about."""
    code = main(["plan", *arguments.split()])
    out, err = capsys.readouterr()
    assert (code, bool(out)) == ((2, False) if err else (0, True))
    return out or err


def figure(out: str, name: str) -> float:
    """The first number of a line."""
    line = next(line for line in out.splitlines() if line.startswith(name))
    return float(re.search(r"[\d.,e+]+", line[26:])[0].replace(",", ""))


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_hours_give_its_carbon(size, capsys):
    hours, watts, tonnes = PAPER[size]
    cost = f"--gpu-hours {hours} --watts {watts}"
    out = run(capsys, f"--model {size} --gpus 1024 {cost}")
    assert figure(out, "carbon") == pytest.approx(tonnes, rel=5e-4)
    assert figure(out, "days") == pytest.approx(hours / 1024 / 24, abs=0.05)


def test_the_example_of_the_readme(capsys):
    out = run(
        capsys,
        "--model 70b --gpus 2048 --gpu a100-80gb --tp 8 --sequence 4096 "
        "--batch-tokens 4M --mfu 0.43 --watts 400",
    )
    assert "68,976,648,192 parameters on 2,048 x a100-80gb" in out
    assert "1,024 windows of 4,096 = 256 groups x 1 at a time x 4" in out
    assert figure(out, "MFU") == 43.0
    hours = figure(out, "FLOPs with") / (0.43 * 312e12 * 3600)
    assert figure(out, "GPU hours") == pytest.approx(hours, rel=0.01)


def test_what_does_not_fit_is_said_and_what_would_fits(capsys):
    out = run(capsys, "--model 70b --gpus 8")
    assert out.count("does not fit") == 2
    assert "the largest part is optimizer, 64.2 GiB" in out
    advice = re.search(r"With (--gpus .*) and blocks computed again", out)[1]
    better = run(capsys, f"--model 70b {advice}")
    assert re.search(r"free +does not fit +fits", better)


@pytest.mark.parametrize(
    "asked",
    [
        "--model 7b --gpus 8 --shard 1",
        "--model 7b --batch-tokens 4096",
        "--model 70b --gpus 8 --batch-tokens 64K",
    ],
)
def test_advice_can_be_followed(asked, capsys):
    advice = re.search(r"With (--gpus .*) and blocks", run(capsys, asked))[1]
    better = run(capsys, f"{asked} {advice}")
    assert re.search(r"free +does not fit +fits|free +fits +fits", better), better


def test_activations_alone_can_be_too_many(capsys):
    out = run(capsys, "--model 7b --gpus 8 --device-batch 4")
    assert re.search(r"free +does not fit +fits", out)
    assert "compute blocks again" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model 7c", "no preset '7c'; there are 7b, 13b, 34b, 70b"),
        ("--model 7b --gpu a100", "no GPU 'a100'; there are a100-40gb, a100-80gb"),
        ("--model 7b --gpus 0", "--gpus must be positive, but is 0"),
        ("--model 7b --mfu 43", "--mfu is a share between 0 and 1, not 43"),
        ("--model 7b --watts nan", "--watts must be positive, but is nan"),
        ("--model 7b --batch-tokens many", "'many' is not a number such as"),
        ("--model 7b --batch-tokens 4000000", "976.56 windows; 4,001,792 tokens"),
        ("--model 70b --gpus 2048", "/ 2,048 groups of processes = 0.50 windows"),
        ("--model 70b --gpus 16 --tp 16", "--tp = 16 does not divide n_kv"),
        ("--model 70b --gpus 12 --tp 8", "12 processes cannot be divided"),
        ("--model 7b --gpu-hours 1e5 --mfu 0.9", "say the same: give one of them"),
        ("--model 7b --gpu-hours 10", "--gpu-hours must be at least 77,728, which is"),
        ("--gpus 8", "--model"),
        ("--model 7b --gpus many", "invalid int value: 'many'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, capsys):
    err = run(capsys, arguments)
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("size", SIZES)
def test_configurations_hold_the_papers_settings(size):
    config = yaml.safe_load((CONFIGS / f"{size}.yaml").read_text())
    model = dict(config["model"]["config"], vocab_size=config["data"]["vocab_size"])
    assert LlamaConfig(**model) == LlamaConfig.preset(size)
    [(share, length, windows)] = config["data"]["lengths"]
    assert (share, length) == (1, model["max_seq_len"])
    if size in PEAK_LR:
        assert config["model"]["peak_lr"] == PEAK_LR[size]
        assert config["model"]["warmup"] == 2000
        assert length * windows == 4 * 2**20
        assert config["trainer"]["max_steps"] == -(-2 * 10**12 // (length * windows))
    layout, device_batch = Layout(**config["layout"]), config["device_batch"]
    n_gpus = GPUS[size]
    copies, shard, _ = layout.sizes(n_gpus, LlamaConfig(**model))
    parts = accumulation(windows, copies * shard, device_batch)
    assert copies * shard * device_batch * parts == windows
    held_out = config["data"].get("validation_windows", 64)
    assert held_out >= copies * shard  # one for each group at least
    memory = training_memory(LlamaConfig(**model), layout, n_gpus, device_batch, length)
    assert memory.total < 76 * 2**30


@pytest.mark.parametrize("size", SIZES)
def test_configurations_are_read_by_the_command(size, capsys):
    assert main(["pretrain", "--config", size, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["output"] == f"runs/{size}"
    assert printed["model"]["config"]["dim"] == LlamaConfig.preset(size).dim
    assert printed["layout"]["compile"] is True
    assert printed["device_batch"] >= 1


def test_a_batch_is_given_in_tokens(tmp_path):
    from llama2_lite.runtime.pretrain import Pretrain

    settings = [f"--output={tmp_path}", "--layout.compile=false", "--device_batch=8"]
    made = Pretrain(["--config=15m", "--batch_tokens=64K", *settings])
    assert made.datamodule.lengths == [(1.0, 1024, 64)]
    assert made.trainer.accumulate_grad_batches == 8


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("5000", "5,000 tokens / windows of 1,024 = 4.88 windows; 5,120 tokens"),
        ("lots", "'lots' is not a number such as 500000 or 4M"),
    ],
)
def test_tokens_that_are_no_batch_are_refused(tokens, words, tmp_path, capsys):
    arguments = ["--config=15m", f"--batch_tokens={tokens}", f"--output={tmp_path}"]
    assert main(["pretrain", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_configuration_that_is_not_there_names_those_that_are(capsys):
    assert main(["pretrain", "--config", "7c"]) == 2
    err = capsys.readouterr().err
    assert all(f" {size}" in err for size in SIZES)
