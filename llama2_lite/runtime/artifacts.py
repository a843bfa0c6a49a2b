"""Things that take minutes to make, kept until what they were made from changes.

An artifact is a folder, keyed by its configuration, its inputs and the code that made
it. Stored results carry the same hash of the code, so that a change can be noticed.
"""

import ast
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
RECORD = "artifact.json"

# What runs is the code that was there when the process began. A study takes hours, and
# code that is edited meanwhile is not what made its figures.
_SOURCES = {
    path: path.read_bytes()
    for pattern in ("llama2_lite/**/*.py", "benchmarks/*.py")
    for path in PACKAGE.parent.glob(pattern)
}


def source_hash(source: str) -> str:
    """Hash what a Python source does.

    Comments, docstrings, type hints and what exceptions say are left out.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and isinstance(ast.get_docstring(node), str):
            node.body = node.body[1:]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
    return hashlib.sha256(_dump(tree).encode()).hexdigest()[:16]


def _dump(node: Any) -> str:
    """A syntax tree as text that does not depend on the version of Python."""
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={_dump(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != []
        )
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    return repr(node)


def code_hash(module_names: Iterable[str]) -> str:
    """Hash the code of modules of this package, see `source_hash`.

    It is the code as it was when this process began.

    Args:
        module_names: such as ``"model"`` or ``"runtime.tour"``; the order is nothing.

    Raises:
        ValueError: if there is no such module.
    """
    hashes = {}
    for name in sorted(set(module_names)):
        path = PACKAGE / f"{name.removeprefix('llama2_lite.').replace('.', '/')}.py"
        if path not in _SOURCES:
            raise ValueError(f"llama2_lite has no module {name!r}")
        hashes[path.stem] = source_hash(_SOURCES[path].decode())
    return _hash_json(hashes)


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """Hash the bytes of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def script_hash(path: str | Path) -> str:
    """Hash a script of benchmarks/ as it was when this process began."""
    path = Path(path).resolve()
    if path not in _SOURCES:
        return file_hash(path)
    return hashlib.sha256(_SOURCES[path]).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """A finished folder and the key of what it was made from."""

    path: Path
    key: str


def artifact(
    folder: str | Path,
    name: str,
    config: Mapping[str, Any],
    inputs: Iterable[Artifact],
    modules: Iterable[str],
    build: Callable[[Path], None],
) -> Artifact:
    """Return ``folder/name``, building it first if it is missing or out of date.

    It is built in ``folder/name.partial`` and moved when complete. A build that was
    stopped finds what it left there, if it is still to build the same. Processes that
    want the same artifact wait for the one that builds it.

    Args:
        folder: where artifacts live.
        name: of this one.
        config: what ``build`` depends on, as JSON values.
        inputs: other artifacts that it reads.
        modules: of this package whose code made it.
        build: fills the folder that it is given.

    Raises:
        FileExistsError: if there is such a folder that is no artifact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted(set(modules))
    record = {
        "config": dict(config),
        "inputs": {made.path.name: made.key for made in inputs},
        "modules": modules,
        "code_hash": code_hash(modules),
    }
    finished = Artifact(folder / name, _hash_json(record))
    if _key_of(finished.path) == finished.key:
        return finished
    with _locked(folder / f".{name}.lock", f"{name} in {folder}"):
        if _key_of(finished.path) == finished.key:
            return finished
        if finished.path.exists() and not (finished.path / RECORD).exists():
            raise FileExistsError(f"{finished.path} is not ours; move it away")
        beside = folder / f"{name}.partial"
        if _key_of(beside) != finished.key:
            started = beside / "building"
            if not started.is_file() or started.read_text() != finished.key:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                started.write_text(finished.key)
            build(beside)
            write_json(beside / RECORD, {"key": finished.key, **record})
            started.unlink()
        _replace_folder(beside, finished.path)
    return finished


def _key_of(folder: Path) -> str | None:
    """The key of a complete artifact, or None."""
    try:
        return json.loads((folder / RECORD).read_text())["key"]
    except (OSError, ValueError, KeyError):
        return None


def _replace_folder(source: Path, target: Path) -> None:
    """Move a folder over another; killed in between, the source is still whole."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock that the system releases when this process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that makes {what}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file whose old content is there until the new one is complete."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_result(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    seeds: Iterable[int],
    modules: Iterable[str],
    script: str | Path,
    results: Any,
) -> None:
    """Store the figures of a study with all that they depend on.

    Code and script are hashed as they were when this process began.

    Args:
        path: of the JSON file.
        config: what was run.
        seeds: of the runs.
        modules: of this package that were run.
        script: what ran them, a path in the repository.
        results: the figures, as JSON values.
    """
    script = Path(script).resolve()
    modules = sorted(set(modules))
    write_json(
        path,
        {
            "config": dict(config),
            "seeds": list(seeds),
            "machine": machine_name(),
            "modules": modules,
            "code_hash": code_hash(modules),
            "script": script.relative_to(PACKAGE.parent).as_posix(),
            "script_hash": script_hash(script),
            "results": results,
        },
    )


def machine_name() -> str:
    """Processor and cores, and the GPU if PyTorch is loaded and sees one."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = " ".join(line.split(":", 1)[1].split())
                break
    name = f"{processor}, {len(_usable_cores())} cores"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return name


def _usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
