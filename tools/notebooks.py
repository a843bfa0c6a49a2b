"""A chapter on disk: its text (.md), its notebook (.ipynb), and what ran in it.

Nothing here looks at file times, which a fresh clone does not have. The notebook
carries the hash of the text that it was last in step with and, for each of its code
cells, the hash of the source that its output came from and the hash of that output.
An assert prints nothing, so it is no part of that source: `make test` runs it.
"""

import ast
import copy
import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml
from jupytext.myst import CompactDumper
from nbformat import NotebookNode

JUPYTEXT = {"formats": "ipynb,md:myst"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3", "file_extension": ".py"}
CELL_METADATA = ("tags", "mystnb")  # all that a cell may say about itself in the text
KEPT = ("module_hash", "ran", "widgets")  # in a notebook, besides what `save` sets

# jupytext registers this with their base class, where they no longer look once another
# library, such as jsonargparse, has registered something with SafeDumper itself.
for dumper in (yaml.SafeDumper, CompactDumper):
    dumper.add_representer(NotebookNode, yaml.SafeDumper.represent_dict)


class Problem(Exception):
    """Something a person has to look at, in a sentence that says what and where."""


@dataclass(frozen=True)
class Chapter:
    """Where the parts of one chapter lie: ``stem`` is for example 06_attention."""

    root: Path
    stem: str

    @property
    def text(self) -> Path:
        return self.root / "book" / f"{self.stem}.md"

    @property
    def notebook(self) -> Path:
        return self.root / "book" / f"{self.stem}.ipynb"

    @property
    def module(self) -> Path:
        return self.root / "llama2_lite" / f"{self.stem.split('_', 1)[1]}.py"


def find_chapters(root: Path, wanted: list[str]) -> list[Chapter]:
    """The chapters of the book, or those named by number, name, stem or path."""
    files = (root / "book").glob("[0-9][0-9]_*.*")
    stems = sorted({path.stem for path in files if path.suffix in (".md", ".ipynb")})
    if not wanted:
        return [Chapter(root, stem) for stem in stems]
    found = []
    for name in wanted:
        key = Path(name).stem
        names = {
            stem: {stem, stem[:2], stem[:2].lstrip("0"), stem[3:]} for stem in stems
        }
        matches = [stem for stem in stems if key in names[stem]]
        if not matches:
            raise Problem(f"there is no chapter {name!r} in {root / 'book'}")
        found += [Chapter(root, stem) for stem in matches]
    return found


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old: str, new: str, old_name: str, new_name: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), old_name, new_name, lineterm=""
    )
    return "\n".join(lines)


# The pair


def parse(chapter: Chapter) -> tuple[str, NotebookNode]:
    """The text of a chapter, and its cells, without ids, jupytext's being random."""
    try:
        text = chapter.text.read_text(encoding="utf-8")
        notebook = jupytext.reads(text, fmt="md:myst")
    except Exception as error:
        name = chapter.text.name
        raise Problem(f"book/{name} cannot be read as a chapter: {error}") from error
    for cell in notebook.cells:
        cell.pop("id", None)
    return text, notebook


def render(notebook: NotebookNode) -> str:
    """The text of a notebook: its cells without outputs, in jupytext's own layout."""
    bare = nbformat.v4.new_notebook(
        metadata={"jupytext": JUPYTEXT, "kernelspec": KERNEL, "language_info": LANGUAGE}
    )
    for cell in notebook.cells:
        cell = copy.deepcopy(cell)
        cell.metadata = NotebookNode(
            {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        )
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        bare.cells.append(cell)
    return jupytext.writes(bare, fmt="md:myst")


def load(chapter: Chapter) -> NotebookNode:
    try:
        return nbformat.read(chapter.notebook, as_version=4)
    except Exception as error:
        name = chapter.notebook.name
        raise Problem(f"book/{name} is not a notebook: {error}") from error


def save(chapter: Chapter, notebook: NotebookNode) -> None:
    """Write a notebook, marked as in step with its own text."""
    text = render(notebook)
    kept = {key: notebook.metadata[key] for key in KEPT if key in notebook.metadata}
    notebook.metadata = NotebookNode(
        kept,
        jupytext=JUPYTEXT,
        kernelspec=KERNEL,
        language_info=LANGUAGE,
        text_hash=digest(text),
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    content = nbformat.writes(notebook) + "\n"
    if not chapter.notebook.exists() or chapter.notebook.read_text() != content:
        write(chapter.notebook, content)


def write(path: Path, content: str) -> None:
    """Replace a file as a whole, so that no reader ever sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)


def sync(chapter: Chapter) -> str | None:
    """Bring text and notebook into step; returns what was done, if anything was.

    Raises:
        Problem: if both were edited since they were last in step.
    """
    if not chapter.text.exists():
        notebook = load(chapter)
        write(chapter.text, render(notebook))
        save(chapter, give_ids(notebook))
        return f"book/{chapter.stem}.md made from the notebook"
    written, edited = parse(chapter)
    text = render(edited)
    if text != written:
        write(chapter.text, text)
    if not chapter.notebook.exists():
        save(chapter, give_ids(edited))
        return f"book/{chapter.stem}.ipynb made from the text"

    notebook = load(chapter)
    other, last = render(notebook), notebook.metadata.get("text_hash")
    if text == other:
        save(chapter, notebook)
        return None
    if last == digest(other):
        save(chapter, merge(edited, notebook))
        return f"book/{chapter.stem}.md was edited: notebook brought into step"
    if last == digest(text):
        write(chapter.text, other)
        save(chapter, give_ids(notebook))
        return f"book/{chapter.stem}.ipynb was edited: text brought into step"
    raise Problem(
        f"book/{chapter.stem}.md and .ipynb were both edited; take over into one what "
        "the other has, then delete the other and sync\n"
        + diff(other, text, f"{chapter.stem}.ipynb", f"{chapter.stem}.md")
    )


def merge(edited: NotebookNode, notebook: NotebookNode) -> NotebookNode:
    """The cells of the edited text, with the outputs and ids of the notebook's cells.

    A cell that prints what it printed keeps its output; another keeps its id only.
    """
    for key in KEPT:
        if key in notebook.metadata:
            edited.metadata[key] = notebook.metadata[key]
    old = [(cell.cell_type, cell.source) for cell in notebook.cells]
    new = [(cell.cell_type, cell.source) for cell in edited.cells]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        for i, j in zip(range(i1, i2), range(j1, j2), strict=False):
            before, after = notebook.cells[i], edited.cells[j]
            if "id" in before:
                after["id"] = before["id"]
            kinds = before.cell_type, after.cell_type
            if kinds == ("code", "code") and what_prints(before) == what_prints(after):
                after.outputs, after.execution_count = (
                    before.outputs,
                    before.execution_count,
                )
    return give_ids(edited)


def give_ids(notebook: NotebookNode) -> NotebookNode:
    """Give each cell without an id of its own one that is the same on every machine."""
    taken: set[str] = set()
    for cell in notebook.cells:
        name, n = cell.get("id"), 0
        while name is None or name in taken:
            name = digest(f"{cell.cell_type} {n} {cell.source}")[:8]
            n += 1
        cell["id"] = name
        taken.add(name)
    return notebook


# What ran


def fingerprints(notebook: NotebookNode) -> list[str]:
    """For each code cell, two hashes: of all source up to it, and of its output."""
    prints, so_far = [], ""
    for cell in code_cells(notebook):
        so_far = digest(f"{so_far}\n{what_prints(cell)}")
        output = json.dumps(cell.outputs, sort_keys=True)
        prints.append(f"{so_far} {digest(output)}")
    return prints


def what_prints(cell: NotebookNode) -> str:
    """The source of a code cell without its asserts; all of it if it is not Python."""
    try:
        tree = ast.parse(cell.source)
    except SyntaxError:
        return cell.source
    asserts: set[int] = set()  # numbers of their lines
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            asserts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(cell.source.splitlines(), start=1)
    return "\n".join(line for number, line in lines if number not in asserts)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(chapter: Chapter) -> str:
    """Execute a notebook in place, in book/, and record what its outputs came from.

    Raises:
        Problem: if a cell stops with an error; the notebook stays as it was.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, DeadKernelError

    notebook = load(chapter)
    notebook.metadata.pop("widgets", None)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(chapter.root / "book")}},
    )
    path = os.pathsep.join(filter(None, [str(chapter.root), os.getenv("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        client.execute(env=environment)
    except (CellControlSignal, DeadKernelError) as error:
        message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # the kernel's colours
        raise Problem(f"book/{chapter.stem}.ipynb stopped: {message}") from error
    notebook = with_plain_widget_ids(notebook)
    for count, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    notebook.metadata["ran"] = fingerprints(notebook)
    save(chapter, notebook)
    return f"book/{chapter.stem}.ipynb executed"


def with_plain_widget_ids(notebook: NotebookNode) -> NotebookNode:
    """Number the widgets, whose ids are random otherwise, in order of creation."""
    widgets = notebook.metadata.get("widgets", {})
    text = nbformat.writes(notebook)
    for view in widgets.values():
        for n, name in enumerate(view["state"]):
            text = text.replace(name, f"widget{n:026d}")
    return nbformat.reads(text, as_version=4)


def stale(chapter: Chapter, notebook: NotebookNode) -> list[str]:
    """What is wrong with the outputs of a notebook, one sentence each."""
    problems = []
    where = f"book/{chapter.stem}.ipynb"
    hint = f"`make run CHAPTERS={chapter.stem[:2]}`"
    ran = iter(notebook.metadata.get("ran", []))
    pairs = zip(code_cells(notebook), fingerprints(notebook), strict=True)
    for number, (cell, fingerprint) in enumerate(pairs, start=1):
        first = cell.source.strip().partition("\n")[0]
        at = f"{where}, code cell {number} ({first!r})"
        source, output = next(ran, " ").split(" ")
        if source != fingerprint.split(" ")[0]:
            problems.append(
                f"{at} has no output of its own: it, or a cell before it, was written "
                f"after the notebook last ran; {hint}"
            )
            break
        if output != fingerprint.split(" ")[1]:
            problems.append(f"{at} holds an output that `run` did not write; {hint}")
        problems += [f"{at} {problem}" for problem in bad_outputs(cell)]
    return problems


def bad_outputs(cell: NotebookNode) -> list[str]:
    problems = []
    for output in cell.outputs:
        if output.output_type == "error":
            problems.append(f"stopped with {output.ename}: {output.evalue}")
        if output.get("name") == "stderr":
            line = output.text.strip().partition("\n")[0]
            problems.append(f"writes to stderr, which no reader needs: {line!r}")
        text = output.get("data", {}).get("text/plain", "") + output.get("text", "")
        if re.search(r"\bat 0x[0-9a-f]{6,}", text):
            problems.append("shows a memory address, different on every run")
        size = len(json.dumps(output))
        if size > 100_000:
            problems.append(f"has an output of {size:,} bytes; the limit is 100,000")
    return problems
