"""Killed at random moments, every stage comes to the result of a run never killed."""

import json
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py"
STAGES = {"pretrain", "sft", "reward", "reject", "ppo", "gatt"}


def test_a_short_campaign_on_every_stage(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    command = [sys.executable, str(CAMPAIGN), "--kills=3", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())["stages"]
    assert found.keys() == STAGES
    for figures in found.values():
        assert sum(figures["killed at random"].values()) == 3
        assert figures["different"] == []
        assert figures["files compared"] > 6
