"""Where raw examples come from: the hub, a local folder in the published format, or a folder saved by `datasets`.

A row that is broken is never skipped or mended: a UserError counts such rows and names the first by file and line. Broken
is what lacks a field, has one of another kind, a label out of range, text that is no Unicode, or the id of an earlier row.
Empty texts are not broken: they stand in the published data, and features.py counts them.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.hub import first_line, local_folder, offline_if_unreachable

Example = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """How a data set is published: what a loader has to know of it."""

    constant: str  # the constant that says where it lies, e.g. SQUAD_PATH
    files: dict[str, str]  # split -> file name in a local folder
    read: Callable[[Path], Iterator[tuple[str, Example | str]]]  # file -> (where in it, example or what is wrong there)
    columns: tuple[str, ...]  # of an example, as on the hub
    complaint: Callable[[Example], str | None]  # what is wrong with an example, if anything


def load_splits(path: str, published: Published) -> dict[str, Any]:
    """{split: datasets.Dataset} for the splits in `published.files`, with the columns `published.columns`.

    `path` is a hub name or a folder that holds the published files, parquet files as on the hub, or a DatasetDict
    saved by `save_to_disk`. Raises UserError for anything absent, unreadable or broken.
    """
    folder = local_folder(path, published.constant)
    if folder is None:
        remedy = f"bring a folder with {_listed(published.files.values())} and give --{published.constant} FOLDER"
        return _checked(from_hub(path, published.constant, remedy), path, published)
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


def read_ag_news_csv(file: Path) -> Iterator[tuple[str, Example | str]]:
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
                yield where, f"{len(row)} fields; there must be class index, title, description"
            elif row[0].strip() not in ("1", "2", "3", "4"):
                yield where, f"the class index is {row[0]!r:.40}; it must be 1, 2, 3 or 4"
            else:
                yield where, {"text": f"{row[1]} {row[2]}", "label": int(row[0]) - 1}
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not a row of a CSV file ({error})") from error


def read_squad_json(file: Path) -> Iterator[tuple[str, Example | str]]:
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
                    example = {"question": qa["question"], "context": context, "answers": answers}
                    yield where, example | ({"id": qa["id"]} if "id" in qa else {})
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not whole JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets within brackets
        raise UserError(f"{file}: no JSON that can be read ({first_line(error)})") from error
    except KeyError as error:
        raise UserError(f"{file}, {where}: no field {error}; is this SQuAD v1.1?") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{file}, {where}: not built as SQuAD v1.1 is ({first_line(error)})") from error


def read_jsonl(file: Path) -> Iterator[tuple[str, Example | str]]:
    """One JSON object a line; blank lines are passed over."""
    for number, line in enumerate(_text(file).split("\n"), 1):  # splitlines would also split at U+2028, inside a string
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            found = content if isinstance(content, dict) else "not a JSON object"
        except (ValueError, RecursionError) as error:
            found = f"not whole JSON ({getattr(error, 'msg', first_line(error))})"
        yield f"line {number}", found


def not_text(example: Example, *columns: str) -> str | None:
    """A complaint about the first of `columns` that the example lacks or that is no string."""
    for column in columns:
        if column not in example:
            return f"no field {column!r}"
        if not isinstance(example[column], str):
            return f"the field {column!r} is no text but {example[column]!r:.40}"
        if complaint := not_unicode(example[column]):
            return f"the field {column!r} {complaint}"
    return None


def not_unicode(text: str) -> str | None:
    """A complaint about half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character at position {error.start}"
    return None


class _Complaints:
    """What is wrong in a split: counted, the first few kept; ids that come twice are found."""

    def __init__(self, place: str, published: Published):
        self.place, self.published, self.count = place, published, 0
        self.first: list[str] = []
        self.seen: dict[Any, str] = {}

    def about(self, where: str, example: Example | str) -> bool:
        """Whether the example is broken."""
        if isinstance(example, str):
            complaint: str | None = example
        else:
            complaint = self.published.complaint(example)
            if not complaint and isinstance(identity := example.get("id"), str | int):
                if (earlier := self.seen.setdefault(identity, where)) != where:
                    complaint = f"the id {identity!r:.40} is that of {earlier}"
        if complaint:
            self.count += 1
            self.first += [f"{where}: {complaint}"][: 3 - len(self.first)]
        return bool(complaint)

    def refuse(self) -> None:
        """Raises UserError where there were any."""
        if self.count:
            more = f" (and {self.count - len(self.first)} more broken rows)" if self.count > len(self.first) else ""
            raise UserError(f"{self.place}, {'; '.join(self.first)}{more}")


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
        complaints = _Complaints(str(folder / name), published)
        for where, example in published.read(folder / name):
            if not complaints.about(where, example):
                assert not isinstance(example, str)  # which is a complaint
                for column, values in columns.items():
                    values.append(example[column])
        complaints.refuse()
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
            try:
                splits[split] = Dataset(table.replace_schema_metadata(None))
            except (ValueError, TypeError, KeyError, NotImplementedError, pyarrow.ArrowException) as error:
                raise UserError(f"{folder}: the columns of the split {split}: {first_line(error)}") from error
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


def from_hub(name: str, constant: str, remedy: str, config: str = "", **which: str) -> Any:
    """What `datasets.load_dataset` gives, of one configuration; `which` may name a split.

    Raises UserError, about `constant` and with the `remedy`, where it cannot be had.
    """
    offline_if_unreachable()
    import datasets

    try:
        try:
            return datasets.load_dataset(name, *([config] if config else []), **which)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub keeps a parquet copy of each data set that is published as a script, XSum among them; a
            # configuration is a folder of it.
            folder = {"data_dir": config} if config else {}
            return datasets.load_dataset(name, revision="refs/convert/parquet", **folder, **which)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{constant}: {name} cannot be had from the hub ({first_line(error)}); {remedy}") from error


def _checked(splits: dict[str, Any], path: str, published: Published) -> dict[str, Any]:
    """The wanted splits and columns of tables from elsewhere, every row looked at."""
    for split in published.files:
        if split not in splits or len(splits[split]) == 0:
            raise UserError(f"{published.constant}: {path} has no split {split!r}, or an empty one")
        absent = set(published.columns) - set(splits[split].column_names)
        if absent:
            raise UserError(f"{published.constant}: split {split} of {path} has no column {_listed(sorted(absent))}")
    columns = list(published.columns)
    for split in published.files:
        complaints = _Complaints(f"{published.constant}: {path}, split {split}", published)
        with_id = [*columns, "id"] if "id" in splits[split].column_names else columns
        rows, number = iter(splits[split].select_columns(with_id)), 0
        try:
            for number, example in enumerate(rows, 1):
                complaints.about(f"row {number}", example)
        except (ValueError, TypeError, OSError) as error:  # bytes that are no text, pages that are damaged
            where = f"{complaints.place}, after row {number}"
            raise UserError(f"{where}: not readable ({first_line(error)})") from error
        complaints.refuse()
    return {split: splits[split].select_columns(columns) for split in published.files}


def _listed(names) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
