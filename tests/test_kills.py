"""Killed at random moments, every stage comes to the result of a run never killed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CAMPAIGN = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py"
TWO = ["--processes=2"]
STAGES = {"pretrain", "sft", "reward", "reject", "ppo", "gatt"}


def campaign(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a campaign found; it fails by itself if anything differs."""
    command = [sys.executable, str(CAMPAIGN), f"--output={folder}/found.json"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "found.json").read_text())["stages"]
    for figures in found.values():
        assert figures["different"] == []
        assert figures["files compared"] > 6
    return found


def test_kills_of_every_stage(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--kills=3", "--no-steps")
    assert found.keys() == STAGES
    for figures in found.values():
        assert sum(figures["killed at random"].values()) == 3


def test_kills_after_each_step_and_so_at_each_end_of_an_epoch(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--kills=1", "--stage=pretrain", "--stage=ppo")
    for figures in found.values():
        assert figures["killed after a step"] > 3


def test_a_signal_is_obeyed_at_any_time(tmp_path: Path) -> None:
    stop = ["--signal=TERM", "--no-steps", "--stage=reject"]
    found = campaign(tmp_path, "--kills=3", *stop)
    assert found["reject"]["slowest end in seconds"] < 25


def test_two_processes(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--kills=2", "--no-steps", *TWO, "--stage=ppo")
    assert found["ppo"]["processes left waiting"] == 0


def test_all_processes_obey_a_signal(tmp_path: Path) -> None:
    stop = ["--signal=INT", "--no-steps", "--stage=pretrain"]
    found = campaign(tmp_path, "--kills=3", *TWO, *stop)
    assert found["pretrain"]["slowest end in seconds"] < 25


def test_torchrun_starts_killed_processes_again(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--kills=2", "--torchrun", "--stage=sft")
    assert sum(found["sft"]["killed at random"].values()) == 2
