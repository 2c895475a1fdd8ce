"""From records to results/: copied, checked against their tables, and put into README and docs."""

import re
import shutil
from pathlib import Path

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, write_atomic, write_json
from expert_merging.report import caem_tables
from expert_merging.report.tables import Table

# What changes from run to run: left out of what `check` compares.
_TIMES = ("cost",)
_README_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def collect(
    folder: Path, scale: str, sizes: tuple[int, int], tasks: tuple[str, ...], files: dict[int, dict[str, Path]]
) -> None:
    """Copy the results of runs, {seed: {name: file}}, as they are, into `folder`/records."""
    with new_folder(folder / "records") as records:
        facts = {"scale": scale, "seeds": list(files), "experts_num": sizes[0], "larger_experts_num": sizes[1]}
        write_json(records / "experiment.json", facts | {"tasks": list(tasks)})
        for seed, of_seed in files.items():
            (records / f"seed{seed}").mkdir()
            for name, path in of_seed.items():
                shutil.copyfile(path, records / f"seed{seed}" / caem_tables.file_name(name))


def check(folder: Path) -> list[str]:
    """What in `folder`/tables is not what its records give, a line each; times aside. Raises UserError for no report."""
    wrong = []
    for table in caem_tables.all_tables(caem_tables.read(folder)):
        for name, text in texts(table).items():
            path = folder / "tables" / name
            if table.name not in _TIMES and (not path.exists() or path.read_text(encoding="utf-8") != text):
                wrong.append(
                    f"{path} {'differs from' if path.exists() else 'is missing; it follows from'} {folder}/records"
                )
    return wrong


def publish(folder: Path, results: Path) -> None:
    """Make `results` (results/{scale} in the repository) a copy of the report, and put its tables into README and docs."""
    with new_folder(results) as place:
        shutil.copytree(folder, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.svg"))
    root = results.parent.parent
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        write_atomic(path, filled(path.read_text(encoding="utf-8"), root))


def filled(text: str, root: Path) -> str:
    """A Markdown page with each table between `<!-- table: path -->` and `<!-- end -->` taken from its file."""

    def table(found: re.Match) -> str:
        path = root / found[2]
        if not path.exists():
            raise UserError(f"a page asks for the table {found[2]}, which is not there")
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.startswith("|")]
        if rows[0].endswith("| from |"):
            rows = [row.rsplit("|", 2)[0] + "|" for row in rows]
        return f"{found[1]}{chr(10).join(rows)}\n{found[3]}"

    return _README_TABLE.sub(table, text)


def texts(table: Table) -> dict[str, str]:
    """A table in each format, {file name: content}."""
    return {f"{table.name}.md": table.markdown(), f"{table.name}.csv": table.csv(), f"{table.name}.tex": table.latex()}
