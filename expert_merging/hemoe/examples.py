"""The instruction data: read, put aside to measure by, divided into domains, and encoded in batches."""

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.data.raw_files import not_text, read_jsonl
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.pipeline import seed_folder


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """The instruction examples {"instruction", "output", "task"} of a folder of JSON lines: {task}.jsonl, or the released
    layout {task}_template/train.json. Sorted by task. A "row" tells which of them were made of one row of raw data.
    Raises UserError where there are none or one is not whole."""
    if not folder.is_dir():
        raise UserError(
            f"INSTRUCTIONS_PATH: there is no folder {folder}; it holds a file TASK.jsonl a task, which the step data makes "
            "where RAW_PATH is given"
        )
    files = {path.stem: path for path in folder.glob("*.jsonl")}
    files |= {path.parent.name.removesuffix("_template"): path for path in folder.glob("*/train.json")}
    examples = []
    for task, path in sorted(files.items()):
        for where, row in read_jsonl(path):
            if said := row if isinstance(row, str) else not_text(row, "instruction", "output"):
                raise UserError(f'{path}, {where}: not a JSON object with "instruction" and "output" ({said})')
            assert not isinstance(row, str)  # which is a complaint
            one = {"instruction": row["instruction"].strip(), "output": row["output"].strip(), "task": task}
            if one["instruction"] and one["output"]:
                examples.append(one | ({"row": row["row"]} if isinstance(row.get("row"), int) else {}))
    if not examples:
        raise UserError(f"INSTRUCTIONS_PATH: {folder} holds no examples; it holds a file TASK.jsonl a task")
    return examples


def domains(c: SimpleNamespace) -> None:
    """Put aside `held_out` examples of each task, and choose `score_sequences` of each domain from `task_examples` others."""
    pipeline.refuse_beside(c)
    for which, constants in pipeline.by_domains(c).items():
        _domains(constants, pipeline.ending(which))


def _domains(c: SimpleNamespace, end: str) -> None:
    from expert_merging.data.docstring_reader import corpus_hash
    from expert_merging.hemoe.domains import by_cluster, by_task

    path, wanted = seed_folder(c) / f"domains{end}.json", pipeline.identity(c, "domains")
    if pipeline.is_done(path, wanted):
        return
    started = time.perf_counter()
    examples = read_examples(Path(c.INSTRUCTIONS_PATH))
    known = {one["task"] for one in examples}
    if strangers := [task for task in c.tune_tasks if task not in ("all", *known)]:
        raise UserError(
            f"tune_tasks: {c.INSTRUCTIONS_PATH} has no examples of {strangers[0]}; there are {', '.join(sorted(known))}"
        )
    order = random.Random(c.seed).sample(range(len(examples)), len(examples))
    held: dict[str, list[int]] = {task: [] for task in sorted(known)}
    used: list[int] = []
    left = dict.fromkeys(held, c.task_examples or len(examples))
    seen: set[tuple[str, int]] = set()  # rows of raw data that are held out, in whichever template
    for i in order:
        task, row = examples[i]["task"], examples[i].get("row")
        if len(held[task]) < c.held_out:
            held[task].append(i)
            seen |= {(task, row)} if row is not None else set()
        elif left[task] and (task, row) not in seen:
            used.append(i)
            left[task] -= 1
    if short := [task for task in held if not any(examples[i]["task"] == task for i in used)]:
        raise UserError(
            f"INSTRUCTIONS_PATH: task {short[0]} has no examples beside the {c.held_out} held out; lower held_out"
        )
    rows = [examples[i] for i in used]
    found = by_task(rows) if c.domains_from == "tasks" else by_cluster(rows, c.num_domains, c.embedder)
    if len(found.names) != c.num_domains and not end:
        raise UserError(f"num_domains is {c.num_domains}, but {c.INSTRUCTIONS_PATH} has {len(found.names)} tasks")
    chosen = {
        name: [used[i] for i in found.members(number)[: c.score_sequences]] for number, name in enumerate(found.names)
    }
    record = {
        "names": list(found.names), "table": found.table(rows), "examples_sha256": corpus_hash(examples),
        "held": held, "used": used, "scored": chosen,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    pipeline.save(c, path, wanted, record)
    print("domains: " + ", ".join(f"{row['domain']} {row['examples']}" for row in found.table(rows)))


class Examples:
    """The encoded examples that domains.json chose, or that of other `domains`, in batches."""

    def __init__(self, c: SimpleNamespace, tokenizer, domains: str = ""):
        from expert_merging.data.docstring_reader import corpus_hash

        path = seed_folder(c) / f"domains{pipeline.ending(domains)}.json"
        self._record = pipeline.load(path, "domains", pipeline.identity(c, "domains"))
        self._examples = read_examples(Path(c.INSTRUCTIONS_PATH))
        if corpus_hash(self._examples) != self._record["examples_sha256"]:
            raise UserError(f"{c.INSTRUCTIONS_PATH} has changed since the step domains; remove {seed_folder(c)}")
        self._tokenizer, self._c = tokenizer, c

    def rows(self, count: int, tasks: tuple[str, ...]) -> list[dict[str, list[int]]]:
        """For training, at most `count`; of the tasks named, or ("all",)."""
        chosen = [i for i in self._record["used"] if tasks == ("all",) or self._examples[i]["task"] in tasks][:count]
        if not chosen:
            raise UserError(f"tune_tasks: {self._c.INSTRUCTIONS_PATH} has no examples of {', '.join(tasks)}")
        return self._encoded(chosen)

    def batches(self, which: str) -> dict[str, list[dict]]:
        """{domain: batches} to score by ("scored"), {task: batches} held out ("held")."""
        from expert_merging.hemoe.tuning import batches

        pad, size = self._tokenizer.pad_token_id, self._c.eval_batch_size
        return {name: batches(self._encoded(chosen), size, pad) for name, chosen in self._record[which].items()}

    def _encoded(self, chosen: list[int]) -> list[dict[str, list[int]]]:
        from expert_merging.hemoe.tuning import encode

        return [encode(self._tokenizer, self._examples[i], self._c.max_tokens, self._c.prompts) for i in chosen]
