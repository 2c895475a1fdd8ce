"""results/README.md: which command, seeds and commit made each record."""

import re
from pathlib import Path
from typing import Any

from expert_merging.report import records
from expert_merging.report.tables import Table

_TEXT = """# Results

What the pages of this repository show, and the records that it follows from. A folder is an experiment:

- `seed0.json`, `seed1.json`, ...: a line per run, `"name of the run": its record`. Each record holds its scores, its
  constants, the command, the versions of the libraries and the commit that made it.
- `tables/`: the tables as Markdown; the column `from` names the file and the runs that a row is made of.
- `figures/`: those that a page shows.

`python reproduce_tables.py --check` says whether every table here and in the pages follows from the records (the tests run it).
`python reproduce_tables.py --report` makes everything again from the records, and beside it what is not kept here: every
table as CSV and LaTeX, all figures as SVG where there are some, and a `report.html` in each folder.

This file is written by the same commands. Commands stand here as they were typed, without the seed, in the repository as it was
at the commit named; the scripts of the neighbours have moved to `neighbours/` since, and compare_models.py,
count_expert_usage.py and reference_scores.py to `tools/`.

"""


def folders(results: Path) -> list[Path]:
    """The folders below `results` that hold records."""
    return sorted(path for path in (results, *results.rglob("*")) if path.is_dir() and records.group_files(path))


def index(results: Path) -> str:
    """The page, from all the records below `results`."""
    groups = {folder: records.read(folder) for folder in folders(results)}
    every = [record for of_folder in groups.values() for _, _, record in records.every(of_folder)]
    dirty = sum(map(records.is_dirty, every))
    text = _TEXT
    if dirty:
        text += (
            f"**{dirty} of the {len(every)} records were made from a working tree with uncommitted changes** (commits that end "
            f"in `-dirty` below; {records.MARK} in the tables' column `from`): no commit gives exactly these runs again. "
            "Publishing such records is refused now.\n\n"
        )
    return text + "\n".join(_table(folder.relative_to(results), of_folder) for folder, of_folder in groups.items())


def _table(folder: Path, groups: records.Groups) -> str:
    """A row for the runs of one command and commit."""
    origins: dict[tuple[str, str], dict[str, list[str]]] = {}
    for group, run, record in records.every(groups):
        origin = (_without_seed(record), records.commit(record))
        origins.setdefault(origin, {}).setdefault(run, []).append(group.removeprefix("seed"))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for origin, runs in origins.items():
        for run, seeds in runs.items():
            rows.setdefault((*origin, " ".join(seeds)), []).append(run)
    table = Table(f"{folder}", f"{folder}", f"{sum(map(len, groups.values()))} records.")
    for (command, commit, of_seeds), names in sorted(rows.items(), key=lambda row: row[1]):
        mark = f" {records.MARK}" if commit.endswith("-dirty") else ""
        table.rows.append({
            "runs": ", ".join(names), "command": f"`{command}`", "seeds": of_seeds, "commit": commit + mark,
        })  # fmt: skip
    return table.markdown()


def _without_seed(record: dict[str, Any]) -> str:
    return re.sub(r" --seeds?( \d+)+", "", record.get("command", "unknown"))
