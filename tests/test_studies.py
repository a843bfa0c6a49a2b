"""The studies that `make experiments` repeats, one after another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_study_whose_samples_are_missing_lets_the_others_go_on(tmp_path: Path):
    script = tmp_path / "repository" / "benchmarks" / "real_preferences.py"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / script.name, script)
    run = {"capture_output": True, "text": True, "timeout": 300}
    run["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], **run)
    missing = tmp_path / "shared" / "data"
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"skipped: real pairs ({missing}) are not on this machine\n"
