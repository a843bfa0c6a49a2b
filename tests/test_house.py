"""The files around the code say the same thing."""

import importlib.metadata
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
NOT_RUN_HERE = {  # commands of the README that no test can run, and why
    "conda env create -f environment.yml": "needs conda; its parts are compared below",
    "conda activate llama2-lite": "needs conda",
}


def locked() -> dict[str, str]:
    versions = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, version = line.split("==")
        versions[canonicalize_name(name)] = version
    return versions


def wanted() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for names in lists for line in names]


def test_lock_is_exact_and_the_same_on_every_machine():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line
    assert len(locked()) == len(lines) > 100
    assert not any(re.match("nvidia|cuda|triton", name) for name in locked())


def test_lock_satisfies_the_project():
    for requirement in wanted():
        version = locked().get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not in requirements.lock; `make lock`"
        assert requirement.specifier.contains(version), f"{requirement} != {version}"


def test_lock_leaves_nothing_to_chance():
    """What the locked packages need on this machine is locked too."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(item.name, frozenset(item.extras)) for item in wanted()]
    while todo:
        name, extras = todo.pop()
        name = canonicalize_name(name)
        if (name, extras) in seen or re.match("nvidia|triton|cuda", name):
            continue
        seen.add((name, extras))
        assert name in locked(), f"{name} is not in requirements.lock; `make lock`"
        for line in importlib.metadata.requires(name) or []:
            need = Requirement(line)
            contexts = [{"extra": extra} for extra in {"", *extras}]
            if not need.marker or any(map(need.marker.evaluate, contexts)):
                todo.append((need.name, frozenset(need.extras)))


def test_environment_is_the_locked_one():
    for name, version in locked().items():
        installed = importlib.metadata.version(name).partition("+")[0]
        assert installed == version, f"{name} {installed} is installed, not {version}"


def test_conda_gives_the_same_as_the_lock():
    *plain, nested = ENVIRONMENT["dependencies"]
    assert nested == {"pip": ["-r requirements.lock", "-e ."]}
    python = next(item for item in plain if item.startswith("python="))
    version = python.removeprefix("python=")
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")
    assert {"pip", "c-compiler", "make"} <= set(plain)
    assert ENVIRONMENT["name"] == "llama2-lite"


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.strip()]


def test_readme_names_only_what_exists_and_is_run():
    """Every command stands, letter for letter, in .ci/run or in a test that runs it."""
    makefile = (ROOT / "Makefile").read_text()
    runs = (ROOT / ".ci" / "run").read_text() + " make tour"  # `make test` needs it
    tests = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    assert commands()[:2] == ["make tour", "make test"]
    for command in commands():
        first, *rest = command.split()
        if first == "make":
            assert re.search(rf"^{rest[0]}:", makefile, flags=re.MULTILINE), command
        quoted = [f'"{command}"', f"'{command}'"]
        run = command in runs or any(form in text for form in quoted for text in tests)
        assert run, f"nothing runs `{command}`"


def test_ci_runs_the_readme_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make check", "make book"} <= set(lines)
    assert re.search(r"^test: tour ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_table_of_contents_lists_every_chapter_in_order():
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    listed = [item["file"] for part in contents["parts"] for item in part["chapters"]]
    written = sorted(path.stem for path in (ROOT / "book").glob("[0-9][0-9]_*.md"))
    assert listed == written


def test_modules_import_only_from_earlier_chapters():
    names = sorted(path.stem for path in (ROOT / "book").glob("[0-9][0-9]_*.md"))
    order = [name[3:] for name in names]
    for position, name in enumerate(order):
        module = ROOT / "llama2_lite" / f"{name}.py"
        text = module.read_text() if module.exists() else ""
        used = re.findall(r"^\s*(?:from|import) llama2_lite\.(\w+)", text, re.MULTILINE)
        later = set(used) - set(order[:position])
        assert not later, f"{name} imports {later}, which it must not know"


def make(folder: Path, *arguments: str) -> list[str]:
    """`make` in a clone, with the environment that runs this test."""
    ready = f"{sys.prefix}/.ready"
    return ["make", "-C", str(folder), f"VENV={sys.prefix}", "-o", ready, *arguments]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the project is not a git checkout")
    folder = tmp_path_factory.mktemp("clone") / "clone"
    subprocess.run(["git", "clone", "-q", "--no-local", ROOT, folder], check=True)
    return folder


def test_make_alone_prints_what_there_is():
    done = subprocess.run(make(ROOT), capture_output=True, text=True, check=True)
    for command in commands():
        if command.startswith("make "):
            assert f"make {command.split()[1]} " in done.stdout


@pytest.mark.parametrize(
    "command", ["make sync", "make export", "make pull", "make run CHAPTERS=05"]
)
def test_editing_commands_change_nothing_in_a_fresh_clone(clone: Path, command: str):
    subprocess.run(make(clone, *command.split()[1:]), check=True)
    status = ["git", "-C", str(clone), "status", "--porcelain", "--", "llama2_lite"]
    changed = subprocess.run(status, capture_output=True, text=True, check=True)
    assert changed.stdout == ""


def test_lab_opens_the_book(clone: Path):
    """What "make lab" starts serves the chapters as notebooks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--no-browser --allow-root --port={port} --IdentityProvider.token=''"
    server = subprocess.Popen(make(clone, "lab", f"LAB={flags}"))
    address = f"http://127.0.0.1:{port}/api/contents/03_tokenizer.md?type=notebook"
    try:
        for _ in range(60):
            try:
                with urllib.request.urlopen(address) as reply:
                    body = reply.read().decode()
                break
            except OSError:
                assert server.poll() is None, "JupyterLab ended"
                time.sleep(0.5)
        assert '"type": "notebook"' in body
        assert "SentencePiece" in body
    finally:
        server.terminate()
        server.wait()
