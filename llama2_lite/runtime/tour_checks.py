"""What `llama2-lite tour` refuses before anything is made or replaced.

It is not in `llama2_lite.runtime.tour`, as what was evaluated with the code there would
be evaluated anew for each word that changes here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama2_lite.model import LlamaConfig
from llama2_lite.runtime.artifacts import RECORD
from llama2_lite.runtime.configs import KINDS, find_config
from llama2_lite.runtime.tour import Recipe

COUNTS = (
    *("documents", "validation_documents", "vocab_size", "max_steps"),
    *("validate_every", "checkpoint_every"),
)
SIZES = {  # of a model, by type; vocab_size is a key of the recipe itself
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    **{k: v for k, v in LlamaConfig.__annotations__.items() if k != "vocab_size"},
}
WORDS = {int: KINDS["PositiveInt"], float: KINDS["PositiveFloat"], bool: KINDS["bool"]}


def check_tour(
    folder: str | Path, seed: int, path: str | Path | None = None, context: int = 1
) -> None:
    """Refuse what would fail after minutes, or would replace another tour.

    Args:
        folder: of the tour.
        seed: of the command.
        path: of the recipe; configs/tour.yaml if left out.
        context: tokens that stages after the base model need.

    Raises:
        ValueError: it names the option, or the file and its key.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be {KINDS['Seed']}, but is {seed}")
    recipe = Recipe.read(path)
    try:
        check_values(recipe)
        if recipe.llama().max_seq_len < context:
            raise ValueError(
                f"max_seq_len of the model must be at least {context} for the stages "
                f"after the base model, but is {recipe.llama().max_seq_len}; change "
                "it, or give --base-only"
            )
    except ValueError as error:
        raise ValueError(f"{find_config(str(path or 'tour'))}: {error}") from None
    check_folder(Path(folder), recipe, seed)


def check_values(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be followed.

    Raises:
        ValueError: it names the key.
    """
    for name in COUNTS:
        if (value := getattr(recipe, name)) < 1:
            raise ValueError(f"{name} must be {WORDS[int]}, but is {value}")
    if not 0 < recipe.peak_lr < math.inf:
        raise ValueError(f"peak_lr must be {WORDS[float]}, but is {recipe.peak_lr}")
    if recipe.warmup < 0:
        raise ValueError(f"warmup must be 0 or more, but is {recipe.warmup}")
    check_overrides(recipe.model_overrides)
    try:
        config = recipe.llama()
    except ValueError as error:
        raise ValueError(f"model: {error}") from None
    check_lengths(recipe.lengths, config.max_seq_len)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse what is no size of a model.

    Raises:
        ValueError: it names the key.
    """
    for name, value in overrides.items():
        if name not in SIZES:
            known = ", ".join(SIZES)
            raise ValueError(f"model_overrides has no key {name!r}; it has {known}")
        kind = SIZES[name]
        is_right = isinstance(value, kind if kind is bool else kind | int)
        if not is_right or (kind is not bool and not 0 < value < math.inf):
            raise ValueError(
                f"model_overrides: {name} must be {WORDS[kind]}, but is {value}"
            )


def check_lengths(lengths: Sequence[Sequence[Any]], context: int) -> None:
    """Refuse what is no mixture of windows that a model can read.

    Raises:
        ValueError: it names the key.
    """
    for length in lengths:
        match length:
            case [int() | float() as share, int(tokens), int(rows)] if (
                share > 0 and tokens > 0 and rows > 0
            ):
                pass
            case _:
                raise ValueError(
                    "lengths must hold lists of a share of the batches, tokens of a "
                    f"window and windows of a batch, all above 0; {length} is not one"
                )
        if tokens > context:
            raise ValueError(
                f"lengths: windows of {tokens} tokens are longer than max_seq_len of "
                f"the model, {context}"
            )
    shares = [share for share, _, _ in lengths]
    if not math.isclose(sum(shares), 1):
        raise ValueError(f"lengths: the shares must add up to 1, but are {shares}")


def check_folder(folder: Path, recipe: Recipe, seed: int) -> None:
    """Refuse a folder whose base model was made with another seed or recipe.

    One that was made by other code is made anew, as everywhere.

    Raises:
        ValueError: it names the folder and what differs.
    """
    wanted = {"seed": seed, **asdict(recipe), **asdict(recipe.llama())}
    for key, value in made_with(folder).items():
        if key in wanted and wanted[key] != value:
            raise ValueError(
                f"{folder} holds a tour with {key} {value}, not {wanted[key]}; choose "
                "another --folder"
            )


def made_with(folder: Path) -> dict[str, Any]:
    """Seed, recipe and sizes of the base model in a folder, if there is one."""
    found: dict[str, Any] = {}
    for name in ("tokenizer", "corpus", "base"):
        try:
            record = json.loads((folder / name / RECORD).read_text("utf-8"))
            found |= record["config"] | record["config"].get("llama", {})
        except (OSError, ValueError, KeyError):  # not finished, or broken
            return {}
    return found
