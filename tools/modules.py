"""A chapter's module: exported from its cells, and pulled back into them."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from nbformat import NotebookNode
from notebooks import (
    Chapter,
    Problem,
    code_cells,
    diff,
    digest,
    load,
    parse,
    render,
    save,
    write,
)

IMPORTS = (ast.Import, ast.ImportFrom)
Alias = tuple[str | None, str, str | None]  # from, import, as


# From chapter to module


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    cells = code_cells(notebook)
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


def syntax(chapter: Chapter, source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise Problem(
            f"book/{chapter.stem}.md: an exported cell is not Python: "
            f"{error.msg}: {line!r}"
        ) from error


def module_source(chapter: Chapter, notebook: NotebookNode) -> str | None:
    """The module that a chapter exports, or None if it exports nothing."""
    cells = tagged(notebook, "export")
    if not cells:
        return None
    headings = [
        line.removeprefix("# ")
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("# ")
    ]
    if not headings:
        raise Problem(f"book/{chapter.stem}.md has no title: start it with '# Title'")
    title = headings[0].replace("`", "").rstrip(".")
    docstring = (
        f'"""{title}.\n\nExported from book/{chapter.stem}.md, which explains every '
        'part. Edit it there,\nthen `make export`.\n"""'
    )
    imports: list[str] = []
    bodies: list[str] = []
    for cell in cells:
        statements = syntax(chapter, cell.source).body
        above, rest = split_imports(cell.source, statements)
        imports.append(above)
        if any(map(is_continued, statements)):
            continue_class(chapter, bodies, rest)
        else:
            bodies.append(rest)
    text = "\n\n\n".join([docstring, "\n".join(imports), *filter(None, bodies)])
    return tidy(chapter, text)


def split_imports(source: str, statements: list[ast.stmt]) -> tuple[str, str]:
    """The lines of a cell that import, and the others."""
    lines = source.splitlines()
    above = []
    for statement in statements:
        if isinstance(statement, IMPORTS):
            span = slice(statement.lineno - 1, statement.end_lineno)
            above += lines[span]
            lines[span] = [""] * len(lines[span])
    return "\n".join(above), "\n".join(lines).strip("\n")


def is_continued(statement: ast.stmt) -> bool:
    """Whether it is a class of its own name, which takes a class up again: X(X)."""
    if not isinstance(statement, ast.ClassDef) or len(statement.bases) != 1:
        return False
    base = statement.bases[0]
    return isinstance(base, ast.Name) and base.id == statement.name


def continue_class(chapter: Chapter, bodies: list[str], source: str) -> None:
    """Put what a cell adds to a class behind what earlier cells have of it."""
    statements: list[Any] = ast.parse(source).body
    first = source.partition("\n")[0]
    added = statements[-1]
    if len(statements) > 1 or not source.startswith("class ") or is_text(added.body[0]):
        raise Problem(
            f"book/{chapter.stem}.md: the cell {first!r} continues a class, so that it "
            "can hold nothing but what it adds, and no docstring of its own"
        )
    for number, body in enumerate(bodies):
        for statement in ast.parse(body).body:
            if isinstance(statement, ast.ClassDef) and statement.name == added.name:
                lines = body.splitlines()
                more = source.splitlines()[added.lineno :]
                lines[statement.end_lineno : statement.end_lineno] = ["", *more]
                bodies[number] = "\n".join(lines)
                return
    raise Problem(
        f"book/{chapter.stem}.md: the cell {first!r} continues a class that no export "
        "cell before it defines"
    )


def tidy(chapter: Chapter, text: str) -> str:
    """Sort and merge imports, then format: what ruff makes of a module."""
    name = chapter.module
    for command in (["check", "--select=I", "--fix-only", "--quiet"], ["format"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, f"--stdin-filename={name}", "-"],
            input=text,
            cwd=chapter.root,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Problem(f"book/{chapter.stem}.md: {done.stderr.strip()}")
        text = done.stdout
    return text


def export(chapter: Chapter) -> str | None:
    """Write the module of a chapter; returns what was done, if anything was.

    Raises:
        Problem: if the module was edited since it was written, which would be lost.
    """
    notebook = load(chapter)
    source = module_source(chapter, notebook)
    module = chapter.module.relative_to(chapter.root)
    now = chapter.module.read_text("utf-8") if chapter.module.exists() else None
    if source is None and not is_export_of(chapter):
        return None
    last = notebook.metadata.get("module_hash")
    if now not in (None, source) and last and last != digest(now):
        raise Problem(
            f"{module} was edited since it was exported: `make pull` takes that over "
            f"into book/{chapter.stem}.md; or delete {module} and export again"
        )
    if source is None:
        chapter.module.unlink()
        return f"{module} removed: its chapter exports nothing any more"
    if now != source:
        write(chapter.module, source)
    notebook.metadata["module_hash"] = digest(source)
    save(chapter, notebook)
    return f"{module} written" if now != source else None


def is_export_of(chapter: Chapter) -> bool:
    sign = f"Exported from book/{chapter.stem}.md"
    return chapter.module.exists() and sign in chapter.module.read_text("utf-8")


# From module to chapter


Spans = dict[tuple[str, int], tuple[int, int]]


def definitions(source: str, cuts: Collection[str] = ()) -> Spans:
    """Top-level statements other than imports: (name, which of that name) -> lines.

    The first line is the first of the comments above it, and lines count from 0. A
    class is cut before each of its members that ``cuts`` names, as Class.member; what
    follows has that name, as what a cell that continues the class adds to it.
    """
    lines = source.splitlines()
    found: Spans = {}
    seen: Counter[str] = Counter()

    def add(name: str, start: int, end: int) -> None:
        found[name, seen[name]] = (start, end)
        seen[name] += 1

    for statement, start in starts(lines, ast.parse(source).body):
        end = statement.end_lineno or statement.lineno
        if isinstance(statement, IMPORTS) or is_text(statement):
            continue
        name = owner = name_of(statement)
        body = statement.body if isinstance(statement, ast.ClassDef) else []
        if is_continued(statement):
            name, start = f"{owner}.{name_of(body[0])}", statement.lineno
        for member, line in starts(lines, body, statement.lineno):
            if (cut := f"{owner}.{name_of(member)}") in cuts:
                before = line
                while not lines[before - 1].strip():
                    before -= 1
                add(name, start, before)
                name, start = cut, line
        add(name, start, end)
    return found


def starts(
    lines: list[str], statements: list[ast.stmt], end: int = 0
) -> Iterator[tuple[ast.stmt, int]]:
    """Statements with the first lines after ``end`` that belong to them."""
    for statement in statements:
        start = end
        while not lines[start].strip():
            start += 1
        yield statement, start
        end = statement.end_lineno or statement.lineno


def name_of(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Assign):
        return " = ".join(ast.unparse(target) for target in statement.targets)
    if isinstance(statement, ast.AnnAssign):
        return ast.unparse(statement.target)
    return getattr(statement, "name", ast.unparse(statement).split("\n")[0])


def is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def imported(source: str) -> list[Alias]:
    names: list[Alias] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names += [(None, alias.name, alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(node.module, alias.name, alias.asname) for alias in node.names]
    return names


def pull(chapter: Chapter) -> str | None:
    """Take what was edited in a module over into the chapter's export cells.

    Raises:
        Problem: if the module defines something that no cell holds, lacks something
            that one does, or differs in another way that cannot be pulled back.
    """
    module = chapter.module.relative_to(chapter.root)
    notebook = parse(chapter)[1]
    before = module_source(chapter, notebook)
    if before is None or not chapter.module.exists():
        return None
    edited = chapter.module.read_text(encoding="utf-8")
    if edited == before:
        return None
    cells = tagged(notebook, "export")
    cuts = {name for cell in cells for name, _ in definitions(cell.source)}
    try:
        after = definitions(edited, cuts)
    except SyntaxError as error:
        raise Problem(f"{module}, line {error.lineno}: {error.msg}") from error
    held = definitions(before, cuts).keys()
    for names, what in [
        (after.keys() - held, "defines {}, which no export cell"),
        (held - after.keys(), "lacks {}, which an export cell"),
    ]:
        if names:
            listed = ", ".join(sorted({f"`{name}`" for name, _ in names}))
            raise Problem(
                f"{module} {what.format(listed)} of book/{chapter.stem}.md holds; "
                "change the chapter's cell by hand, then pull again"
            )

    pull_definitions(cells, edited, after)
    pull_imports(chapter, cells, imported(edited))
    wanted, got = tidy(chapter, edited), module_source(chapter, notebook) or ""
    if wanted != got:
        raise Problem(
            f"{module} differs from book/{chapter.stem}.md in a way that cannot be "
            "pulled back (order, docstring, loose comments); edit the chapter\n"
            + diff(got, wanted, f"book/{chapter.stem}.md", str(module))
        )
    write(chapter.module, wanted)
    write(chapter.text, render(notebook))
    return f"book/{chapter.stem}.md: {module} pulled back into its cells"


def pull_definitions(
    cells: list[NotebookNode],
    edited: str,
    after: Spans,
) -> None:
    new_lines = edited.splitlines()
    seen: Counter[str] = Counter()
    for cell in cells:
        lines = cell.source.splitlines()
        spans = {}
        for (name, _), span in definitions(cell.source).items():
            spans[name, seen[name]] = span
            seen[name] += 1
        for key, (start, end) in reversed(spans.items()):
            lines[start:end] = new_lines[slice(*after[key])]
        cell.source = "\n".join(lines)


def pull_imports(
    chapter: Chapter, cells: list[NotebookNode], wanted: list[Alias]
) -> None:
    """Drop imports that the module lost; put new ones where the first imports are."""
    here = {alias for cell in cells for alias in imported(cell.source)}
    if here == set(wanted):
        return
    new = [alias for alias in wanted if alias not in here]
    first = next((cell for cell in cells if imported(cell.source)), cells[0])
    for cell in cells:
        old = imported(cell.source)
        keep = [alias for alias in old if alias in wanted]
        if cell is first:
            keep += new
        if keep == old:
            continue
        lines = []
        for origin, name, nickname in keep:
            line = f"from {origin} import {name}" if origin else f"import {name}"
            lines.append(line + (f" as {nickname}" if nickname else ""))
        _, rest = split_imports(cell.source, ast.parse(cell.source).body)
        text = tidy(chapter, "\n".join([*lines, "", rest]))
        cell.source = text.strip("\n")
