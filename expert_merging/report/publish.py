"""results/: what is put there, made again and checked, and the tables that README and docs show from there."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, write_atomic
from expert_merging.report import folders, records
from expert_merging.report.folders import Wing
from expert_merging.report.index import folders as report_folders
from expert_merging.report.index import index
from expert_merging.report.records import Groups, every, is_dirty
from expert_merging.report.tables import Table
from expert_merging.run import provenance

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_CELLS = re.compile(r"(?<!\\)\|")  # a bar inside a cell is written \|
_PLACE = re.compile(r"(?<![^=])(?:/|~/|\.\./)(?:.*/)?(?=[^/])")  # /home/me/data/ of /home/me/data/squad
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s:]+)\)")


def require_commit(root: Path = provenance.ROOT) -> None:
    """Raises UserError where the working tree at `root` has changes that no commit holds: what it makes is not published."""
    commit = provenance.commit(root)
    if commit == "unknown" or commit.endswith("-dirty"):
        why = "git knows no commit of it" if commit == "unknown" else f"git describes it as {commit}"
        raise UserError(f"{root} has changes that no commit holds ({why}); commit them before you publish")


def publish(
    reports: Mapping[Path, Groups], wing: Wing, beside: Path | None = None, root: Path = provenance.ROOT
) -> list[Table]:
    """Make folders below results/ of records, {folder: its records}, with tables and figures, and bring the pages up to
    date; returns the tables. Of folders outside the repository the commands keep the last name: the rest is nobody's matter.

    Args:
        beside: a folder whose records.ASIDE belong to the records.

    Raises UserError where the working tree, or one that a record was made from, has changes that no commit holds.
    """
    require_commit(root)
    together = [record for groups in reports.values() for record in every(groups)]
    if dirty := [f"{run} of {group}" for group, run, record in together if is_dirty(record)]:
        raise UserError(
            f"{dirty[0]}{f' and {len(dirty) - 1} other records' if dirty[1:] else ''} came from a working tree with "
            "uncommitted changes; make them again from a commit before you publish"
        )
    tables = []
    for folder, groups in reports.items():
        with new_folder(folder) as place:
            records.write(place, _without_places(groups))
            if beside is not None:
                for name in records.ASIDE:
                    if (beside / name).exists():
                        shutil.copyfile(beside / name, place / name)
            tables += folders.write(place, wing, folder.name)
    _refresh(root)
    return tables


def without_places(command: str) -> str:
    """A command line with the last parts of absolute paths alone: where folders lie on a machine is nobody's business."""
    return shlex.join(_PLACE.sub("", word) for word in shlex.split(command))


def _without_places(groups: Groups) -> Groups:
    return {
        group: {run: record | {"command": without_places(record["command"])} for run, record in runs.items()}
        for group, runs in groups.items()
    }


def write(folder: Path, wing: Wing, root: Path = provenance.ROOT) -> list[Table]:
    """Tables, figures and page of a folder again from its records, wherever it is; in results/ as the pages need them."""
    tables = folders.write(folder, wing)
    if folder.resolve().is_relative_to(root / "results"):
        _refresh(root)
    return tables


def command(wing: Wing, collect: Callable[[Path], dict[str, Groups]], words: Sequence[str]) -> None:
    """What a neighbour's `python -m expert_merging.{wing}.report FOLDER [RUN]` does, with an exit status as the scripts'.

    Args:
        collect: the folder of a run -> {folder below FOLDER: its records}; these are published. Raises UserError.
    """
    try:
        if not 1 <= len(words) <= 2:
            raise UserError("give the folder of results, and, to publish its records there first, the folder of a run")
        folder = Path(words[0])
        if len(words) == 2:
            tables = publish({folder / name: groups for name, groups in collect(Path(words[1])).items()}, wing)
        elif not (places := report_folders(folder)):
            raise UserError(f"{folder} has no records; give the folder of a run as well")
        else:
            tables = [table for place in places for table in write(place, wing)]
        for table in tables:
            print(table.markdown())
    except UserError as error:
        print(f"{wing.title}: {error}", file=sys.stderr)
        sys.exit(2)


def remake(root: Path, wings: Mapping[str, Wing]) -> list[Path]:
    """Write tables, figures and page of every folder of results/ again, and the pages that show them; returns the folders."""
    found = [folder for folder, wing in _of_wings(root, wings) if folders.write(folder, wing)]
    _refresh(root)
    return found


def check(root: Path, wings: Mapping[str, Wing]) -> list[str]:
    """What does not follow from the records in results/, a line each: tables, the index, README and docs."""
    wrong = [line for folder, wing in _of_wings(root, wings) for line in folders.check(folder, wing)]
    contents = root / "results" / "README.md"
    if not contents.exists() or contents.read_text(encoding="utf-8") != index(root / "results"):
        wrong.append(f"{contents} does not say what the records in results/ do")
    for page in _pages(root):
        text = page.read_text(encoding="utf-8")
        try:
            if filled(text, root) != text:
                wrong.append(f"{page} shows other tables than the files that it names")
        except UserError as error:
            wrong.append(f"{page}: {error}")
        wrong += [f"{page} shows {path}, which is not there" for path in _images(page) if not path.exists()]
    return wrong


def filled(text: str, root: Path) -> str:
    """A Markdown page with each table between `<!-- table: path -->` and `<!-- end -->` taken from its file."""

    def table(found: re.Match) -> str:
        path = root / found[2]
        if not path.exists():
            raise UserError(f"a page asks for the table {found[2]}, which is not there")
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.startswith("|")]
        if rows and rows[0].endswith("| from |"):
            rows = ["|".join(_CELLS.split(row)[:-2]) + "|" for row in rows]
        return f"{found[1]}{chr(10).join(rows)}\n{found[3]}"

    return _TABLE.sub(table, text)


def _of_wings(root: Path, wings: Mapping[str, Wing]) -> Iterator[tuple[Path, Wing]]:
    """(folder, wing) of each folder with records; results/{name of a wing}/... belongs to that wing."""
    results = root / "results"
    for folder in report_folders(results):
        name = folder.relative_to(results).parts[0]
        if name not in wings:
            raise UserError(f"{folder} is below none of results/{{{','.join(wings)}}}; move it there")
        yield folder, wings[name]


def _refresh(root: Path) -> None:
    """The index, the pages' tables, and of the PNG files those that a page shows."""
    write_atomic(root / "results" / "README.md", index(root / "results"))
    pages = _pages(root)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text, root)) != text:
            write_atomic(page, new)
    shown = {path for page in pages for path in _images(page)}
    for path in (root / "results").rglob("*.png"):
        if path.resolve() not in shown:
            path.unlink()


def _pages(root: Path) -> list[Path]:
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]


def _images(page: Path) -> list[Path]:
    """The images of the repository that a page shows."""
    return [(page.parent / name).resolve() for name in _IMAGE.findall(page.read_text(encoding="utf-8"))]
