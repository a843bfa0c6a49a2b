"""From a model in parts, in memory or in a checkpoint, to a model folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.reward import RewardConfig, RewardModel
from llama2_lite.runtime.checkpoints import (
    STATE,
    describe_model,
    find_damage,
    newest_checkpoint,
    read_tensors,
    write_tensors,
)
from llama2_lite.runtime.processes import in_first, is_divided, is_first
from llama2_lite.tokenizer import Tokenizer

KINDS: dict[str, tuple[Any, type[LlamaConfig]]] = {
    "Llama": (Llama, LlamaConfig),
    "RewardModel": (RewardModel, RewardConfig),
}
PREFIX = "state_dict/model."  # of the names of its tensors in a checkpoint


def assemble(description: dict[str, Any], folder: Path, prefix: str = "") -> Any:
    """A model on the CPU whose tensors are in files, whole or in parts.

    Args:
        description: from `describe_model`.
        folder: of the files.
        prefix: of the names of the tensors.
    """
    kind, config = KINDS[description["kind"]]
    with torch.device("meta"):
        model = kind(config(**description["config"]))
    model.to_empty(device="cpu")
    for part in model.modules():
        if isinstance(part, Llama):
            part._derive()
    parameters = {
        f"{prefix}{name}": parameter.detach()
        for name, parameter in model.named_parameters()
    }
    found = read_tensors(folder, lambda name, shape: parameters.get(name), parameters)
    if missing := parameters.keys() - found.keys():
        raise ValueError(f"{folder}: tensor {min(missing)} is missing")
    return model


def save_model(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:
    """``save_pretrained`` for any layout, replacing what is there.

    All processes of the layout call this: each writes its part, and the first puts
    them together, from disk.
    """
    if not is_divided(model):
        if is_first():
            _replace(model, folder, tokenizer)
        return
    beside = folder.with_name(f".{folder.name}.parts.partial")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def begin() -> None:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)

    def finish() -> None:
        whole = assemble(describe_model(model), beside)
        _replace(whole, folder, tokenizer)
        shutil.rmtree(beside)

    in_first(begin)
    write_tensors(tensors, beside)
    in_first(finish)


def _replace(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:
    try:
        model.save_pretrained(folder, tokenizer, force=True)
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{folder}: {error}") from None


def convert(
    source: str | Path, folder: str | Path, tokenizer: str | Path | None = None
) -> Path:
    """Make a model folder of a checkpoint, or of the newest one of a run.

    Args:
        source: the folder of the checkpoint or of the run.
        folder: new or empty.
        tokenizer: a tokenizer.model; that of the run if left out.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: if there is no checkpoint or no
            tokenizer, the folder is in use, or the checkpoint is damaged.
    """
    path = find_checkpoint(Path(source))
    state = json.loads((path / STATE).read_text("utf-8"))
    if "model" not in state:
        raise ValueError(f"the checkpoint {path} does not say what kind of model it is")
    run = path.parent.parent
    vocabulary = find_tokenizer(run) if tokenizer is None else Path(tokenizer)
    found = Tokenizer(vocabulary)
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; choose another")
    n_pieces = state["model"]["config"]["vocab_size"]
    if found.vocab_size != n_pieces:
        raise ValueError(
            f"{vocabulary} has {found.vocab_size} pieces, but the model of {path} has "
            f"a vocabulary of {n_pieces}; give the --tokenizer it was trained with"
        )
    assemble(state["model"], path, PREFIX).save_pretrained(folder, found)
    return path


def find_tokenizer(run: Path) -> Path:
    """The tokenizer in the folder of a run, beside its best model or its text.

    Raises:
        FileNotFoundError: if there is none. The model that a run began with may have
            changed since, so its tokenizer is not taken unasked.
    """
    for folder in (run / "model", run, run / "corpus"):
        if (path := folder / "tokenizer.model").is_file():
            return path
    raise FileNotFoundError(
        f"there is no tokenizer.model in {run}, nor in its model or corpus folder; "
        "give the --tokenizer of the training, such as that of its --start"
    )


def find_checkpoint(source: Path) -> Path:
    """A whole checkpoint: the folder itself, or the newest in the folder of a run.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is damaged.
    """
    if (source / STATE).is_file():
        if damage := find_damage(source):
            raise ValueError(f"the checkpoint {source} {damage}")
        return source
    for folder in (source / "checkpoints", source):
        if (newest := newest_checkpoint(folder)) is not None:
            return newest
    raise FileNotFoundError(f"there is no whole checkpoint in {source}")
