"""Artifacts are reused exactly as long as nothing that made them has changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama2_lite.runtime import artifacts
from llama2_lite.runtime.artifacts import (
    artifact,
    code_hash,
    file_hash,
    source_hash,
    write_result,
)

SOURCE = '''
"""Prose."""

def double(x):
    """More prose."""
    if x is None:
        raise ValueError(f"{x} is no number")
    return 2 * x
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Prose", "Other prose"),
        ("More prose.", "Less."),
        ("return", "# why\n    return"),
        ("double(x)", "double(x: int) -> int"),
        ("no number", "no number; choose another"),
    ],
)
def test_hash_ignores_prose(old, new):
    assert source_hash(SOURCE.replace(old, new)) == source_hash(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [("2", "3"), ("(x)", "(x=1)"), ("double", "twice"), ("Value", "Type")],
)
def test_hash_sees_code(old, new):
    assert source_hash(SOURCE.replace(old, new)) != source_hash(SOURCE)


def test_hash_does_not_depend_on_the_version_of_python():
    # The tree has fields that are empty or missing, depending on the version.
    assert source_hash(SOURCE) == "2b217a27657b27e2"


def test_code_hash_names_a_missing_module():
    assert code_hash(["attention", "layers"]) == code_hash(["layers", "attention"])
    assert code_hash(["layers"]) != code_hash(["attention"])
    with pytest.raises(ValueError, match="no module 'atention'"):
        code_hash(["atention"])


class Builder:
    """Builds a file and counts how often."""

    def __init__(self):
        self.builds = 0

    def __call__(self, folder: Path) -> None:
        self.builds += 1
        (folder / "content").write_text(str(self.builds))


def make(folder, builder, name="thing", config=None, inputs=()):
    return artifact(folder, name, config or {"size": 1}, inputs, ["layers"], builder)


def test_reused_until_configuration_inputs_or_code_change(tmp_path, monkeypatch):
    builder = Builder()
    first = make(tmp_path, builder)
    assert make(tmp_path, builder) == first
    assert builder.builds == 1
    assert (first.path / "content").read_text() == "1"

    second = make(tmp_path, builder, config={"size": 2})
    assert builder.builds == 2
    assert second.key != first.key
    assert (second.path / "content").read_text() == "2"

    third = make(tmp_path, builder, config={"size": 2}, inputs=[first])
    assert builder.builds == 3
    monkeypatch.setattr(artifacts, "code_hash", lambda modules: "other")
    fourth = make(tmp_path, builder, config={"size": 2}, inputs=[first])
    assert builder.builds == 4
    assert len({first.key, second.key, third.key, fourth.key}) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".thing.lock", "thing"]


def test_a_folder_of_somebody_else_stays(tmp_path):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "diary").write_text("dear diary")
    with pytest.raises(FileExistsError, match="thing is not ours"):
        make(tmp_path, Builder())
    assert (tmp_path / "thing" / "diary").read_text() == "dear diary"


def test_failed_build_keeps_the_old_one_and_what_it_did(tmp_path):
    made = make(tmp_path, Builder())

    def fails(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make(tmp_path, fails, config={"size": 2})
    assert (made.path / "content").read_text() == "1"

    def resumes(folder):
        assert (folder / "half").read_text() == "half"

    def starts(folder):
        assert not (folder / "half").exists()

    make(tmp_path, resumes, config={"size": 2})
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path, fails, config={"size": 3})
    make(tmp_path, starts, config={"size": 4})


def test_a_half_done_replacement_is_finished(tmp_path):
    made = make(tmp_path, Builder())
    made.path.rename(tmp_path / "thing.partial")
    builder = Builder()
    assert make(tmp_path, builder) == made
    assert builder.builds == 0
    assert (made.path / "content").read_text() == "1"


WORKER = """
import sys, time
from pathlib import Path
from llama2_lite.runtime.artifacts import artifact

folder = Path(sys.argv[1])

def build(beside):
    with open(folder / "builds", "a") as file:
        file.write("x")
    time.sleep(float(sys.argv[2]))
    (beside / "content").write_text("done")

artifact(folder, "thing", {}, [], ["layers"], build)
"""


def start(folder, seconds):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(seconds)])


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_build_once(tmp_path):
    workers = [start(tmp_path, 0.5), start(tmp_path, 0.5)]
    assert [worker.wait(30) for worker in workers] == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_a_killed_process_gives_the_lock_back(tmp_path):
    killed = start(tmp_path, 60)
    wait_for(tmp_path / "builds")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "thing").exists()
    assert start(tmp_path, 0).wait(30) == 0
    assert (tmp_path / "thing" / "content").read_text() == "done"


def test_results_say_what_they_depend_on(tmp_path):
    path = tmp_path / "study.json"
    write_result(
        path,
        config={"lr": 0.1},
        seeds=range(2),
        modules=["layers"],
        script=__file__,
        results=[1, 2],
    )
    stored = json.loads(path.read_text())
    assert stored.pop("machine")
    assert stored == {
        "config": {"lr": 0.1},
        "seeds": [0, 1],
        "modules": ["layers"],
        "code_hash": code_hash(["layers"]),
        "script": "tests/test_artifacts.py",
        "script_hash": file_hash(__file__),
        "results": [1, 2],
    }


EDITS_ITSELF = """
import sys
from pathlib import Path
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.layers import double

for path in (Path(__file__), Path(__file__).parents[1] / "llama2_lite" / "layers.py"):
    path.write_text(path.read_text() + "\\nMORE = 1\\n")
write_result(
    sys.argv[1], config={}, seeds=[], modules=["layers"], script=__file__, results=0
)
"""


def test_results_belong_to_the_code_that_was_there_when_they_were_begun(tmp_path):
    """Edited while a study runs, the code is not what made its figures."""
    package = tmp_path / "llama2_lite"
    (package / "runtime").mkdir(parents=True)
    shutil.copy(artifacts.__file__, package / "runtime" / "artifacts.py")
    for folder in (package, package / "runtime"):
        (folder / "__init__.py").touch()
    (package / "layers.py").write_text(SOURCE)
    script = tmp_path / "benchmarks" / "study.py"
    script.parent.mkdir()
    script.write_text(EDITS_ITSELF)
    stored = tmp_path / "study.json"
    hashes = []
    for _ in range(2):
        began = file_hash(script)
        subprocess.run(
            [sys.executable, str(script), str(stored)],
            check=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        record = json.loads(stored.read_text())
        assert record["script_hash"] == began != file_hash(script)
        hashes.append(record["code_hash"])
    assert hashes[0] != hashes[1]
