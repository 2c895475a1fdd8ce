"""Where raw examples come from: the hub, a local folder in the published format, or a folder saved by `datasets`.

A row that is broken is never skipped: it is a UserError that names its file and line.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_merging.errors import UserError
from expert_merging.hub import first_line, local_folder, offline_if_unreachable

Example = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """How a data set is published: what a loader has to know of it."""

    constant: str  # the constant that says where it lies, e.g. SQUAD_PATH
    files: dict[str, str]  # split -> file name in a local folder
    read: Callable[[Path], Iterator[tuple[str, Example]]]  # file -> (where in the file, example)
    columns: tuple[str, ...]  # of an example, as on the hub
    complaint: Callable[[Example], str | None]  # what is wrong with an example, if anything


def load_splits(path: str, published: Published) -> dict[str, Any]:
    """{split: datasets.Dataset} for the splits in `published.files`, with the columns `published.columns`.

    `path` is a hub name or a folder that holds the published files, parquet files as on the hub, or a DatasetDict
    saved by `save_to_disk`. Raises UserError for anything absent, unreadable or broken.
    """
    folder = local_folder(path, published.constant)
    if folder is None:
        return _checked(_from_hub(path, published), path, published)
    if (folder / "dataset_dict.json").exists():
        return _checked(_from_disk(folder), path, published)
    if any((folder / name).exists() for name in published.files.values()):
        return _from_published_files(folder, published)
    if parquet := sorted(folder.rglob("*.parquet")):
        return _checked(_from_parquet(folder, parquet, published), path, published)
    raise UserError(
        f"{published.constant}: the folder {path} holds neither {_listed(published.files.values())}, "
        "nor parquet files, nor a DatasetDict saved by `datasets`"
    )


# -- formats of the published files


def read_ag_news_csv(file: Path) -> Iterator[tuple[str, Example]]:
    """AG News: class index 1-4, title, description; a header or none. Text is title and description with a space
    between, as on the hub, where backslashes stay as they are too."""
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    line = 1
    try:
        for number, row in enumerate(reader):
            where, line = f"line {line}", reader.line_num + 1
            if not row or (number == 0 and row[0].strip().lower() in ("class index", "class", "label")):
                continue
            if len(row) != 3:
                raise UserError(f"{file}, {where}: {len(row)} fields; there must be class index, title, description")
            if row[0].strip() not in ("1", "2", "3", "4"):
                raise UserError(f"{file}, {where}: the class index is {row[0]!r}; it must be 1, 2, 3 or 4")
            yield where, {"text": f"{row[1]} {row[2]}", "label": int(row[0]) - 1}
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not a row of a CSV file ({error})") from error


def read_squad_json(file: Path) -> Iterator[tuple[str, Example]]:
    """SQuAD v1.1: {"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text"}]}]}]}]}."""
    where = "at the top"
    try:
        content = json.loads(_text(file))
        for a, article in enumerate(content["data"], 1):
            where = f"article {a}"
            for p, paragraph in enumerate(article["paragraphs"], 1):
                where = f"article {a}, paragraph {p}"
                context = paragraph["context"]
                for q, qa in enumerate(paragraph["qas"], 1):
                    where = f"article {a}, paragraph {p}, question {q}"
                    answers = {"text": [answer["text"] for answer in qa["answers"]]}
                    yield where, {"question": qa["question"], "context": context, "answers": answers}
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not whole JSON ({error.msg})") from error
    except KeyError as error:
        raise UserError(f"{file}, {where}: no field {error}; is this SQuAD v1.1?") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{file}, {where}: not built as SQuAD v1.1 is ({first_line(error)})") from error


def read_jsonl(file: Path) -> Iterator[tuple[str, Example]]:
    """One JSON object a line; blank lines are passed over."""
    for number, line in enumerate(_text(file).split("\n"), 1):  # splitlines would also split at U+2028, inside a string
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not whole JSON ({error.msg})") from error
        if not isinstance(example, dict):
            raise UserError(f"{file}, line {number}: not a JSON object")
        yield f"line {number}", example


def not_text(example: Example, *columns: str) -> str | None:
    """A complaint about the first of `columns` that the example lacks or that is no string."""
    for column in columns:
        if column not in example:
            return f"no field {column!r}"
        if not isinstance(example[column], str):
            return f"the field {column!r} is no text but {example[column]!r:.40}"
    return None


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    if not content.strip():
        raise UserError(f"{file} is empty")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from error


# -- the four places


def _from_published_files(folder: Path, published: Published) -> dict[str, Any]:
    from datasets import Dataset

    absent = [name for name in published.files.values() if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{published.constant}: {folder} lacks {_listed(absent)}")
    splits = {}
    for split, name in published.files.items():
        columns: dict[str, list] = {column: [] for column in published.columns}
        for where, example in published.read(folder / name):
            if complaint := published.complaint(example):
                raise UserError(f"{folder / name}, {where}: {complaint}")
            for column, values in columns.items():
                values.append(example[column])
        splits[split] = Dataset.from_dict(columns)
        if len(splits[split]) == 0:
            raise UserError(f"{folder / name} holds no examples")
    return splits


def _from_parquet(folder: Path, files: list[Path], published: Published) -> dict[str, Any]:
    """Parquet files tell their split by name or folder: train-00000-of-00002.parquet, default/train/0000.parquet."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    splits = {}
    for split in published.files:
        of_split = [file for file in files if _split_of(file.relative_to(folder), published) == split]
        promised = {int(m[1]) for file in of_split if (m := re.search(r"-of-(\d+)", file.stem))}
        if promised and promised != {len(of_split)}:
            raise UserError(f"{folder}: {len(of_split)} parquet files of the split {split}, of {max(promised)}")
        if of_split:
            try:
                tables = [pyarrow.parquet.read_table(file) for file in of_split]
                table = pyarrow.concat_tables(tables)
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                raise UserError(f"{folder}: the parquet files of the split {split}: {first_line(error)}") from error
            splits[split] = Dataset(table.replace_schema_metadata(None))
    return splits


def _split_of(file: Path, published: Published) -> str | None:
    words = [word for part in file.parts for word in re.split(r"[^a-z]+", part.lower())]
    return next((word for word in reversed(words) if word in published.files), None)


def _from_disk(folder: Path) -> dict[str, Any]:
    import pyarrow
    from datasets import DatasetDict

    try:
        return DatasetDict.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"{folder} is not a whole DatasetDict ({first_line(error)}); save it again") from error


def _from_hub(name: str, published: Published) -> dict[str, Any]:
    offline_if_unreachable()
    import datasets

    try:
        try:
            return datasets.load_dataset(name)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub keeps a parquet copy of each data set that is published as a script, XSum among them.
            return datasets.load_dataset(name, revision="refs/convert/parquet")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{published.constant}: {name} is no folder here and cannot be had from the hub ({first_line(error)}); "
            f"bring a folder with {_listed(published.files.values())} and give --{published.constant} FOLDER"
        ) from error


def _checked(splits: dict[str, Any], path: str, published: Published) -> dict[str, Any]:
    """The wanted splits and columns of tables from elsewhere, every row looked at."""
    for split in published.files:
        if split not in splits or len(splits[split]) == 0:
            raise UserError(f"{published.constant}: {path} has no split {split!r}, or an empty one")
        absent = set(published.columns) - set(splits[split].column_names)
        if absent:
            raise UserError(f"{published.constant}: split {split} of {path} has no column {_listed(sorted(absent))}")
    chosen = {split: splits[split].select_columns(list(published.columns)) for split in published.files}
    for split, dataset in chosen.items():
        for number, example in enumerate(dataset, 1):
            if complaint := published.complaint(example):
                raise UserError(f"{published.constant}: {path}, split {split}, row {number}: {complaint}")
    return chosen


def _listed(names) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
