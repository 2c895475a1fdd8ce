"""The step data: instructions to score and tune by, and questions to evaluate by, where the user brings none."""

import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, write_json
from expert_merging.hemoe import instructions, pipeline, questions


def data(c: SimpleNamespace) -> None:
    """HEMOE_DIR/data: of RAW_PATH, instructions; at scale real, of QUESTIONS_PATH, lm_eval tasks of a sample of its questions;
    where neither is given, tasks of docstrings (at scale paper nothing)."""
    from expert_merging.data.docstring_reader import corpus_hash

    folder = Path(c.HEMOE_DIR) / "data"
    done = folder / "complete.json"
    asked = questions.read(Path(c.QUESTIONS_PATH)) if c.QUESTIONS_PATH and c.scale != "paper" else {}
    more: dict[str, Any] = {}
    if asked:
        more["questions_sha256"] = corpus_hash([row for rows in asked.values() for row in rows])
    raw: dict[str, instructions.Raw] = {}
    if c.RAW_PATH:
        _check_raw(c, folder / "train")
        tasks = instructions.tasks(c)
        if c.RAW_PATH == instructions.HUB and done.exists():  # what was fetched then counts; it is not fetched again
            sha256 = read_json(done)["identity"].get("raw_sha256")
        else:
            raw = instructions.read(c, tasks)
            sha256 = corpus_hash({task: [asdict(case) for case in one.cases.values()] for task, one in raw.items()})
        more |= {"raw_sha256": sha256, "raw_tasks": list(tasks)}
        more |= {name: getattr(c, name) for name in ("raw_examples", "with_options", "every_template")}
    elif c.scale == "paper":
        return  # instructions and lm_eval's tasks are the user's
    wanted = pipeline.identity(c, "data", **more)
    if pipeline.is_done(done, wanted):
        return
    record: dict[str, Any] = {}
    if raw:
        record["instructions"] = instructions.write(raw, folder / "train", c.with_options, c.every_template)
        print("instructions: " + ", ".join(f"{task} {one['examples']}" for task, one in record["instructions"].items()))
    if asked:
        questions.write(asked, folder / "eval", c.eval_questions)
        record["questions"] = {task: len(rows) for task, rows in asked.items()}
    pipeline.save(c, done, wanted, record or _of_docstrings(c, folder))


def _check_raw(c: SimpleNamespace, folder: Path) -> None:
    """Raises UserError where raw data are given that could not be used."""
    if c.scale in ("tiny", "night"):
        raise UserError(f"RAW_PATH: at scale {c.scale} the model is trained on docstrings; give --scale real or paper")
    if Path(c.INSTRUCTIONS_PATH) != folder:
        raise UserError(
            f"RAW_PATH makes the instructions in {folder}; leave INSTRUCTIONS_PATH ({c.INSTRUCTIONS_PATH}) away"
        )


def _of_docstrings(c: SimpleNamespace, folder: Path) -> dict:
    """Six multiple-choice tasks, and text for a base model."""
    from expert_merging.data import doc_choice, docstring_reader, docstring_splits

    docs = docstring_reader.read_docstrings()
    questions.write_doc_choice(
        doc_choice.examples(docs, c.doc_train_examples, c.doc_test_examples), folder / "train", folder / "eval"
    )
    texts = docstring_splits.pretraining_texts(docs)
    random.Random(docstring_splits.DATA_SEED).shuffle(texts)
    write_json(folder / "texts.json", texts[: 2 * c.doc_train_examples])
    return {"texts_sha256": docstring_reader.corpus_hash(texts)}
