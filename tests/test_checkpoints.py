"""A run that is killed anywhere continues to the very same result."""

import csv
import json
import math
import os
import pickle
import random
import signal
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from tiny_training import (
    KILLED,
    STEPS,
    in_process,
    spawn,
    train,
    train_and_die,
    write_data,
)

from llama2_lite.runtime import checkpoints
from llama2_lite.runtime.checkpoints import (
    SafeCheckpointIO,
    Stopped,
    decode_state,
    encode_state,
    find_damage,
    newest_checkpoint,
)
from llama2_lite.runtime.convert import convert


def test_state_comes_back_as_it_was(tmp_path):
    weight = torch.randn(3, 4)
    state = {
        "state_dict": {"in": weight, "out": weight, "row": weight[1], "t": weight.T},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
        "types": (1, 2.5, True, None, "text", [(), {}]),
        "numbers": [math.pi, math.inf, 1e-300],
        "half": torch.randn(2).bfloat16(),
        "empty": torch.zeros(0),
        "random": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "$odd": 1,
        "hyper_parameters": {"config": object()},
    }
    path = tmp_path / "step-00000001"
    SafeCheckpointIO().save_checkpoint(state, path)
    loaded = SafeCheckpointIO().load_checkpoint(path)
    del state["hyper_parameters"]

    def compare(a, b):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, list | tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert a == b

    compare(state, loaded)


def test_tied_tensors_are_stored_once():
    weight = torch.randn(3, 4)
    tensors = {}
    state = encode_state({"in": weight, "out": weight, "row": weight[0]}, tensors)
    assert len(tensors) == 2
    assert decode_state(state, tensors)["out"] is decode_state(state, tensors)["in"]


def test_what_needs_pickle_is_refused():
    with pytest.raises(TypeError, match="a/0 is a set, which only pickle can store"):
        encode_state({"a": [{1}]}, {})


@pytest.fixture
def three(tmp_path):
    """Three checkpoints, the newest last."""
    paths = [tmp_path / f"step-{step:08}" for step in (9, 10, 100)]
    for number, path in enumerate(paths):
        SafeCheckpointIO().save_checkpoint({"w": torch.full((4,), number)}, path)
    return paths


def cut(path):
    data = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(data[:-1])


def flip(path):
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def garble(path):
    (path / "complete.json").write_text("[")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "bytes of tensors.safetensors instead of"),
        (flip, "has a tensors.safetensors that does not match its checksum"),
        (lambda path: (path / "state.json").unlink(), "lacks state.json"),
        (lambda path: (path / "complete.json").unlink(), "is not complete"),
        (garble, "is not complete"),
        (lambda path: path.rename(f"{path}.partial"), "is not complete"),
    ],
)
def test_damaged_ones_are_named_and_skipped(three, damage, message):
    assert find_damage(three[2]) is None
    assert newest_checkpoint(three[0].parent) == three[2]
    damage(three[2])
    with pytest.warns(UserWarning, match=rf"step-00000100\S* .*{message}"):
        assert newest_checkpoint(three[0].parent) == three[1]
    if three[2].exists():
        with pytest.raises(ValueError, match=message):
            SafeCheckpointIO().load_checkpoint(three[2])


def test_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def read_for_checksums(monkeypatch):
    """Files whose checksums are made from now on, as a list that grows."""
    files, checksum = [], checkpoints._checksum

    def noted(path):
        files.append(f"{path.parent.name}/{path.name}")
        if (path.parent / "broken").exists() and path.suffix == ".safetensors":
            raise OSError(5, "Input/output error", str(path))
        return checksum(path)

    monkeypatch.setattr(checkpoints, "_checksum", noted)
    return files


def files_of(*paths):
    names = ("state.json", "tensors.safetensors")
    return sorted(f"{path.name}/{name}" for path in paths for name in names)


def test_each_file_is_read_once_to_convert(three, tmp_path, monkeypatch):
    read = read_for_checksums(monkeypatch)
    for source, chosen in ((tmp_path, three[2]), (three[0], three[0])):
        with pytest.raises(ValueError, match=f"{chosen} does not say what kind"):
            convert(source, tmp_path / "model")
        assert sorted(read) == files_of(chosen)
        read.clear()
    flip(three[0])
    with pytest.raises(ValueError, match="step-00000009 has a tensors"):
        convert(three[0], tmp_path / "model")


def test_what_was_found_whole_is_not_read_again(three, monkeypatch):
    read = read_for_checksums(monkeypatch)
    reader = SafeCheckpointIO()
    reader.whole = three[2]
    reader.load_checkpoint(three[2])
    assert read == []
    reader.load_checkpoint(three[1])
    assert sorted(read) == files_of(three[1])


def choose_as_one_of(rank, port, folder, log):
    """Choose a checkpoint with another process; note how, and what this one reads."""
    with pytest.MonkeyPatch.context() as patch:
        read = read_for_checksums(patch)
        dist.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                chosen = newest_checkpoint(folder)
            except (ValueError, OSError) as error:
                chosen = error
        noted = [str(chosen), read, [str(warning.message) for warning in said]]
    log.write_text(json.dumps(noted))


def choose_by_two(folders, log):
    """What each of two processes finds in its folder, reads and says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [log / f"{rank}.log" for rank in range(2)]
    processes = [
        spawn(choose_as_one_of, rank, port, folders[rank], logs[rank])
        for rank in range(2)
    ]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    return zip(*(json.loads(path.read_text()) for path in logs), strict=True)


@pytest.mark.parametrize(
    ("damage", "words", "n_read"),
    [
        (None, "", 2),
        (flip, "tensors.safetensors that does not match its checksum", 4),
        (cut, "bytes of tensors.safetensors instead of", 3),
        (lambda path: (path / "tensors.safetensors").unlink(), "lacks tensors", 3),
        (garble, "is not complete", 2),
    ],
)
def test_two_processes_choose_as_one_and_read_each_file_once(
    three, tmp_path_factory, damage, words, n_read
):
    if damage:
        damage(three[2])
    folder, log = three[0].parent, tmp_path_factory.mktemp("log")
    chosen, read, said = choose_by_two([folder, folder], log)
    assert chosen == (str(three[1 if damage else 2]),) * 2
    assert (len(said[0]), len(said[1])) == (damage is not None, 0)
    for line in said[0]:
        assert line.startswith(f"skipped: the checkpoint {three[2]} ")
        assert words in line
    assert len(read[0]) + len(read[1]) == n_read
    assert len({*read[0], *read[1]}) == n_read
    # the tensors, which are damaged, are seen to by the second process
    assert {Path(name).name for name in read[0]} == {"state.json"}
    assert {Path(name).name for name in read[1]} == {"tensors.safetensors"}


def test_processes_that_do_not_share_a_disk_are_told(three, tmp_path_factory):
    log, other = tmp_path_factory.mktemp("log"), tmp_path_factory.mktemp("other")
    three[1].rename(other / three[1].name)
    chosen, _, _ = choose_by_two([three[0].parent, other], log)
    sentence = (
        "is step-00000100 for process 0, but step-00000010 for process 1: "
        "the folder of the run must be on a disk that all share"
    )
    assert [sentence in line for line in chosen] == [True, True]


def test_a_disk_that_fails_one_process_is_an_error_of_all(three, tmp_path_factory):
    (three[2] / "broken").touch()
    folder, log = three[0].parent, tmp_path_factory.mktemp("log")
    chosen, _, said = choose_by_two([folder, folder], log)
    assert ["Input/output error" in line for line in chosen] == [True, True]
    assert said == ([], [])  # nothing was skipped


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "boom"))


@pytest.mark.parametrize("where", ["last.ckpt", "step-00000100/optimizer.pt"])
def test_a_pickle_is_refused_and_not_opened(three, where):
    folder, trace = three[0].parent, three[0].parent / "trace"
    (folder / where).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match=rf"{Path(where).name} is a pickle"):
        newest_checkpoint(folder)
    with pytest.raises(ValueError, match="pickles are not opened"):
        SafeCheckpointIO().load_checkpoint(folder / where)
    assert not trace.exists()


def test_a_pickle_in_the_place_of_tensors_is_refused(three):
    trace = three[0].parent / "trace"
    (three[2] / "tensors.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.warns(UserWarning, match="skipped"):
        assert newest_checkpoint(three[0].parent) == three[1]
    assert not trace.exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def outcome(folder):
    """All that a run leaves, but for times."""
    path = folder / "checkpoints" / f"step-{STEPS:08}"
    state = SafeCheckpointIO().load_checkpoint(path)
    tensors = {"model": state.pop("state_dict"), "adam": state.pop("optimizer_states")}
    with (folder / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["tokens_per_second"]
    return {
        "tensors": json.dumps(encode_exactly(tensors)),
        "state": json.dumps(encode_exactly(state)),
        "rows": rows,
        "best": (folder / "model" / "model.safetensors").read_bytes(),
    }


def encode_exactly(value):
    tensors = {}
    state = encode_state(value, tensors)
    return [state, {name: tensor.tolist() for name, tensor in tensors.items()}]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What a run that nobody kills leaves."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_process(train, data, folder) == 0
    return outcome(folder)


def test_the_run_is_what_the_tests_think(whole):
    validations = [row["step"] for row in whole["rows"] if row["validation_loss"]]
    assert validations == ["3", "7", "11"]
    losses = [float(row["loss"]) for row in whole["rows"] if row["loss"]]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5


# A save syncs state, tensors, marker, folder and, after the rename, what holds it.
@pytest.mark.parametrize(
    ("name", "nth"),
    [
        ("save_file", 1),
        ("save_file", 3),
        ("_sync", 5),
        ("_sync", 12),
        ("_sync", 13),
        ("_sync", 14),
        ("_sync", 15),
        ("complete_checkpoint", 4),
    ],
)
def test_killed_and_resumed_is_never_killed(data, whole, tmp_path, name, nth):
    assert in_process(train_and_die, data, tmp_path, name, nth, {}) == KILLED
    assert in_process(train, data, tmp_path) == 0
    made = outcome(tmp_path)
    # Lightning logs a step after its checkpoint: a kill between loses that row.
    rows, all_rows = made.pop("rows"), whole["rows"]
    assert [row for row in all_rows if row in rows] == rows
    assert len(all_rows) - len(rows) == (name == "_sync" and nth % 5 == 0)
    assert made == {key: whole[key] for key in made}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000012"]


def test_killed_again_and_again(data, whole, tmp_path):
    for name, nth in [("save_file", 2), ("save_file", 2), ("_sync", 4)]:
        assert in_process(train_and_die, data, tmp_path, name, nth, {}) == KILLED
    assert in_process(train, data, tmp_path) == 0
    assert outcome(tmp_path) == whole
    assert in_process(train, data, tmp_path) == 0  # finished: nothing is left to do
    assert outcome(tmp_path) == whole


def test_a_run_that_begins_anew_keeps_what_it_saves(data, whole, tmp_path):
    assert in_process(train, data, tmp_path) == 0
    for path in (tmp_path / "checkpoints").iterdir():
        flip(path)
    died = in_process(train_and_die, data, tmp_path, "complete_checkpoint", 3, {})
    assert died == KILLED
    with pytest.warns(UserWarning, match="skipped"):
        newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / "step-00000006"
    assert in_process(train, data, tmp_path) == 0
    assert outcome(tmp_path) == whole


class Raise(Callback):
    """Sends a signal to this process after a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [3, 4])  # the first one is validated, then saved
def test_a_signal_saves_and_stops(data, whole, tmp_path, number, step, capfd):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"saved at step {step + 1}"):
        train(data, tmp_path, [Raise(step, number)])
    assert "once more stops at once" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    assert in_process(train, data, tmp_path) == 0
    assert outcome(tmp_path) == whole


def stop_twice(data, folder):
    try:
        train(data, folder, [Raise(4, signal.SIGTERM), Raise(4, signal.SIGTERM)])
    except KeyboardInterrupt:
        os._exit(3)


def test_a_second_signal_stops_at_once(data, whole, tmp_path):
    assert in_process(stop_twice, data, tmp_path) == 3
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000003"]
    assert in_process(train, data, tmp_path) == 0
    assert outcome(tmp_path) == whole


def test_a_full_disk_keeps_the_last_checkpoint(data, whole, tmp_path, monkeypatch):
    save, calls = checkpoints.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            train(data, tmp_path)
    with pytest.warns(UserWarning, match="step-00000006.partial is not complete"):
        train(data, tmp_path)
    assert outcome(tmp_path) == whole


def small_disk(data, folder):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    path = folder / "step-00000001"
    try:
        SafeCheckpointIO().save_checkpoint({"w": torch.zeros(10_000)}, path)
    except OSError as error:
        os._exit(3 if "File too large" in str(error) else 4)


def test_a_disk_that_is_too_small_is_an_error_of_the_system(data, tmp_path):
    assert in_process(small_disk, data, tmp_path) == 3
    with pytest.warns(UserWarning, match="not complete"):
        assert newest_checkpoint(tmp_path) is None


def test_an_interrupt_before_the_first_step_is_passed_on(data, tmp_path):
    class Interrupt(Callback):
        def on_fit_start(self, trainer, module):
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path, [Interrupt()])
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored


def test_not_a_number_keeps_the_last_good_checkpoint(data, tmp_path):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            if trainer.global_step == 5:
                with torch.no_grad():
                    module.model.output.weight[0, 0] = math.nan

    with pytest.raises(FloatingPointError, match="step 5"):
        train(data, tmp_path, [Spoil()])
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    state = SafeCheckpointIO().load_checkpoint(folder / "step-00000003")
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_accumulated_gradients_resume_between_steps(data, tmp_path):
    settings = {"accumulate_grad_batches": 2}
    assert in_process(train_with, data, tmp_path / "a", settings) == 0
    died = in_process(train_and_die, data, tmp_path / "b", "save_file", 3, settings)
    assert died == KILLED
    assert in_process(train_with, data, tmp_path / "b", settings) == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def train_with(data, folder, settings):
    tiny_training.train(data, folder, **settings)
