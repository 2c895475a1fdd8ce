"""A report's folder: records go in; tables, figures and a page come out, and can be checked against the records."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_merging.core.files import new_folder, write_atomic
from expert_merging.report import records
from expert_merging.report.page import page
from expert_merging.report.tables import Table, save, texts


@dataclass(frozen=True)
class Wing:
    """What a method's wing of the library shows of its records.

    Attributes:
        title: what its page is called.
        read: folder -> the records in it, as the other two take them. Raises UserError where there are none.
        tables: those -> the tables; a row's "from" is by `records.source`.
        draw: those, a folder -> draws the figures there, as PNG and perhaps SVG; returns {name: caption}.
    """

    title: str
    read: Callable[[Path], Any]
    tables: Callable[[Any], list[Table]]
    draw: Callable[[Any, Path], dict[str, str]]


def write(folder: Path, wing: Wing, name: str = "") -> list[Table]:
    """Write tables/ (.md, .csv, .tex), figures/ and report.html into `folder` from the records there; returns the tables.

    Args:
        name: of the experiment, for the page; by itself the folder's.

    Raises UserError where there are no records.
    """
    found = wing.read(folder)
    tables = _tables(found, wing)
    with new_folder(folder / "tables") as place:
        save(tables, place)
    with new_folder(folder / "figures") as place:
        captions = wing.draw(found, place)
    title = f"{wing.title}: {name or (folder.parent.name if folder.name == 'report' else folder.name)}"
    write_atomic(folder / "report.html", page(title, records.read(folder), tables, captions, folder))
    return tables


def check(folder: Path, wing: Wing) -> list[str]:
    """What in `folder`/tables is not what its records give, a line each. Raises UserError where there are no records.

    The Markdown must be there; CSV and LaTeX, which results/ does not keep, only be right where they are.
    """
    wrong: list[str] = []
    expected: dict[str, str] = {}
    for table in _tables(wing.read(folder), wing):
        expected |= texts(table)
    for name, text in expected.items():
        path = folder / "tables" / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            wrong.append(f"{path} differs from what the records in {folder} give")
        elif not path.exists() and name.endswith(".md"):
            wrong.append(f"{path} is missing; it follows from the records in {folder}")
    strangers = {path for path in (folder / "tables").glob("*") if path.name not in expected}
    return [*wrong, *(f"{path} is no table that the records in {folder} give" for path in sorted(strangers))]


def _tables(found: Any, wing: Wing) -> list[Table]:
    """The tables; a note says what the mark means where a row has it."""
    tables = wing.tables(found)
    for table in tables:
        if any(records.MARK in str(row.get("from", "")) for row in table.rows):
            table.note += f" {records.MARKED}"
    return tables
