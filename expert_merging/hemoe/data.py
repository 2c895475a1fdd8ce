"""The step data: instructions to score and tune by, and questions to evaluate by, where the user brings none."""

import random
from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.files import write_json
from expert_merging.hemoe import pipeline, questions


def data(c: SimpleNamespace) -> None:
    """HEMOE_DIR/data: tasks of docstrings; at scale real, with QUESTIONS_PATH, lm_eval tasks of a sample of its questions."""
    if c.scale == "paper":
        return  # instructions and lm_eval's tasks are the user's
    folder = Path(c.HEMOE_DIR) / "data"
    asked = questions.read(Path(c.QUESTIONS_PATH)) if c.QUESTIONS_PATH else {}
    from expert_merging.data.docstring_reader import corpus_hash

    more = {"questions_sha256": corpus_hash([row for rows in asked.values() for row in rows])} if asked else {}
    wanted = pipeline.identity(c, "data", **more)
    if pipeline.is_done(folder / "complete.json", wanted):
        return
    if asked:
        questions.write(asked, folder / "eval", c.eval_questions)
        record = {"questions": {task: len(rows) for task, rows in asked.items()}}
    else:
        record = _of_docstrings(c, folder)
    pipeline.save(c, folder / "complete.json", wanted, record)


def _of_docstrings(c: SimpleNamespace, folder: Path) -> dict:
    """Six multiple-choice tasks, and text for a base model."""
    from expert_merging.data import docstring_reader, docstring_splits
    from expert_merging.hemoe import doc_choice

    docs = docstring_reader.read_docstrings()
    doc_choice.write(
        doc_choice.examples(docs, c.doc_train_examples, c.doc_test_examples), folder / "train", folder / "eval"
    )
    texts = docstring_splits.pretraining_texts(docs)
    random.Random(docstring_splits.DATA_SEED).shuffle(texts)
    write_json(folder / "texts.json", texts[: 2 * c.doc_train_examples])
    return {"texts_sha256": docstring_reader.corpus_hash(texts)}
