"""Configuration files: those that come with the package, and those that do not."""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: if it is not YAML; the sentence names the line.
    """
    try:
        return yaml.safe_load(Path(path).read_text("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark else ""
        raise ValueError(f"{path}{where} is not YAML") from None


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
