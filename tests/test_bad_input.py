"""Bad input: one clear sentence that names the thing, exit code 2, nothing lost."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import SIZES, pretrain, text  # noqa: F401

from llama2_lite.runtime.cli import main
from llama2_lite.runtime.command import with_config_paths
from llama2_lite.tokenizer import train_tokenizer


@pytest.fixture
def fails(capfd):
    """Run a command that must fail, and return its sentence."""

    def run(*arguments):
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if line]
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in err
        return lines[-1].removeprefix("error: ")

    return run


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):  # noqa: F811
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "sums"
    assert pretrain(text, folder) == 0
    return folder


def read_all(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["empty.txt", "empty"]),
        ("binary.txt", b"text\0\1\2", ["binary.txt", "byte 4"]),
        ("latin.txt", "caf\xe9".encode("latin-1"), ["latin.txt", "UTF-8", "byte 3"]),
        ("a.jsonl", b'{"text": "x"}\n{"text"', ["a.jsonl, line 2", "not JSON"]),
        ("b.jsonl", b'{"text": "x"}\n{"t": 1}', ["b.jsonl, line 2", "'text'"]),
        ("c.parquet", b"PAR", ["c.parquet", "not a Parquet"]),
        ("d.csv", b"a,b", ["d.csv", ".jsonl"]),
    ],
)
def test_bad_files(tmp_path, fails, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    folder = tmp_path / "run"
    sentence = fails("pretrain", f"--output={folder}", f"--data.files=[{path}]", *SIZES)
    assert all(word in sentence for word in words), sentence
    assert path.read_bytes() == content


def test_the_same_output_can_be_used_once_the_file_is_mended(tmp_path, text, fails):  # noqa: F811
    path, folder = tmp_path / "a.txt", tmp_path / "run"
    path.write_bytes(b"")
    fails("pretrain", f"--output={folder}", f"--data.files=[{path}]", *SIZES)
    shutil.copy(text, path)
    assert pretrain(path, folder, "--trainer.max_steps=1") == 0


def test_missing_file(tmp_path, fails):
    pattern = tmp_path / "*.txt"
    output = tmp_path / "run"
    sentence = fails(
        "pretrain", f"--output={output}", f"--data.files=[{pattern}]", *SIZES
    )
    assert sentence == f"no file matches {pattern}"
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.vocab_size=30000"], ["30000", "more than the text supports"]),
        (["--data.vocab_size=100"], ["100", "too small"]),
        (["--model.config.dim=30"], ["dim"]),
        (["--model.config.n_heads=3"], ["n_heads", "dim"]),
        (["--model.config.n_heads=4", "--model.config.n_kv_heads=3"], ["n_kv_heads"]),
        (["--data.lengths=[[1.0, 100000, 4]]"], ["100000"]),
        (["--data.lengths=[[0.5, 32, 4]]"], ["shares"]),
        (["--data.lengths=[[1.0, 64, 4]]"], ["context of 32"]),
        (["--data.validation_fraction=2"], ["validation_fraction"]),
        (["--data.tokenizer=/nowhere.model"], ["/nowhere.model"]),
        (["--model.pek_lr=1"], ["'model.pek_lr'", "did you mean model.peak_lr"]),
        (["--model.config.dmi=1"], ["'model.config.dmi'", "model.config.dim"]),
        (["--trainer.max_stepz", "1"], ["'trainer.max_stepz'", "trainer.max_steps"]),
        (["--model.clip_norm=0"], ["model.clip_norm must be above 0, but is 0"]),
        (["--model.peak_lr=high"], ["model.peak_lr", "a number, but is high"]),
        (["--model.config.dim=1.5"], ["dim must be a whole number, but is 1.5"]),
        (["--trainer.max_steps=-1"], ["max_steps"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml", "text, tour, town"]),
        (["stray"], ["'stray'"]),
        (["--seed"], ["--seed lacks its value"]),
        (["--prompts=[ROMEO:]"], ["prompts: [ROMEO:]", "quotes"]),
        ([f"--prompts={'1 + 2 ' * 9}"], ["prompts: '1 + 2 ", "context of 32"]),
    ],
)
def test_bad_settings(tmp_path, text, fails, arguments, words):  # noqa: F811
    files = f"--data.files=[{text}]"
    sentence = fails("pretrain", f"--output={tmp_path}/run", files, *SIZES, *arguments)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: {pek_lr: 1}", ["'model.pek_lr'", "model.peak_lr"]),
        ("modle: {peak_lr: 1}", ["'modle.peak_lr'", "model.peak_lr"]),
        ("model: {config: {dmi: 1}}", ["'model.config.dmi'", "model.config.dim"]),
        ("model: [a: {", ["mine.yaml, line 1"]),
        ("- model\n- data\n", ["mine.yaml holds no settings; write each as 'key: "]),
    ],
)
def test_bad_configuration_files(tmp_path, fails, content, words):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    sentence = fails("pretrain", f"--output={tmp_path}/run", f"--config={path}", *SIZES)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


def test_an_empty_configuration_has_no_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# nothing yet\n")
    assert with_config_paths([f"--config={path}", "--seed=1"], "sft") == ["--seed=1"]


def test_a_damaged_shard_is_named(tmp_path, text, finished, fails):  # noqa: F811
    for damage in (lambda data: data[:-2], lambda data: data[:-2] + b"\1\1"):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(finished, folder)
        shard = folder / "corpus" / "train" / "shard-00000.bin"
        shard.write_bytes(damage(shard.read_bytes()))
        before = read_all(folder / "checkpoints")
        files = f"--data.files=[{text}]"
        sentence = fails("pretrain", f"--output={folder}", files, *SIZES)
        assert str(shard) in sentence
        assert f"delete {folder / 'corpus'}" in sentence
        assert read_all(folder / "checkpoints") == before


def test_a_folder_with_other_contents_is_kept(tmp_path, text, fails):  # noqa: F811
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    files = f"--data.files=[{text}]"
    sentence = fails("pretrain", f"--output={folder}", files, *SIZES)
    assert str(folder) in sentence
    assert "--force" in sentence
    assert read_all(folder) == {"diary.txt": b"dear diary"}
    assert pretrain(text, folder, "--force", "--trainer.max_steps=1") == 0
    assert (folder / "diary.txt").read_text() == "dear diary"
    assert (folder / "model" / "config.json").is_file()


def test_another_run_is_kept(tmp_path, text, finished, fails):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = read_all(folder)
    files = f"--data.files=[{text}]"
    other = [f"--output={folder}", files, *SIZES, "--model.peak_lr=0.5"]
    sentence = fails("pretrain", *other)
    assert "model.peak_lr = 0.0003, not 0.5" in sentence
    assert read_all(folder) == before
    assert main(["pretrain", *other, "--force"]) == 0
    assert read_all(folder) != before


def test_a_finished_run_without_checkpoints_is_kept(
    tmp_path,
    text,  # noqa: F811
    finished,
    fails,
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints")
    before = read_all(folder)
    other = [f"--output={folder}", f"--data.files=[{text}]", *SIZES]
    assert "--force" in fails("pretrain", *other, "--model.peak_lr=0.5")
    assert read_all(folder) == before


def test_what_cannot_be_validated_is_refused(tmp_path, text, fails):  # noqa: F811
    run = [f"--output={tmp_path / 'run'}", f"--data.files=[{text}]", *SIZES]
    for key in ("--data.validation_windows=0", "--trainer.limit_val_batches=0"):
        sentence = fails("pretrain", *run, key)
        assert "nothing could be validated" in sentence
        assert key.strip("-").partition("=")[0] in sentence


def test_a_checkpoint_with_another_tokenizer_is_not_converted(
    tmp_path,
    finished,
    fails,
):
    path = tmp_path / "t.model"
    train_tokenizer(["another text of many words"] * 9, path, 280)
    out = tmp_path / "model"
    sentence = fails("convert", finished, out, f"--tokenizer={path}")
    assert str(path) in sentence
    assert "vocabulary of" in sentence
    assert not out.exists()


def test_a_checkpoint_is_not_converted_without_a_tokenizer(tmp_path, finished, fails):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "model")
    assert main(["convert", str(run), str(tmp_path / "first")]) == 0
    found = tmp_path / "first" / "tokenizer.model"
    assert found.read_bytes() == (run / "corpus" / "tokenizer.model").read_bytes()
    shutil.rmtree(run / "corpus")
    sentence = fails("convert", run, tmp_path / "second")
    assert sentence.startswith(f"there is no tokenizer.model in {run}")
    assert "--tokenizer" in sentence
    assert not (tmp_path / "second").exists()


def test_output_is_a_file(tmp_path, text, fails):  # noqa: F811
    path = tmp_path / "file"
    path.write_text("mine")
    files = f"--data.files=[{text}]"
    assert "is a file" in fails("pretrain", f"--output={path}", files, *SIZES)
    assert path.read_text() == "mine"


def test_a_pickle_among_the_checkpoints_is_refused(tmp_path, text, finished, fails):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps([]))
    sentence = fails("pretrain", f"--output={folder}", f"--data.files=[{text}]", *SIZES)
    assert "last.ckpt is a pickle" in sentence


def test_diverging_training_stops_with_the_step(tmp_path, text, fails):  # noqa: F811
    folder = tmp_path / "run"
    lines = [f"--output={folder}", f"--data.files=[{text}]", *SIZES]
    sentence = fails("pretrain", *lines, "--model.peak_lr=1e36", "--model.warmup=1")
    assert "at step " in sentence
    assert "learning rate" in sentence
    for path in folder.glob("checkpoints/step-*/tensors.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_a_run_without_a_finite_validation_loss_has_no_model(tmp_path, text, fails):  # noqa: F811
    folder = tmp_path / "run"
    lines = [f"--output={folder}", f"--data.files=[{text}]", *SIZES]
    lines += ["--model.peak_lr=1e36", "--model.warmup=1", "--trainer.max_steps=1"]
    for _ in range(2):  # going on from its checkpoint, it says the same
        sentence = fails("pretrain", *lines)
        assert "no validation loss was a finite number" in sentence
        assert "model.peak_lr" in sentence
    assert not (folder / "model").exists()
    assert not (folder / "result.json").exists()


@pytest.fixture
def model_folder(finished, tmp_path):
    """A copy of a model that may be spoilt."""
    return shutil.copytree(finished / "model", tmp_path / "model")


def spoil(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop(tensors):
    del tensors["model.norm.weight"]


def reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(3)


@pytest.mark.parametrize("change", [drop, reshape])
def test_a_missing_or_misshapen_tensor_is_named(model_folder, fails, change):
    spoil(model_folder, change)
    sentence = fails("generate", model_folder, "1 and")
    assert "model.norm.weight" in sentence
    assert str(model_folder) in sentence


def test_pickles_are_never_opened(model_folder, fails):
    weights = model_folder / "model.safetensors"
    trace = model_folder / "trace"

    class Bomb:
        def __reduce__(self):
            return (Path.write_text, (trace, "boom"))

    weights.write_bytes(pickle.dumps(Bomb()))
    assert "model.safetensors" in fails("generate", model_folder, "1 and")
    weights.rename(model_folder / "pytorch_model.bin")
    assert "pickle" in fails("generate", model_folder, "1 and")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}", "1 and " * 50], ["context of 32"]),
        (["{model}", "1", "--temperature=-1"], ["temperature", "-1"]),
        (["{model}", "1", "--top-p=2"], ["top_p", "2"]),
        (["{model}", "1", "--max-new-tokens=0"], ["max_new_tokens", "0"]),
        (["{model}", "1", "--max-new-tokens=x"], ["--max-new-tokens", "'x'"]),
        (["/nowhere", "1"], ["/nowhere"]),
        (["{model}/..", "1"], ["config.json"]),
        (["{model}"], ["prompt"]),
        (["{model}", "1", "--top_p=1"], ["--top_p=1", "llama2-lite generate --help"]),
    ],
)
def test_bad_generation(finished, fails, arguments, words):
    model = str(finished / "model")
    arguments = [argument.replace("{model}", model) for argument in arguments]
    sentence = fails("generate", *arguments)
    assert all(word in sentence for word in words), sentence


def test_a_tokenizer_of_another_model(model_folder, fails, shared_data):
    shutil.copy(
        shared_data / "llama2_tokenizer.model", model_folder / "tokenizer.model"
    )
    sentence = fails("generate", model_folder, "1")
    assert "32000" in sentence
    assert "290" in sentence


def test_unknown_command(fails):
    assert fails("tuor") == "there is no command 'tuor'; did you mean tour?"


def test_bad_recipes(tmp_path, fails):
    path = tmp_path / "tour.yaml"
    assert str(path) in fails("tour", f"--folder={tmp_path}/t", f"--config={path}")
    path.write_text("max_stepz: 3")
    sentence = fails("tour", f"--folder={tmp_path}/t", f"--config={path}")
    assert "'max_stepz'" in sentence
    path.write_text("max_steps: 3")
    sentence = fails("tour", f"--folder={tmp_path}/t", f"--config={path}")
    assert "documents, validation_documents, vocab_size" in sentence
    assert not (tmp_path / "t").exists()
