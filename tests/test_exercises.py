"""Each exercise: a blank answer fails its check, the book's own answer passes."""

import ast
import copy
import dis
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
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


def names_inside(code: CodeType) -> Iterator[str]:
    """Global names that the functions and classes of a piece of code use."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for step in dis.get_instructions(inner):
                if step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                    yield step.argval
            yield from names_inside(inner)


MODULES = {"torch", "np", "plt", "F"}  # calls of their functions change nothing of ours


def names_changed(tree: ast.Module) -> Iterator[str]:
    """Names in calls such as ``trainer.fit(module)``, which may change them."""
    for line in tree.body:
        match line:
            case ast.Expr(ast.Call(func=ast.Attribute() as called)):
                if MODULES.isdisjoint(names_in(called)):
                    yield from names_in(line)


def names_in(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def names_of(source: str) -> tuple[set[str], set[str], set[str]]:
    """Names that a cell needs, that its functions need when called, that it sets."""
    tree = ast.parse(TransformerManager().transform_cell(source))  # without magics
    code = compile(tree, "cell", "exec")
    needed: set[str] = set()
    made: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_NAME" and step.argval not in made:
            needed.add(step.argval)
        if step.opname == "STORE_NAME":
            made.add(step.argval)
    inside = set(names_inside(code)) - made
    return needed, inside, made | set(names_changed(tree))


def cells_behind(code: list[NotebookNode], exercises: list[NotebookNode]) -> set[int]:
    """The exercises, the checks behind them, and the cells from which these have names.

    The others are executed by nbval, and some of them take minutes.
    """
    names = [names_of(cell.source) for cell in code]
    chosen: set[int] = set()
    called: set[str] = set()  # may be set after the function that needs them
    while True:
        before, wanted = set(chosen), set()
        for index in reversed(range(len(code))):
            needed, inside, made = names[index]
            is_asked = code[index] in exercises or code[index - 1] in exercises
            if is_asked or made & (wanted | called):
                chosen.add(index)
                wanted = (wanted - made) | needed
                called |= inside
        if chosen == before:
            return chosen


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
        for index in sorted(cells_behind(code, exercises)):
            cell = code[index]
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
