"""Through the command line: full, read-only and failing disks, and damage."""

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_training import in_process, spawn

from llama2_lite.runtime.cli import main
from llama2_lite.runtime.start import START_SECONDS, WAITING

path = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py"
spec = importlib.util.spec_from_file_location("kills", path)
assert spec is not None
assert spec.loader is not None
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)

STAGES = ["pretrain", "sft", "reward"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    kills.make_world(folder)
    return folder


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each command, which nothing happens to."""
    folders = {name: tmp_path_factory.mktemp("whole") / name for name in STAGES}
    for name, folder in folders.items():
        keep = "--keep_checkpoints=3"
        assert main([*kills.arguments(world, name, folder), keep]) == 0
    return folders


@pytest.fixture
def run(whole: dict[str, Path], tmp_path: Path, name: str) -> Path:
    """A copy of that run, as if it had been stopped before its end."""
    folder = shutil.copytree(whole[name], tmp_path / "run")
    shutil.rmtree(folder / "model")
    (folder / "result.json").unlink()
    return folder


def last(folder: Path) -> Path:
    return folder / "checkpoints" / f"step-{kills.STEPS:08}"


def largest(folder: Path) -> Path:
    return max(last(folder).iterdir(), key=lambda file: file.stat().st_size)


def cut(folder: Path) -> str:
    data = largest(folder).read_bytes()
    largest(folder).write_bytes(data[: len(data) // 2])
    return f"bytes of {largest(folder).name} instead of {len(data)}"


def flip(folder: Path) -> str:
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 16
    largest(folder).write_bytes(data)
    return f"has a {largest(folder).name} that does not match its checksum"


def lose(folder: Path) -> str:
    file = largest(folder)
    file.unlink()
    return f"lacks {file.name}"


def leave_half(folder: Path) -> str:
    last(folder).rename(f"{last(folder)}.partial")
    return "is not complete"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("damage", [cut, flip, lose, leave_half])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    world: Path, whole: dict[str, Path], run: Path, name: str, damage, capfd
) -> None:
    what = damage(run)
    assert main(kills.arguments(world, name, run)) == 0
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: skipped: the checkpoint {last(run)}")
    assert what in lines[0]
    assert f"continuing from step {kills.STEPS - 2}" in err
    assert kills.outcome(run) == kills.outcome(whole[name])


@pytest.mark.parametrize("name", ["sft"])
def test_without_any_whole_checkpoint_a_run_begins_anew(
    world: Path, whole: dict[str, Path], run: Path, name: str, capfd
) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "complete.json").unlink()
    assert main(kills.arguments(world, name, run)) == 0
    err = capfd.readouterr().err
    assert err.count("is not complete") == 3
    assert "continuing" not in err
    assert kills.outcome(run) == kills.outcome(whole[name])


def resume_noting(
    arguments: list[str], log: Path, rank: dict[str, str], notes: Path
) -> None:
    """Run a command as one process of several; note what it reads for checksums."""
    from llama2_lite.runtime import checkpoints

    checksum = checkpoints._checksum

    def noted(path: Path) -> str:
        if path.parent.suffix != ".partial":  # which is written, not read
            with notes.open("a") as file:
                file.write(f"{path.parent.name}/{path.name}\n")
        return checksum(path)

    checkpoints._checksum = noted
    kills.run_command(arguments, log, rank)


def by_two(arguments: list[str], folder: Path) -> tuple[str, list[list[str]]]:
    """Run a command by two processes: what they say, and what each of them reads."""
    log = folder / "log"
    notes = [folder / f"{rank}.notes" for rank in range(2)]
    command = [*arguments, "--trainer.devices=2", "--keep_checkpoints=3"]
    processes = [
        spawn(resume_noting, command, log, environment, file)
        for environment, file in zip(kills.as_torchrun_does(2), notes, strict=True)
    ]
    for process in processes:
        process.join(100)
    said = log.read_text()
    log.unlink()
    assert [process.exitcode for process in processes] == [0, 0], said
    read = [file.read_text().split() if file.exists() else [] for file in notes]
    for file in notes:
        file.unlink(missing_ok=True)
    return said, read


@pytest.fixture(scope="module")
def sharded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, each of which has half of the model."""
    folder = tmp_path_factory.mktemp("sharded")
    by_two(kills.arguments(world, "pretrain", folder / "run"), folder)
    return folder / "run"


@pytest.mark.parametrize(
    ("n_damaged", "expected"),
    [
        (0, [f"continuing from step {kills.STEPS}"]),
        (1, [f"continuing from step {kills.STEPS - 2}"]),
        (3, []),
    ],
)
def test_two_processes_look_for_damage_together(
    world: Path, sharded: Path, tmp_path: Path, n_damaged: int, expected: list[str]
) -> None:
    run = shutil.copytree(sharded, tmp_path / "run")
    if n_damaged:  # otherwise no step is left, and the model is not made again
        shutil.rmtree(run / "model")
    newest_first = sorted((run / "checkpoints").iterdir(), reverse=True)
    for path in newest_first[:n_damaged]:
        (shard,) = path.glob("shard-00002-*")  # the second file
        data = bytearray(shard.read_bytes())
        data[-1] ^= 16
        shard.write_bytes(data)
    looked_at = [
        f"{path.name}/{file.name}"
        for path in newest_first[: n_damaged + 1]
        for file in path.iterdir()
        if file.name != "complete.json"
    ]
    said, read = by_two(kills.arguments(world, "pretrain", run), tmp_path)
    assert sorted(read[0] + read[1]) == sorted(looked_at)
    assert all("/shard-00001-" in name or "/state" in name for name in read[0])
    assert all("/shard-00002-" in name for name in read[1])
    skipped = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(skipped) == n_damaged
    for path, line in zip(newest_first, skipped, strict=False):
        assert line.startswith(f"warning: skipped: the checkpoint {path} has a shard-")
    goes_on = [line for line in said.splitlines() if "continuing" in line]
    assert goes_on == expected
    assert kills.outcome(run) == kills.outcome(sharded)


def namespace(command: list[str]) -> bool:
    """Give this process mounts of its own; whether it can mount."""
    new_mounts, private = 0x20000, 0x40000 | 0x4000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts) or libc.mount(None, b"/", None, private, None):
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


CANNOT_MOUNT = 77


def on_a_read_only_disk(arguments: list[str], disk: Path, log: Path) -> None:
    if not namespace(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)]):
        os._exit(CANNOT_MOUNT)
    kills.run_command(arguments, log, {})


@pytest.mark.parametrize("name", STAGES)
def test_a_read_only_disk(world: Path, tmp_path: Path, name: str) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    arguments = kills.arguments(world, name, disk / "run")
    code = in_process(on_a_read_only_disk, arguments, disk, log)
    if code == CANNOT_MOUNT:
        pytest.skip("mounting needs rights that this user does not have")
    assert code == 2, log.read_text()
    assert log.read_text().splitlines()[-1] == (
        f"error: {disk / 'run'}: Read-only file system"
    )


def on_a_small_disk(arguments: list[str], disk: Path, log: Path, copy: Path) -> None:
    """Run until the disk is full, note what is there, make room, and run again."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)]
    if not namespace(mount):
        os._exit(CANNOT_MOUNT)
    sys.stderr = log.open("w", buffering=1)
    assert main(arguments) == 2
    shutil.copytree(disk / "run", copy / "full")
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    assert main(arguments) == 0
    shutil.copytree(disk / "run", copy / "done")


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk(
    world: Path, whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    arguments = kills.arguments(world, name, disk / "run")
    code = in_process(on_a_small_disk, arguments, disk, log, tmp_path)
    if code == CANNOT_MOUNT:
        pytest.skip("mounting needs rights that this user does not have")
    assert code == 0, log.read_text()
    errors = [line for line in log.read_text().splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert str(disk / "run") in errors[0]
    kept = sorted((tmp_path / "full" / "checkpoints").glob("step-????????"))
    assert kept
    for path in kept:
        for file in path.glob("*.safetensors"):
            load_file(file)
    assert kills.outcome(tmp_path / "done") == kills.outcome(whole[name])


@pytest.fixture
def fails(capfd):
    """Run a command that must fail, and return its sentence."""

    def run(arguments: list[str]) -> str:
        capfd.readouterr()
        assert main(arguments) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line]
        assert [line for line in lines if "rror" in line] == lines[-1:]
        return lines[-1].removeprefix("error: ")

    return run


def read_all(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


OTHER = {
    "wider": ["--model.config.dim=64"],
    "deeper": ["--model.config.n_layers=3"],
    "shallower": ["--model.config.n_layers=1"],
}


@pytest.mark.parametrize("layout", [[], ["--layout.shard=1"]])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("wider", "has model.layers.0.attention.wk.weight of shape (64, 64)"),
        ("deeper", "has model.layers.2.attention.wk.weight of shape (32, 32)"),
        ("shallower", "has no model.layers.1.attention.wk.weight"),
        ("sft", "has model.output.weight of shape (320, 32), and this model needs"),
    ],
)
@pytest.mark.parametrize("name", ["pretrain"])
def test_a_checkpoint_of_another_model_is_refused(
    world: Path,
    whole: dict[str, Path],
    run: Path,
    tmp_path: Path,
    fails,
    other: str,
    words: str,
    layout: list[str],
) -> None:
    source = whole.get(other, tmp_path / other)
    if other in OTHER:
        short = [*OTHER[other], "--trainer.max_steps=2"]
        assert main([*kills.arguments(world, "pretrain", source), *short]) == 0
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(source / "checkpoints", run / "checkpoints")
    before = read_all(run / "checkpoints")
    sentence = fails([*kills.arguments(world, "pretrain", run), *layout])
    assert str(run / "checkpoints" / "step-000000") in sentence
    assert f"is of another model: it {words}" in sentence
    assert read_all(run / "checkpoints") == before
    assert not (run / "model").exists()


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_tokenizer_of_another_size_is_refused(
    world: Path, whole: dict[str, Path], tmp_path: Path, fails, name: str
) -> None:
    start = shutil.copytree(world / "start", tmp_path / "start")
    shutil.copy(whole["pretrain"] / "model" / "tokenizer.model", start)
    arguments = kills.arguments(world, name, tmp_path / "run")
    sentence = fails([*arguments, f"--start={start}"])
    assert sentence == f"{start}: the tokenizer has 300 pieces, but the model 320"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", STAGES)
def test_an_empty_folder_is_a_beginning(
    world: Path, whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name_of_file in ("run", "result"):  # a kill cut their writing short
        (folder / f".{name_of_file}.json.1").write_text('{"mod')
    assert main(kills.arguments(world, name, folder)) == 0
    assert kills.outcome(folder) == kills.outcome(whole[name])


@pytest.mark.parametrize("name", STAGES)
def test_half_a_model_goes_when_the_run_goes_on(
    world: Path, whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(whole[name], tmp_path / "run")
    for half in (".model.1.reward", ".model.1.partial", ".model.parts.partial"):
        (folder / half).mkdir()
    assert main(kills.arguments(world, name, folder)) == 0
    assert kills.outcome(folder) == kills.outcome(whole[name])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--config=3b"], ["'3b'", "110m, 13b, 15m, 1b, 34b, 70b, 7b"]),
        (["--trainer.devices=3"], ["4 windows / 3", "a batch of 3 would do"]),
        (
            ["--trainer.devices=3", "--layout.tensor=3"],
            ["layout.tensor = 3 does not divide n_heads = 2"],
        ),
        (
            ["--trainer.devices=3", "--layout.tensor=2"],
            ["3 processes", "groups of layout.tensor = 2"],
        ),
        (
            ["--trainer.devices=2", "--layout.shard=3"],
            ["2 groups", "layout.shard = 3 does not divide"],
        ),
        (["--trainer.devices=many"], ["devices"]),
        (["--stop_within=0"], ["stop_within", "0"]),
    ],
)
def test_processes_that_do_not_fit(
    world: Path, tmp_path: Path, fails, more: list[str], words: list[str]
) -> None:
    arguments = kills.arguments(world, "pretrain", tmp_path / "run")
    sentence = fails([*arguments, *more])
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


def come_alone(arguments: list[str], log: Path, rank: int) -> None:
    environment = {**kills.as_torchrun_does(2)[rank], START_SECONDS: "1"}
    kills.run_command([*arguments, "--trainer.devices=2"], log, environment)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_others_never_come_gives_up(
    world: Path, tmp_path: Path, rank: int
) -> None:
    arguments, log = kills.arguments(world, "sft", tmp_path / "run"), tmp_path / "log"
    assert in_process(come_alone, arguments, log, rank) == 2
    sentence = log.read_text().splitlines()[-1]
    assert sentence.startswith(
        "error: 1 seconds after the start not all 2 processes have met at 127.0.0.1; "
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_dies_in_the_start_ends_the_run(
    world: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "llama2_lite.runtime.cli"]
    command += [*kills.arguments(world, "sft", tmp_path / "run"), "--trainer.devices=2"]
    # what Lightning has left of runs in this process, such as a port that is taken
    left = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    clean = {name: value for name, value in os.environ.items() if name not in left}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    second: list[str] = []
    while not second:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
        pids = children.read_text().split()
        second = [pid for pid in pids if is_ours(Path(f"/proc/{pid}/cmdline"))]
    os.kill(int(second[0]), signal.SIGKILL)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 2, said
    assert said.splitlines()[-1].startswith(
        "error: process 1 ended with code -9 before all had met"
    )


def is_ours(command_line: Path) -> bool:
    """Whether a process is one of a run, and is still there."""
    try:
        return b"llama2_lite" in command_line.read_bytes()
    except OSError:
        return False


def be_stopped_alone(arguments: list[str], log: Path, rank: int) -> None:
    """Get a signal when the process waits for another one, which never comes."""

    def interrupt() -> None:
        while all(thread.name != WAITING for thread in threading.enumerate()):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    # what a shell starts in the background ignores it, and so do its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    environment = {**kills.as_torchrun_does(2)[rank], START_SECONDS: "60"}
    kills.run_command([*arguments, "--trainer.devices=2"], log, environment)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_for_others_obeys_a_signal(
    world: Path, tmp_path: Path, rank: int
) -> None:
    arguments, log = kills.arguments(world, "sft", tmp_path / "run"), tmp_path / "log"
    assert in_process(be_stopped_alone, arguments, log, rank) == 0
    assert "error:" not in log.read_text()
    if rank == 0:
        sentence = "stopped; the same command goes on from here"
        assert log.read_text().splitlines()[-1] == sentence
