"""Configuration files: those that come with the package, and those that do not."""

import difflib
import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import restricted_number_type

R = TypeVar("R")
CONFIGS = Path(__file__).parents[1] / "configs"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file; an empty one has none.

    Raises:
        ValueError: if it is not YAML, and the sentence names the line, or if it has no
            keys.
    """
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark else ""
        raise ValueError(f"{path}{where} is not YAML") from None
    if not isinstance(found, dict | None):
        raise ValueError(f"{path} holds no settings; write each as 'key: value'")
    return found or {}


def find_config(name: str) -> Path:
    """The file of a name: a path, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and shipped.is_file():
        return shipped
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(
        f"there is no configuration file {name!r}; it is a path or one of {names}"
    )


def read_recipe(kind: type[R], name: str, path: str | Path | None = None) -> R:
    """Read the values of a dataclass, which may hold others, from a YAML file.

    Args:
        kind: the dataclass.
        name: of the file that comes with the package.
        path: another file, or the name of one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: see `read_yaml`, or if a key is missing or unknown.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    file = find_config(str(path or name))
    values = read_yaml(file)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(values))))
    except Exception as error:
        raise ValueError(f"{file}: {explain(str(error), parser)}") from None


def explain(message: str, parser: ArgumentParser) -> str:
    """One sentence for a parser's complaint; for an unknown key, the nearest ones."""
    group = re.search(r"Group '(.*)' does not accept option '(.*)'", message)
    unknown = re.search(r"Option '(.*)' is not accepted", message)
    argument = re.search(r"unrecognized arguments: (\S+)", message)
    if group or unknown or argument:
        key = ".".join(group.groups()) if group else (unknown or argument)[1]  # type: ignore[index]
        if argument and not key.startswith("-"):
            return f"what is {key!r} for? Every value belongs to a --key"
        key = key.lstrip("-").partition("=")[0]
        keys = [action.dest for action in parser._actions]
        near = difflib.get_close_matches(key, keys, 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"there is no key {key!r}{hint}"
    missing = re.search(r'Parser key "(.*)":.*Got value: None', message, re.DOTALL)
    missing = missing or re.search(r'Key "(.*)" is required', message)
    if missing:
        return f"{missing[1]} is missing: give --{missing[1]} or a --config with it"
    if required := re.search(r"arguments are required: (.*)", message):
        return f"{required[1]}: give each as a --key, or a --config that has them"
    if lacking := re.search(r"argument (--[\w.]+)\S*: expected one", message):
        return f"{lacking[1]} lacks its value"
    if expected := re.search(r'Parser key "(.*)":\s*(.*)', message, re.DOTALL):
        key, why = expected.groups()
        return _must_be(key, why) or f"{key}: {why}"
    return re.sub(r"Call to compute_fn of link .* failed: ", "", message)


ABOVE_0 = (
    *("lr", "peak_lr", "critic_lr", "clip", "clip_norm"),
    *("minibatch_size", "max_new_tokens"),
    *("val_check_interval", "log_every_n_steps", "limit_train_batches"),
)
FROM_0 = (
    *("warmup", "weight_decay", "kl_weight", "cut_penalty"),
    *("safety_weight", "next_token_weight"),
)
SHARES = ("gamma", "lam")


def check_ranges(group: str, values: Mapping[str, Any]) -> None:
    """Refuse numbers with which a model learns nothing, or the contrary.

    Args:
        group: of the keys.
        values: by key; others than numbers of learning are not looked at.

    Raises:
        ValueError: if there is such a number; the sentence names its key.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in ABOVE_0 and not value > 0:
            what = "above 0"
        elif name in FROM_0 and not value >= 0:
            what = "0 or more"
        elif name in SHARES and not 0 <= value <= 1:
            what = "from 0 to 1"
        else:
            continue
        raise ValueError(f"{group}.{name} must be {what}, but is {value}")


Epochs = restricted_number_type("Epochs", float, [(">", 0), ("<", inf)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "list": "a list",
    "bool": "true or false",
    "PositiveInt": "a whole number above 0",
    "PositiveFloat": "a number above 0",
    "Epochs": "a finite number above 0",
    "Seed": "a whole number from 0 to 4,294,967,295",
    "NonNegativeFloat": "a number that is not negative",
    "ClosedUnitInterval": "a number from 0 to 1",
}


def _must_be(key: str, why: str) -> str | None:
    """What a value should have been and what it is, if the parser's complaint says."""
    given = re.search(
        r"(?:Given|Got) value: (.*)|: (\S+) does not conform|'(.*)'$", why, re.DOTALL
    )
    choices = re.findall(r"Literal\[(.*?)\]", why.partition("Errors")[0])
    found = re.findall(r"Not of type (\w+)|Expected an? <class '(\w+)'>", why)
    kinds = {first or second for first, second in found} - {"NoneType"}
    what = f"one of {', '.join(choices)}" if choices else ""
    if not what and len(kinds) == 1:
        what = KINDS.get(kinds.pop(), "")
    if not given or not what:
        return None
    value = next(group for group in given.groups() if group is not None)
    return f"{key} must be {what}, but is {value or 'empty'}"
