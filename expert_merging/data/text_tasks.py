"""Tasks of text classification in folders: {task}/{train,validation,test}.jsonl, lines {"text", "text2" (or none), "label"}.

A folder with AG News's train.csv and test.csv is a task too. It has no validation: that is drawn from its training examples,
a tenth of them, the same for every seed.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expert_merging.core.errors import UserError
from expert_merging.data.raw_files import not_text, read_ag_news_csv, read_jsonl

SPLITS = ("train", "validation", "test")
_NO_LETTERS = re.compile(r"[\W_]+")
SAMPLE_SEED = 0  # of validation and test samples: the same for every model, seed and machine


class Row(NamedTuple):
    """An example; `text2` where it is a pair."""

    text: str
    text2: str | None
    label: int


@dataclass(frozen=True)
class TextTask:
    """A task's examples by split, its labels 0 to `classes` - 1."""

    name: str
    classes: int
    rows: dict[str, list[Row]]

    def sample(self, split: str, most: int, seed: int | None = None) -> list[Row]:
        """At most `most` examples (0: all) in random order; the same for every run without a `seed`."""
        rows = self.rows[split]
        order = random.Random(f"{SAMPLE_SEED if seed is None else seed} {self.name} {split}").sample(rows, len(rows))
        return order[: most or len(rows)]


def read_all(folders: Sequence[str], merged: Sequence[str], unseen: Sequence[str]) -> dict[str, TextTask]:
    """{name: task}: those to merge in the order of `merged` ("all": every task folder but `unseen`), then `unseen`.

    Raises UserError for what cannot be merged: a task that is not there or no task, named twice, or fewer than two.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.expanduser().is_dir():
            raise UserError(f"TASKS_PATH: there is no folder {folder}; it holds a folder for each task")
        for path in sorted(folder.expanduser().iterdir()):
            if (path / "train.jsonl").is_file() or (path / "train.csv").is_file() or path.name in (*merged, *unseen):
                found.setdefault(path.name, path)
    names = [name for name in found if name not in unseen] if tuple(merged) == ("all",) else list(merged)
    if twice := [name for name in names if [*names, *unseen].count(name) > 1]:
        raise UserError(
            f"text_tasks and unseen_tasks name {twice[0]!r} twice; each task once, to merge or to test only"
        )
    if len(names) < 2:
        raise UserError(
            f"{', '.join(folders)}: {len(names)} task to merge ({', '.join(names) or 'none'}); give two or more"
        )
    if absent := [name for name in (*names, *unseen) if name not in found]:
        there = ", ".join(found) or "none"
        raise UserError(f"TASKS_PATH: no folder of the task {absent[0]!r} in {', '.join(folders)}; there are: {there}")
    return {name: read(found[name]) for name in (*names, *unseen)}


def read(folder: Path) -> TextTask:
    """The task in a folder. Raises UserError, by file and line, for what is no example, and for a task without two classes."""
    if (folder / "train.csv").is_file() and not (folder / "train.jsonl").exists():
        rows = {split: _rows(folder / f"{split}.csv") for split in ("train", "test")}
        held = set(random.Random(SAMPLE_SEED).sample(range(len(rows["train"])), max(1, len(rows["train"]) // 10)))
        rows["validation"] = [rows["train"][i] for i in sorted(held)]
        rows["train"] = [row for i, row in enumerate(rows["train"]) if i not in held]
    else:
        rows = {split: _rows(folder / f"{split}.jsonl") for split in SPLITS}
    labels = {row.label for row in rows["train"]}
    if len(labels) < 2:
        raise UserError(f"{folder}: all training examples have label {min(labels)}; a task needs two classes or more")
    if max(labels) >= len(labels):
        gap = next(label for label in range(len(labels)) if label not in labels)
        raise UserError(f"{folder}: no training example has label {gap}, one has {max(labels)}; count labels from 0")
    for split in ("validation", "test"):
        if beyond := [row.label for row in rows[split] if row.label not in labels]:
            raise UserError(
                f"{folder}: a {split} example has label {beyond[0]}; in training labels are 0 to {max(labels)}"
            )
    if len({row.text2 is None for split in SPLITS for row in rows[split]}) > 1:
        raise UserError(f"{folder}: some examples have a text2 and others none; a task is of pairs or of single texts")
    return TextTask(folder.name, len(labels), rows)


class Overlap(NamedTuple):
    """`share` of the test examples of the task `tested` are training examples of the task `trained`, by their texts."""

    trained: str
    tested: str
    share: float

    def __str__(self) -> str:
        return f"{self.share:.0%} of {self.tested}'s test texts are among {self.trained}'s training texts"


def overlaps(tasks: Mapping[str, TextTask], trained: Sequence[str], least: float = 0.01) -> list[Overlap]:
    """The pairs of tasks in which one, of those `trained`, sees more than the share `least` of another's test texts in
    training. Texts are compared without case, spaces and punctuation; a pair's are one."""
    tests = {name: [_letters(row) for row in task.rows["test"]] for name, task in tasks.items()}
    found = []
    for one in trained:
        seen = {_letters(row) for row in tasks[one].rows["train"]}
        shares = {name: sum(text in seen for text in own) / len(own) for name, own in tests.items() if name != one}
        found += [Overlap(one, name, share) for name, share in shares.items() if share > least]
    return found


def _letters(row: Row) -> str:
    return _NO_LETTERS.sub("", f"{row.text} {row.text2 or ''}".casefold())


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{path} is missing; a task has train, validation and test")
    reading = read_ag_news_csv if path.suffix == ".csv" else read_jsonl
    rows = []
    for where, found in reading(path):
        complaint = found if isinstance(found, str) else _complaint(found)
        if complaint or isinstance(found, str):
            raise UserError(f"{path}, {where}: {complaint}")
        rows.append(Row(found["text"], found.get("text2"), found["label"]))
    if not rows:
        raise UserError(f"{path} holds no examples")
    return rows


def _complaint(found: dict[str, Any]) -> str | None:
    columns = ("text", "text2") if found.get("text2") is not None else ("text",)
    if complaint := not_text(found, *columns):
        return complaint
    if empty := [column for column in columns if not found[column].strip()]:
        return f"the field {empty[0]!r} is empty"
    label = found.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        return f"the label is {label!r:.40}; it must be a whole number from 0"
    return None
