"""Chapters, modules and outputs stay in step; whatever is edited alone is caught."""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from jupytext.sync_contentsmanager import build_sync_jupytext_contents_manager_class

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import export  # noqa: E402
from notebooks import Chapter, fingerprints, render, with_plain_widget_ids  # noqa: E402

HEADER = """\
---
jupytext:
  formats: ipynb,md:myst
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
    jupytext_version: 1.19.6
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
SUMS = """\
# Sums, by hand

Prose with $x$.

```{code-cell} ipython3
:tags: [export]

import math
from collections import Counter
```

```{code-cell} ipython3
:tags: [export]

import json
from collections.abc import Iterable

# Why this is here.
LIMIT = 3


def total(values: Iterable[float]) -> float:
    \"\"\"Add up.\"\"\"
    return math.fsum(values)
```

```{code-cell} ipython3
print(total([0.1] * 10))
```

```{code-cell} ipython3
:tags: [export]

class Bag:
    \"\"\"Counts things.\"\"\"

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
```

```{code-cell} ipython3
:tags: [export]

EMPTY = Bag()
```

```{code-cell} ipython3
:tags: [export]

class Bag(Bag):
    def add(self, value: str) -> None:
        self.counts[value] += 1

    # For readers of other languages.
    def to_json(self) -> str:
        return json.dumps(self.counts)
```

```{code-cell} ipython3
Bag().to_json()
```
"""
MODULE = '''\
"""Sums, by hand.

Exported from book/01_sums.md, which explains every part. Edit it there,
then `make export`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable

# Why this is here.
LIMIT = 3


def total(values: Iterable[float]) -> float:
    """Add up."""
    return math.fsum(values)


class Bag:
    """Counts things."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, value: str) -> None:
        self.counts[value] += 1

    # For readers of other languages.
    def to_json(self) -> str:
        return json.dumps(self.counts)


EMPTY = Bag()
'''


EXPORTED = ":tags: [export]\n\n"
TWO_METHODS = "".join(
    f"    def {name}(self):\n" + "        self.x = 1\n" * 11 + "\n" for name in "ab"
)
ONE_METHOD = "    def a(self):\n" + "        self.x = 1\n" * 30


def tool(root: Path, *arguments: str) -> int:
    return export.main(["--root", str(root), *arguments])


def append_cell(root: Path, source: str) -> None:
    with (root / "book" / "01_sums.md").open("a") as file:
        file.write(f"\n```{{code-cell}} ipython3\n{source.strip()}\n```\n")


def complaint(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `check` says about a book that it must not accept."""
    capsys.readouterr()
    assert tool(root, "check") == 1
    return capsys.readouterr().err


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of one chapter, exported and executed."""
    root = tmp_path_factory.mktemp("finished")
    (root / "book").mkdir()
    (root / "llama2_lite").mkdir()
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "book" / "01_sums.md").write_text(HEADER + SUMS)
    assert tool(root, "export") == 0
    assert tool(root, "run") == 0
    assert tool(root, "check") == 0
    return root


@pytest.fixture
def book(finished: Path, tmp_path: Path) -> Path:
    """A copy of that book, with file times that say nothing."""
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    for n, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, (1e9 + n % 3, 1e9 + n % 3))
    assert tool(root, "check") == 0
    return root


def test_module_looks_hand_written(book: Path):
    assert (book / "llama2_lite" / "sums.py").read_text() == MODULE


def test_text_stays_as_its_author_wrote_it(book: Path):
    assert (book / "book" / "01_sums.md").read_text() == HEADER + SUMS


def test_running_again_changes_no_byte(book: Path):
    notebook = book / "book" / "01_sums.ipynb"
    before = notebook.read_bytes()
    assert tool(book, "run", "1") == 0
    assert notebook.read_bytes() == before
    cells = nbformat.reads(before.decode(), as_version=4).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == [1, 2, 3, 4, 5, 6, 7]
    assert cells[3].outputs[0].text == "1.0\n"


def test_edited_text_is_caught_and_taken_over(book: Path, capsys):
    edit(book / "book" / "01_sums.md", "[0.1] * 10", "[0.1] * 20")
    said = complaint(book, capsys)
    assert "01_sums.md and book/01_sums.ipynb are out of step" in said
    assert "-print(total([0.1] * 10))\n+print(total([0.1] * 20))" in said

    old = nbformat.read(book / "book" / "01_sums.ipynb", as_version=4).cells
    assert tool(book, "sync") == 0
    new = nbformat.read(book / "book" / "01_sums.ipynb", as_version=4).cells
    assert [cell.id for cell in new] == [cell.id for cell in old]
    assert new[3].source == "print(total([0.1] * 20))"
    assert new[3].outputs == []
    assert new[7].outputs == old[7].outputs != []
    said = complaint(book, capsys)  # in step again, but not executed
    assert "code cell 3 ('print(total([0.1] * 20))')" in said
    assert "make run CHAPTERS=01" in said
    assert "out of step" not in said

    assert tool(book, "run") == 0
    assert tool(book, "check") == 0


def test_edited_notebook_is_caught_and_taken_over(book: Path, capsys):
    edit(book / "book" / "01_sums.ipynb", "Prose with $x$.", "Prose with $y$.")
    assert "+Prose with $x$." in complaint(book, capsys)
    assert tool(book, "sync") == 0
    assert "Prose with $y$." in (book / "book" / "01_sums.md").read_text()
    assert tool(book, "check") == 0


def test_notebook_saved_by_jupyterlab_stays_in_step(book: Path):
    """Its jupytext extension writes the text too, and renames the kernel."""
    contents = build_sync_jupytext_contents_manager_class(LargeFileManager)()
    contents.root_dir = str(book / "book")
    model = contents.get("01_sums.ipynb")
    cells = model["content"]["cells"]
    cells[0]["source"] = cells[0]["source"].replace("$x$", "$y$")
    model["content"]["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    contents.save(model, "01_sums.ipynb")
    assert tool(book, "sync") == 0
    assert tool(book, "check") == 0
    changed = HEADER + SUMS.replace("$x$", "$y$")
    assert (book / "book" / "01_sums.md").read_text() == changed


def test_both_edited_is_refused_and_nothing_is_lost(book: Path, capsys):
    text, notebook = book / "book" / "01_sums.md", book / "book" / "01_sums.ipynb"
    edit(text, "Prose with $x$.", "Prose with $y$.")
    edit(notebook, "Prose with $x$.", "Prose with $z$.")
    before = text.read_bytes(), notebook.read_bytes()
    assert tool(book, "sync") == 1
    said = capsys.readouterr().err
    assert "01_sums.md and .ipynb were both edited" in said
    assert "-Prose with $z$.\n+Prose with $y$." in said
    assert (text.read_bytes(), notebook.read_bytes()) == before
    assert "out of step" in complaint(book, capsys)


def test_same_edit_on_both_sides_is_in_step(book: Path):
    for suffix in (".md", ".ipynb"):
        edit(book / "book" / f"01_sums{suffix}", "Prose with", "Words with")
    assert tool(book, "check") == 1  # the notebook still carries the old text's hash
    assert tool(book, "sync") == 0
    assert tool(book, "check") == 0


def test_edited_module_is_caught_and_not_overwritten(book: Path, capsys):
    module = book / "llama2_lite" / "sums.py"
    edit(module, "LIMIT = 3", "LIMIT = 4")
    said = complaint(book, capsys)
    assert "llama2_lite/sums.py and book/01_sums.md are out of step" in said
    assert "-LIMIT = 3\n+LIMIT = 4" in said
    assert tool(book, "export") == 1
    assert "make pull" in capsys.readouterr().err
    assert "LIMIT = 4" in module.read_text()


def test_edited_export_cell_is_caught_in_the_module(book: Path, capsys):
    edit(book / "book" / "01_sums.md", "LIMIT = 3", "LIMIT = 4")
    assert tool(book, "sync") == 0
    said = complaint(book, capsys)
    assert "-LIMIT = 4\n+LIMIT = 3" in said
    assert "code cell 2 " in said
    assert tool(book, "export") == 0
    assert "LIMIT = 4" in (book / "llama2_lite" / "sums.py").read_text()


def test_output_written_by_hand_is_caught(book: Path, capsys):
    edit(book / "book" / "01_sums.ipynb", '"1.0\\n"', '"2.0\\n"')
    assert "holds an output that `run` did not write" in complaint(book, capsys)


def test_output_of_a_cell_after_the_edited_one_is_stale_too(book: Path, capsys):
    notebook = book / "book" / "01_sums.ipynb"
    edit(book / "book" / "01_sums.md", "LIMIT = 3", "LIMIT = 4")
    assert tool(book, "export") == 0
    edited = nbformat.read(notebook, as_version=4)
    edited.metadata["ran"][1] = fingerprints(edited)[1]  # as if only that cell had run
    nbformat.write(edited, notebook)
    assert "code cell 3 " in complaint(book, capsys)


def test_missing_half_is_made_from_the_other(book: Path, capsys):
    text, notebook = book / "book" / "01_sums.md", book / "book" / "01_sums.ipynb"
    text.unlink()
    assert "01_sums.md is missing" in complaint(book, capsys)
    assert tool(book, "sync") == 0
    assert text.read_text() == HEADER + SUMS
    assert tool(book, "check") == 0
    notebook.unlink()
    assert tool(book, "sync") == 0
    first = notebook.read_bytes()
    notebook.unlink()
    assert tool(book, "sync") == 0
    assert notebook.read_bytes() == first  # cell ids are not random


def test_pull_takes_edits_back_into_their_cells(book: Path):
    module = book / "llama2_lite" / "sums.py"
    edit(module, "math.fsum(values)", "sum(values) * LIMIT")
    edit(module, "# Why this is here.", "# A better reason.")
    edit(module, "json.dumps(self.counts)", 'json.dumps(self.counts) + gettext("!")')
    edit(
        module,
        "Counter()\n\n    def add(",
        "Counter()\n\n    def clear(self) -> None:\n        self.counts.clear()\n\n"
        "    # Once for each.\n    def add(",
    )
    edit(module, "import math\n", "")
    edit(
        module,
        "from collections.abc import",
        "from gettext import gettext\nfrom x import",
    )
    edit(module, "from x import", "from collections.abc import")
    assert tool(book, "pull") == 0
    text = (book / "book" / "01_sums.md").read_text()
    assert "# A better reason.\nLIMIT = 3\n" in text
    assert "    return sum(values) * LIMIT\n```" in text
    assert "import math" not in text
    assert "from collections import Counter\nfrom gettext import gettext\n```" in text
    assert "Prose with $x$." in text
    assert "        self.counts.clear()\n```" in text
    assert "class Bag(Bag):\n    # Once for each.\n    def add(" in text
    assert tool(book, "export") == 0
    assert tool(book, "run") == 0
    assert tool(book, "check") == 0
    assert "sum(values) * LIMIT" in module.read_text()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "class Bag",
            "def more():\n    pass\n\n\nclass Bag",
            "defines `more`, which no",
        ),
        ("LIMIT = 3\n", "", "lacks `LIMIT`, which an export cell"),
        ("def add(", "def put(", "lacks `Bag.add`, which an export cell"),
        ("Sums, by hand.", "Products.", "in a way that cannot be pulled back"),
        ("def total(", "def total((", "sums.py, line 16"),
    ],
)
def test_pull_says_what_it_cannot_do(book: Path, capsys, old, new, sentence):
    text = book / "book" / "01_sums.md"
    module = book / "llama2_lite" / "sums.py"
    before = text.read_text()
    edit(module, old, new)
    edited = module.read_text()
    assert tool(book, "pull") == 1
    assert sentence in capsys.readouterr().err
    assert text.read_text() == before
    assert module.read_text() == edited


def test_chapter_without_export_cells_has_no_module(book: Path, capsys):
    text = book / "book" / "01_sums.md"
    text.write_text(text.read_text().replace(":tags: [export]\n\n", ""))
    assert tool(book, "sync") == 0
    assert "which exports nothing now" in complaint(book, capsys)
    assert tool(book, "export") == 0
    assert not (book / "llama2_lite" / "sums.py").exists()
    (book / "llama2_lite" / "other.py").write_text("")
    assert "llama2_lite/other.py has no chapter" in complaint(book, capsys)


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("x = 1\n" * 25, "has 25 lines; the limit is 24"),
        (EXPORTED + "x = 1\n" * 25, "has 25 lines; the limit is 24"),
        (
            f"{EXPORTED}class A:\n{TWO_METHODS}",
            "'class A:' has 26 lines; the limit is 24",
        ),
        (f"x = '{'y' * 90}'", "has a line of 96 columns"),
        (":tags: [exercise]\n\nx = 1", "no solution stands between"),
        ("import sys\nprint(1, file=sys.stderr)", "writes to stderr"),
        ("object()", "shows a memory address"),
        ("print('x' * 100_000)", "bytes; the limit is 100,000"),
    ],
)
def test_limits(book: Path, capsys, cell, sentence):
    append_cell(book, cell)
    assert tool(book, "run") == 0
    assert sentence in complaint(book, capsys)


def test_docstrings_do_not_count_as_lines(book: Path):
    body = "\n".join(f"    line {n}" for n in range(30))
    cell = f'def f():\n    """Many.\n\n{body}\n    """\n    return 1'
    append_cell(book, cell)
    assert tool(book, "run") == 0
    assert tool(book, "check") == 0


def test_a_single_function_may_be_longer(book: Path):
    """It cannot be split without another module."""
    append_cell(book, f"{EXPORTED}class A:\n{ONE_METHOD}")
    assert tool(book, "export") == 0
    assert tool(book, "run") == 0
    assert tool(book, "check") == 0


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("class Bag(Bag):\n    x = 1\n\n\ny = 2", "but what it adds"),
        ('class Bag(Bag):\n    """More."""\n\n    x = 1', "no docstring of its own"),
        ("class Box(Box):\n    x = 1", "that no export cell before it defines"),
    ],
)
def test_bad_continuation_of_a_class_is_refused(book: Path, capsys, cell, sentence):
    append_cell(book, EXPORTED + cell)
    module = (book / "llama2_lite" / "sums.py").read_text()
    assert tool(book, "export") == 1
    assert sentence in capsys.readouterr().err
    assert (book / "llama2_lite" / "sums.py").read_text() == module


def test_cell_that_fails_leaves_the_notebook_as_it_was(book: Path, capsys):
    notebook = book / "book" / "01_sums.ipynb"
    edit(book / "book" / "01_sums.md", "[0.1] * 10", "1 / 0")
    assert tool(book, "sync") == 0
    before = notebook.read_bytes()
    assert tool(book, "run") == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert notebook.read_bytes() == before


def test_bad_input_is_one_sentence(book: Path, capsys):
    assert tool(book, "sync", "12") == 1
    assert "there is no chapter '12'" in capsys.readouterr().err
    edit(book / "book" / "01_sums.md", "LIMIT = 3", "LIMIT = = 3")
    assert tool(book, "export") == 1
    assert "an exported cell is not Python" in capsys.readouterr().err
    (book / "book" / "01_sums.ipynb").write_text("{")
    assert tool(book, "sync") == 1
    assert "01_sums.ipynb is not a notebook" in capsys.readouterr().err
    (book / "book" / "01_sums.md").write_text("---\njupytext: [\n---\n# Title\n")
    assert tool(book, "sync") == 1
    assert "01_sums.md cannot be read as a chapter" in capsys.readouterr().err


def test_stale_study_is_named(book: Path, capsys):
    from llama2_lite.runtime.artifacts import PACKAGE, write_json, write_result

    script = PACKAGE.parent / "tools" / "export.py"
    result = book / "book" / "results" / "study.json"
    result.parent.mkdir()
    (book / "tools").mkdir()
    shutil.copy(script, book / "tools")
    modules = ["runtime.artifacts"]
    write_result(
        result, config={}, seeds=[0], modules=modules, script=script, results=1
    )
    assert tool(book, "check") == 0
    assert "stale" not in capsys.readouterr().out
    with (book / "tools" / "export.py").open("a") as file:
        file.write("# changed\n")
    assert tool(book, "check") == 0, "to repeat it takes hours"
    said = capsys.readouterr().out
    assert "stale studies, repeat them by `make experiments`:" in said
    assert "results/study.json: tools/export.py, which made it, has changed" in said

    beside = book / "benchmarks" / "results" / "study.json"
    beside.parent.mkdir(parents=True)
    shutil.move(result, beside)
    assert tool(book, "check") == 0
    assert "benchmarks/results/study.json: tools/export.py" in capsys.readouterr().out
    shutil.move(beside, result)

    shutil.copy(script, book / "tools")
    record = export.json.loads(result.read_text())
    write_json(result, record | {"code_hash": "0" * 16})
    assert tool(book, "check") == 0
    said = capsys.readouterr().out
    assert "study.json: code has changed since, in one of runtime.artifacts" in said
    write_json(result, record | {"modules": ["gone"]})
    assert tool(book, "check") == 0
    assert "study.json: llama2_lite has no module 'gone'" in capsys.readouterr().out
    del record["seeds"]
    write_json(result, record)
    assert "study.json lacks seeds" in complaint(book, capsys)


def test_widget_ids_are_numbered():
    random = ["ab" * 16, "cd" * 16]
    state = {name: {"model": f"IPY_MODEL_{random[1]}"} for name in random}
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    notebook = nbformat.v4.new_notebook(metadata={"widgets": widgets})
    text = nbformat.writes(with_plain_widget_ids(notebook))
    assert not any(name in text for name in random)
    assert f"IPY_MODEL_widget{1:026d}" in text


def test_images_do_not_reach_the_text():
    png = base64.b64encode(b"png").decode()
    output = nbformat.v4.new_output("display_data", data={"image/png": png})
    cell = nbformat.v4.new_code_cell("1", outputs=[output])
    text = render(nbformat.v4.new_notebook(cells=[cell]))
    assert text == f"{HEADER}```{{code-cell}} ipython3\n1\n```\n"


def test_every_side_is_caught_in_a_fresh_clone(tmp_path: Path):
    """As committed: what a newcomer gets agrees, and any edit to it is noticed."""
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the project is not a git checkout")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--no-local", ROOT, clone], check=True)

    def said(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "tools/export.py", *arguments]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert said("check") == (0, "")
    chapter = Chapter(clone, "06_attention")
    for path, old, new, complaint in [
        (chapter.text, "# ", "# The ", "are out of step; `make sync`"),
        (chapter.notebook, '"# ', '"# The ', "are out of step; `make sync`"),
        (chapter.module, "import torch\n", "", "out of step; `make export`"),
    ]:
        before = path.read_text()
        path.write_text(before.replace(old, new, 1))
        status, error = said("check", "attention")
        assert status == 1
        assert complaint in error
        path.write_text(before)
    text = chapter.text.read_text()
    asserts = re.search(r"^assert .*\n", text, re.MULTILINE)[0]
    chapter.text.write_text(text.replace(asserts, "assert [\n    True,\n]\n", 1))
    assert said("sync", "attention") == (0, "")
    assert said("check", "attention") == (0, "")  # what prints nothing needs no run
    first_export = "```{code-cell} ipython3\n:tags: [export]\n\n"
    edit_first = chapter.text.read_text().replace(
        first_export, first_export + "import os\n", 1
    )
    chapter.text.write_text(edit_first)
    assert said("sync", "attention") == (0, "")
    status, error = said("check", "attention")
    assert status == 1
    assert "has no output of its own" in error
