"""Each exercise: a blank answer fails its check, the book's own answer passes."""

import copy
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parents[1] / "book"
SOLUTION = re.compile(r"### BEGIN SOLUTION.*?### END SOLUTION", re.DOTALL)


def passes(client: NotebookClient, cell: NotebookNode, index: int) -> bool:
    """Whether a cell runs, and prints what is stored if it says that this counts."""
    stored = [copy.deepcopy(cell.outputs), "nbval-check-output" in cell.metadata.tags]
    cell = copy.deepcopy(cell)
    try:
        client.execute_cell(cell, index)
    except CellExecutionError:
        return False
    return not stored[1] or printed(cell.outputs) == printed(stored[0])


def printed(outputs: list[NotebookNode]) -> str:
    plain = [output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join([output.get("text", "") for output in outputs] + plain)


@pytest.mark.parametrize(
    "path", sorted(BOOK.glob("[0-9]*.ipynb")), ids=lambda p: p.stem
)
def test_exercises(path: Path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    exercises = [cell for cell in notebook.cells if "exercise" in cell.metadata.tags]
    assert len(exercises) >= 2, "a chapter has at least two exercises"

    client = NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(BOOK)}},
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    with client.setup_kernel(env=os.environ | {"OMP_NUM_THREADS": "1"}):
        for index, cell in enumerate(code):
            if cell in exercises:
                blank = copy.deepcopy(cell)
                blank.source, marked = SOLUTION.subn("...", cell.source)
                assert marked, f"no solution is marked in {cell.source!r}"
                answered = passes(client, blank, index)
                answered = answered and passes(client, code[index + 1], index + 1)
                assert not answered, f"a blank answer passes:\n{cell.source}"
            before = code[index - 1]
            if cell in exercises or before in exercises:
                assert passes(client, cell, index), f"does not pass:\n{cell.source}"
            else:
                client.execute_cell(cell, index)
