"""Six tasks of text classification made of docstrings, for WEMoE_text.py without TASKS_PATH: those of `data.doc_choice`.

library  the library that a passage is about (six)
type     the type of a parameter, from its name and description (the commonest in training)
default  the default of a parameter, likewise
summary  whether the line is the summary of this function, or another's
next     whether the sentence ends so
order    whether the words of a sentence are in order
"""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.files import new_folder, write_json_lines
from expert_merging.data import doc_choice, docstring_reader, docstring_splits
from expert_merging.run import results

COMMON = 5  # types and defaults that are told apart


def write_once(c: SimpleNamespace) -> str:
    """Write WEMOE_TEXT_DIR/data/{task}/{split}.jsonl unless they are there; returns that folder.

    As many training examples as three seeds with samples of their own can use; validation and test as the constants ask.
    """
    folder = Path(c.WEMOE_TEXT_DIR) / "data"
    wanted = results.identity(c, ("train_texts", "validation_texts", "select_texts", "test_texts"))
    if results.is_done(folder / "complete.json", wanted, claim=folder, elsewhere="WEMOE_TEXT_DIR"):
        return str(folder)
    train = 2 * (c.train_texts or 4000)
    held = {"validation": max(c.validation_texts, c.select_texts), "test": c.test_texts or 1000}
    docs = docstring_reader.read_docstrings()
    # Of parameters only some have one of the common answers.
    found = doc_choice.examples(docs, 3 * train, 3 * held["test"], 3 * held["validation"])
    with new_folder(folder) as temporary:
        for task, splits in labelled(found).items():
            for split, rows in splits.items():
                kept = rows[: {"train": train, **held}[split]]
                write_json_lines(temporary / task / f"{split}.jsonl", kept)
        results.save(temporary / "complete.json", wanted, {"texts_sha256": docstring_reader.corpus_hash(found)})
    return str(folder)


def labelled(found: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, list[dict]]]:
    """{task: {split: [{"text", "text2" (or none), "label"}]}} of what `doc_choice.examples` gives."""
    made: dict[str, dict[str, list[dict]]] = {}
    for task, splits in found.items():
        if task in ("topic", "type", "default"):
            counts = Counter(row["output"] for row in splits["train"])
            labels = [answer for answer, _ in counts.most_common(None if task == "topic" else COMMON)]
            made[{"topic": "library"}.get(task, task)] = {
                split: [{"text": row["instruction"], "label": labels.index(row["output"])}
                        for row in rows if row["output"] in labels]
                for split, rows in splits.items()
            }  # fmt: skip
        else:
            dice = random.Random(f"{docstring_splits.DATA_SEED} {task}")
            made[task] = {split: [_pair(task, row, rows, dice) for row in rows] for split, rows in splits.items()}
    return made


def _pair(task: str, row: dict, rows: list[dict], dice: random.Random) -> dict:
    """Half of them wrong: another example's end, or words out of order."""
    right = dice.random() < 0.5
    text2 = row["output"] if right else dice.choice(rows)["output"]
    if task == "order":
        words = row["output"].split()
        inner = words[1:-1]
        text2 = row["output"] if right else " ".join([words[0], *dice.sample(inner, len(inner)), words[-1]])
        return {"text": text2, "label": int(text2 == row["output"])}
    return {"text": row["instruction"], "text2": text2, "label": int(text2 == row["output"])}
