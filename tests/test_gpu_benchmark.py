"""The GPU benchmark, in miniature and without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def test_small_form_measures_everything(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--small", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())["results"]
    assert [case["what"] for case in found] == [
        *("pretrain", "pretrain"),
        *("decode", "decode"),
        *("ppo", "tour"),
    ]
    for case in found[:4]:
        assert case["tokens_per_second"] > 0
    assert [case["side"] for case in found[:2]] == ["ours", "transformers"]
    assert found[4]["seconds_of_iteration"] > 0
    assert found[5]["seconds"] > 0
    done = subprocess.run([*command, "--only=ppo"], capture_output=True, timeout=300)
    assert done.returncode == 0
    again = json.loads(output.read_text())["results"]
    assert again[:-1] == found[:4] + found[5:]
    assert again[-1]["what"] == "ppo"
