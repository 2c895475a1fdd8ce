"""Instruction data made of raw data sets: rows of the hub or of a local folder, put in templates.

A local folder holds {task}/train.jsonl, a row a line (raw_tasks.py), and, where the labels of a task mean something else
than on the hub, {task}/labels.json: the words for them, in order.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.bars import bar
from expert_merging.core.errors import UserError, at_least
from expert_merging.core.files import write_json_lines
from expert_merging.core.hub import first_line
from expert_merging.data import raw_files
from expert_merging.hemoe import questions, raw_tasks, templates
from expert_merging.hemoe.templates import Case

HUB = "hub"


def tasks(c: SimpleNamespace) -> dict[str, raw_tasks.DataSet]:
    """The data sets that the constants ask for, sorted by name. Raises UserError for what cannot be, before any is read."""
    at_least(c, 0, "raw_examples")
    folder = Path(c.RAW_PATH).expanduser()
    if c.raw_tasks != ("all",):
        names = list(c.raw_tasks)
    elif c.RAW_PATH == HUB:
        names = list(raw_tasks.PAPER)
    else:
        names = [path.parent.name for path in folder.glob("*/train.jsonl")]
    if c.RAW_PATH != HUB and not folder.is_dir():
        raise UserError(f"RAW_PATH: there is no folder {folder}; give one with TASK/train.jsonl a task, or hub")
    if not names:
        raise UserError(f"RAW_PATH: {folder} holds no TASK/train.jsonl; a task is {', '.join(raw_tasks.DATA_SETS)}")
    found = {name: raw_tasks.known(name) for name in sorted(names)}
    if c.RAW_PATH != HUB:
        for name, data_set in found.items():
            if not (path := folder / name / "train.jsonl").is_file():
                raise UserError(f"raw_tasks: {path} does not exist")
            if (path := folder / name / "labels.json").exists():
                found[name] = _with_labels(data_set, path)
    return found


@dataclass(frozen=True)
class Raw:
    """What was read of a data set: its kind of templates, and its cases, with the rows' numbers."""

    kind: str
    cases: dict[int, Case]


def read(c: SimpleNamespace, asked: dict[str, raw_tasks.DataSet]) -> dict[str, Raw]:
    """{task: its cases} of `tasks(c)`, `raw_examples` of each, in the order of the rows. Raises UserError, by place, for a row
    that is none."""
    found = {}
    for name, data_set in bar(asked.items(), "raw data", leave=False):
        cases = _from_hub(name, data_set, c.raw_examples) if c.RAW_PATH == HUB else _from_file(name, data_set, c)
        found[name] = Raw(data_set.kind, cases)
    return found


def _from_hub(name: str, data_set: raw_tasks.DataSet, most: int) -> dict[int, Case]:
    remedy = f"bring a folder with {name}/train.jsonl and give --RAW_PATH FOLDER"
    rows = raw_files.from_hub(data_set.hub, "RAW_PATH", remedy, data_set.config, split=data_set.split)
    place = f"RAW_PATH: {data_set.hub}, split {data_set.split}"
    chosen = questions.sample(name, len(rows), most)
    return {i: raw_tasks.read_case(data_set, rows[i], f"{place}, row {i + 1}") for i in chosen}


def _from_file(name: str, data_set: raw_tasks.DataSet, c: SimpleNamespace) -> dict[int, Case]:
    """All rows are looked at, also those that are not in the sample."""
    path = Path(c.RAW_PATH).expanduser() / name / "train.jsonl"
    rows = raw_files.read_jsonl(path)
    cases = [raw_tasks.read_case(data_set, row, f"{path}, {where}") for where, row in rows]
    return {i: cases[i] for i in questions.sample(name, len(cases), c.raw_examples)}


def write(raw: dict[str, Raw], folder: Path, with_options: bool, every_template: bool) -> dict[str, dict[str, int]]:
    """Write `folder`/{task}.jsonl, lines {"instruction", "output"}, and say what was made of each task.

    Args:
        every_template: each case in every template of its kind, shuffled, with the number of its "row"; else in one, drawn.
    """
    if others := sorted({path.stem for path in folder.glob("*.jsonl")} - raw.keys()):
        raise UserError(
            f"{folder} holds {others[0]}.jsonl, which is not of these raw data; remove it, or choose another HEMOE_DIR"
        )
    record = {}
    for task, one in raw.items():
        rng = random.Random(f"{questions.SAMPLE_SEED} {task} templates")
        rows = []
        for number, case in one.cases.items():
            usable = templates.usable(one.kind, case, with_options)
            for template in usable if every_template else [rng.choice(usable)]:
                example: dict[str, Any] = templates.fill(template, case, with_options)
                rows.append(example | ({"row": number} if every_template else {}))
        if every_template:
            rng.shuffle(rows)
        kept = [row for row in rows if len(row["instruction"]) + len(row["output"]) < templates.LONGEST]
        if not kept:
            raise UserError(f"RAW_PATH: no example of {task} has less than {templates.LONGEST} characters")
        write_json_lines(folder / f"{task}.jsonl", kept)
        record[task] = {"examples": len(kept), "too_long": len(rows) - len(kept)}
    return record


def _with_labels(data_set: raw_tasks.DataSet, path: Path) -> raw_tasks.DataSet:
    """The data set with the words for its labels that a file lists."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: no JSON that can be read ({first_line(error)})") from error
    if not isinstance(data_set.reader, raw_tasks.Classes):
        raise UserError(f"{path}: {path.parent.name} has no labels; remove the file")
    if (
        not isinstance(names, list)
        or len(names) < 2
        or not all(isinstance(name, str) and name.strip() for name in names)
    ):
        raise UserError(f"{path}: not a list of two words or more, one for each label")
    return replace(data_set, reader=replace(data_set.reader, names=tuple(names), label="label"))
