"""The records of a report's folder: a JSON file per seed (or other group), with every run's record under the run's name."""

import json
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, write_atomic
from expert_merging.run.released_keys import from_released

Groups = dict[str, dict[str, Any]]  # "seed0", or what a corruption is called -> name of a run -> its record
ASIDE = ("experiment.json", "times.json")  # facts beside the records
MARK = "†"  # of records from a tree with uncommitted changes
MARKED = (
    f"{MARK} in the column from: made from a working tree with uncommitted changes, so that no commit gives exactly this "
    "run again."
)


def group_files(folder: Path) -> list[Path]:
    """The files with the records of `folder`, seed by seed."""
    return sorted((path for path in folder.glob("*.json") if path.name not in ASIDE), key=_in_order)


def read(folder: Path) -> Groups:
    """All records in `folder`: its {group}.json, or records/{group}/{run}.json as scripts leave them.

    Raises UserError where there are none, or a file is damaged.
    """
    groups: Groups = {path.stem: read_json(path) for path in group_files(folder)}
    if not groups:
        for path in sorted((folder / "records").glob("*"), key=_in_order):
            groups[path.name] = {file.stem: read_json(file) for file in sorted(path.glob("*.json"))}
    if not any(groups.values()):
        raise UserError(f"{folder} has no records; run the script that makes them first, or name another folder")
    return {group: {run: from_released(record) for run, record in runs.items()} for group, runs in groups.items()}


def published(folder: Path) -> Groups:
    """All records in `folder`, or none where nothing has been published there."""
    return read(folder) if group_files(folder) else {}


def joined(earlier: Groups, new: Groups) -> Groups:
    """Both; of a run that both have, in the same group, the new record."""
    return {group: earlier.get(group, {}) | new.get(group, {}) for group in dict.fromkeys((*earlier, *new))}


def refuse_unlike(found: Groups, elsewhere: str, but: Container[str] = ()) -> None:
    """Raises UserError where records that one table would show were made with different constants, those in `but` aside.
    `elsewhere` names the constant that says where a run's records lie."""
    noted: dict[str, tuple[str, Any]] = {}
    for group, run, record in every(found):
        for name, value in record["identity"].items():
            place, first = noted.setdefault(name, (f"{group}/{run}", value))
            if value != first and name not in but:
                raise UserError(
                    f"{group}/{run} was made with {name} {value}, {place} with {first}; one table would show both: "
                    f"remove one of them, or choose another {elsewhere}"
                )


def write(folder: Path, groups: Groups) -> None:
    """Write {group}.json into `folder`, a line per run, in the order of their names."""
    for group, runs in groups.items():
        lines = [f"{json.dumps(run)}: {json.dumps(record, ensure_ascii=False)}" for run, record in sorted(runs.items())]
        write_atomic(folder / f"{group}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def every(groups: Groups) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(group, run, record) of each record."""
    for group, runs in groups.items():
        for run, record in runs.items():
            yield group, run, record


def commit(record: dict[str, Any]) -> str:
    """The repository's commit that a record was made with, with "-dirty" where the working tree had changes."""
    return record.get("versions", {}).get("commit", "unknown")


def is_dirty(record: dict[str, Any]) -> bool:
    """Whether no commit gives exactly this record again."""
    return commit(record).endswith("-dirty")


def source(groups: Groups, *runs: str) -> str:
    """Which records a row is made of, for a table's column "from": the files of the groups that have all `runs`, and
    the runs; `seed{0,1†}.json: CAEM-8`, where MARK stands at a file whose record is from a tree with changes."""
    names = {
        group: f"{group}{MARK if any(is_dirty(of_group[run]) for run in runs) else ''}"
        for group, of_group in groups.items()
        if set(runs) <= of_group.keys()
    }
    seeds = [name.removeprefix("seed") for group, name in names.items() if group.startswith("seed")]
    files = [name for group, name in names.items() if not group.startswith("seed")]
    if seeds:
        files.insert(0, f"seed{seeds[0]}" if len(seeds) == 1 else f"seed{{{','.join(seeds)}}}")
    return f"{' '.join(f'{file}.json' for file in files)}: {'; '.join(runs)}" if files else ""


def _in_order(path: Path) -> tuple[str, int, str]:
    """Seed 10 after seed 9."""
    number = re.search(r"(\d+)$", path.stem)
    return re.sub(r"\d+$", "", path.stem), int(number[1]) if number else -1, path.stem
