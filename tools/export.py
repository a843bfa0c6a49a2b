"""Chapters into modules and back: `python tools/export.py COMMAND [CHAPTER ...]`.

A chapter is a pair, book/NN_name.md (what people edit) and book/NN_name.ipynb (the same
cells with their outputs). Its cells tagged `export` form llama2_lite/name.py.
"""

import argparse
import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

from modules import IMPORTS, export, is_export_of, is_text, module_source, pull
from nbformat import NotebookNode
from notebooks import (
    Chapter,
    Problem,
    code_cells,
    diff,
    digest,
    find_chapters,
    load,
    parse,
    render,
    run,
    stale,
    sync,
)

MAX_CELL_LINES = 24
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_BOOK_BYTES = 10_000_000
# What a stored study says about itself, besides its figures.
STUDY = {"config", "seeds", "machine", "modules", "code_hash", "script", "script_hash"}


# Whether everything agrees


def check(chapter: Chapter) -> list[str]:
    """What of a chapter disagrees: the pair, the module, the outputs, the limits."""
    md, ipynb = f"book/{chapter.stem}.md", f"book/{chapter.stem}.ipynb"
    for path in (chapter.text, chapter.notebook):
        if not path.exists():
            return [f"book/{path.name} is missing; `make sync` makes it"]
    (text, edited), notebook = parse(chapter), load(chapter)
    problems = []
    if text != render(notebook):
        changes = diff(render(notebook), text, ipynb, md)
        problems.append(f"{md} and {ipynb} are out of step; `make sync`\n{changes}")
    elif notebook.metadata.get("text_hash") != digest(text):
        problems.append(f"{ipynb} does not say which text it belongs to; `make sync`")

    source = module_source(chapter, edited)
    module = str(chapter.module.relative_to(chapter.root))
    actual = chapter.module.read_text("utf-8") if chapter.module.exists() else ""
    if source is None and is_export_of(chapter):
        problems.append(f"{module} stems from {md}, which exports nothing now")
    elif source is not None and not actual:
        problems.append(f"{module} is missing; `make export` writes it")
    elif source is not None and source != actual:
        problems.append(
            f"{module} and {md} are out of step; `make export` if the chapter is "
            f"right, `make pull` if the module is\n{diff(source, actual, md, module)}"
        )
    problems += stale(chapter, notebook)
    for cell in code_cells(edited):
        problems += [f"{md}: the cell {problem}" for problem in bad_cell(cell)]
    return problems


def bad_cell(cell: NotebookNode) -> list[str]:
    problems = []
    first = cell.source.strip().partition("\n")[0]
    tags = cell.metadata.get("tags", [])
    lines = cell.source.splitlines()
    length = len(lines) - docstring_lines(cell.source)
    can_be_split = "export" not in tags or parts(cell.source) > 1
    is_read = "remove-input" not in tags and can_be_split
    if is_read and length > MAX_CELL_LINES:
        problems.append(f"{first!r} has {length} lines; the limit is {MAX_CELL_LINES}")
    wide = [line for line in lines if len(line) > 88]
    if wide:
        problems.append(f"{first!r} has a line of {len(wide[0])} columns: {wide[0]!r}")
    marks = [cell.source.count(f"### {mark} SOLUTION") for mark in ("BEGIN", "END")]
    if "exercise" in tags and (marks[0] != marks[1] or not marks[0]):
        problems.append(
            f"{first!r} is tagged exercise, but no solution stands between "
            "### BEGIN SOLUTION and ### END SOLUTION"
        )
    return problems


def parts(source: str) -> int:
    """How many cells the statements of a cell and the methods of its classes fill."""
    total = 0
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ClassDef):
            total += max(1, sum(isinstance(m, FUNCTIONS) for m in statement.body))
        else:
            total += not isinstance(statement, IMPORTS)
    return total


def docstring_lines(source: str) -> int:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with a line that only IPython understands
        return 0
    owners = (*FUNCTIONS, ast.ClassDef)
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, owners) and is_text(node.body[0]):
            total += (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return total


def check_book(root: Path) -> list[str]:
    """What of the book as a whole disagrees: size, orphaned modules, odd studies."""
    problems = []
    files = [path for path in (root / "book").rglob("*") if path.is_file()]
    files = [path for path in files if "_build" not in path.parts]
    size = sum(path.stat().st_size for path in files)
    if size > MAX_BOOK_BYTES:
        problems.append(f"book/ has {size:,} bytes; the limit is {MAX_BOOK_BYTES:,}")
    modules = {chapter.module for chapter in find_chapters(root, [])}
    for module in sorted((root / "llama2_lite").glob("*.py")):
        if module not in modules and not module.name.startswith("__"):
            problems.append(
                f"llama2_lite/{module.name} has no chapter book/NN_{module.stem}.md"
            )
    for path in studies(root):
        record = json.loads(path.read_text(encoding="utf-8"))
        if missing := STUDY - record.keys():
            where = path.relative_to(root)
            problems.append(f"{where} lacks {', '.join(sorted(missing))}")
    return problems


def studies(root: Path) -> list[Path]:
    return sorted((root / "book" / "results").glob("*.json"))


def stale_studies(root: Path) -> list[str]:
    """Stored studies that were made by other code or another script than is there now.

    They are named and no more: to repeat them takes hours. Those beside the benchmarks
    count too, where they record their code.
    """
    sys.path.insert(0, str(root))
    from llama2_lite.runtime.artifacts import code_hash, script_hash

    found = []
    beside = sorted((root / "benchmarks" / "results").glob("*.json"))
    for path in [*studies(root), *beside]:
        where = path.relative_to(root)
        record = json.loads(path.read_text(encoding="utf-8"))
        if STUDY - record.keys():
            continue
        modules = ", ".join(record["modules"])
        try:
            if record["code_hash"] != code_hash(record["modules"]):
                found.append(f"{where}: code has changed since, in one of {modules}")
        except ValueError as error:
            found.append(f"{where}: {error}")
        script = root / record["script"]
        if not script.exists() or record["script_hash"] != script_hash(script):
            found.append(f"{where}: {record['script']}, which made it, has changed")
    return found


# The command line

STEPS: dict[str, list[Callable[[Chapter], str | None]]] = {
    "sync": [sync],
    "export": [sync, export],
    "pull": [sync, pull, sync, export],
    "run": [sync, run],
}
PURPOSES = {
    "sync": "bring each chapter's text and notebook into step",
    "export": "write modules from chapters",
    "pull": "take edited modules over into their chapters",
    "run": "execute notebooks in place",
    "check": "fail if anything disagrees",
}


def main(arguments: list[str] | None = None) -> int:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=root, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in PURPOSES.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("chapters", nargs="*", help="such as 06 or attention")
    given = parser.parse_args(arguments)

    problems: list[str] = []
    chapters: list[Chapter] = []
    try:
        chapters = find_chapters(given.root, given.chapters)
    except Problem as error:
        problems.append(str(error))
    for chapter in chapters:
        try:
            if given.command == "check":
                problems += check(chapter)
            for step in STEPS.get(given.command, []):
                if done := step(chapter):
                    print(done, flush=True)
        except Problem as error:
            problems.append(str(error))
    if given.command == "check" and not given.chapters:
        problems += check_book(given.root)
        if old := stale_studies(given.root):
            print("stale studies, repeat them by `make experiments`:")
            print("\n".join(f"  {study}" for study in old), flush=True)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if given.command == "check" and not problems:
        print(f"{len(chapters)} chapters, their modules and their outputs agree")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
