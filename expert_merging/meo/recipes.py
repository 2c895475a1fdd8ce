"""What MEO is trained on: each task's data, score and settings (those of the released code's scripts), and the same for
the embedded docstring tasks. Rows are token ids, cut but not padded."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.core.hub import local_folder, offline_if_unreachable
from expert_merging.data import text_tasks
from expert_merging.data.text_tasks import SPLITS

KINDS = {  # what a family does here
    "bert": ("classification", "language modelling"),
    "gpt2": ("language modelling",),
    "t5": ("seq2seq",),
    "bart": ("seq2seq",),
}


@dataclass(frozen=True)
class Recipe:
    """How a task is trained: linear decay to 0 without warm-up, AdamW (0.9, 0.999), gradients clipped at 1."""

    kind: str  # classification | language modelling | seq2seq
    model: str  # on the hub; none for the embedded tasks
    main_score: str
    n: int = 8  # experts, of which k are active and share a gate at `level`: where the script's constants leave it to the task
    k: int = 2
    level: str = "sequence"
    batch_size: int = 16
    lr: float = 1e-5
    epochs: int = 10
    weight_decay: float = 0.0
    length: int = 128  # tokens of an input, or of a block
    target_length: int = 0
    generation: dict[str, Any] = field(default_factory=dict)
    description: str = ""  # what a gate at task level reads
    columns: tuple[str, ...] = ()  # of the texts, in GLUE


_GLUE = Recipe(
    "classification", "google-bert/bert-base-uncased", "accuracy", n=16, k=12, level="task", weight_decay=0.1
)
_GLUE_TASKS = {
    "cola": (("sentence",), "matthews", "Is the sentence grammatical?"),
    "sst2": (("sentence",), "accuracy", "Is the sentiment of the sentence positive or negative?"),
    "mrpc": (("sentence1", "sentence2"), "accuracy", "Do the two sentences say the same?"),
    "stsb": (("sentence1", "sentence2"), "pearson", "How similar are the two sentences?"),
    "qqp": (("question1", "question2"), "accuracy", "Do the two questions ask the same?"),
    "mnli": (("premise", "hypothesis"), "accuracy", "Does the premise entail or contradict the hypothesis, or neither?"),
    "qnli": (("question", "sentence"), "accuracy", "Does the sentence answer the question?"),
    "rte": (("sentence1", "sentence2"), "accuracy", "Does the first sentence entail the second?"),
    "wnli": (("sentence1", "sentence2"), "accuracy", "Does the first sentence entail the second, its pronoun resolved?"),
}  # fmt: skip
RECIPES = {
    **{
        name: replace(_GLUE, columns=columns, main_score=score, description=description)
        for name, (columns, score, description) in _GLUE_TASKS.items()
    },
    "wikitext": Recipe(
        "language modelling", "openai-community/gpt2", "perplexity", level="task", batch_size=8, length=1024,
        description="Predict the words of an encyclopaedia's articles.",
    ),
    "squad": Recipe(
        "seq2seq", "google-t5/t5-small", "exact_match", k=8, batch_size=12, lr=5e-5, epochs=2, length=384,
        target_length=30, generation={"num_beams": 1}, description="Answer the question with words of the context.",
    ),
    "xsum": Recipe(
        "seq2seq", "facebook/bart-large", "rouge2", batch_size=8, lr=1e-4, epochs=4, weight_decay=0.1, length=1024,
        target_length=60, generation={"num_beams": 6, "min_length": 10, "no_repeat_ngram_size": 3},
        description="Summarise the article in one sentence.",
    ),
    "doc_topic": Recipe(
        "classification", "", "accuracy", lr=1e-3, epochs=4, weight_decay=0.1,
        description="Which library does the text come from?",
    ),
    "doc_lm": Recipe(
        "language modelling", "", "perplexity", lr=1e-3, epochs=2, level="task",
        description="Predict the words of a library's documentation.",
    ),
    "doc_qa": Recipe(
        "seq2seq", "", "exact_match", lr=1e-3, epochs=4, length=256, target_length=48, generation={"num_beams": 1},
        description="Answer the question with words of the context.",
    ),
    "doc_summary": Recipe(
        "seq2seq", "", "rougeL", lr=1e-3, epochs=4, length=256, target_length=48,
        generation={"num_beams": 3, "no_repeat_ngram_size": 3}, description="Summarise the text in one sentence.",
    ),
}  # fmt: skip
# Of a task in TASKS_PATH: the released rate, 1e-5, and its ten epochs belong to training sets a hundred times as large.
FOLDER_TASK = Recipe(
    "classification", "", "accuracy", lr=2e-4, epochs=3, weight_decay=0.1, length=64,
    description="To which class does the text belong?",
)  # fmt: skip


def chosen(c: SimpleNamespace, task: str) -> list[Recipe]:
    """The recipe of a task with the constants that are not 0 in place of its own, one for each learning rate. Raises
    UserError for what cannot be."""
    recipe = recipe_of(c, task)
    own = {"epochs": c.epochs, "batch_size": c.train_batch, "length": c.input_length}
    given = {**own, "learning rate": min(c.learning_rate)}
    if negative := [name for name, value in given.items() if value < 0]:
        raise UserError(f"the {negative[0]} given is {given[negative[0]]}; it must be above 0, or 0 for the task's own")
    if not c.seeds:
        raise UserError("seeds is empty; give one at least")
    recipe = replace(recipe, **{name: value for name, value in own.items() if value})
    return [replace(recipe, lr=lr) for lr in dict.fromkeys(lr or recipe.lr for lr in c.learning_rate)]


def in_folder(c: SimpleNamespace, task: str) -> bool:
    """Whether the task is one of TASKS_PATH; the docstring tasks stay what they are."""
    return bool(c.TASKS_PATH) and not task.startswith("doc_")


def published_model(c: SimpleNamespace, recipe: Recipe) -> str:
    """Folder or hub name of the model to start from; "" where the task has none and none is given. To be called before
    transformers is imported, which decides then whether to try the hub."""
    path = c.MODEL_PATH or recipe.model
    if path and local_folder(path, "MODEL_PATH") is None:
        offline_if_unreachable()
    return path


def recipe_of(c: SimpleNamespace, task: str) -> Recipe:
    """Raises UserError for an unknown task or family, or a task that the family does not do."""
    if c.family not in KINDS:
        raise UserError(f"family is {c.family!r}; it must be one of {', '.join(KINDS)}")
    if not in_folder(c, task) and task not in RECIPES:
        raise UserError(f"there is no task {task!r}; there are: {', '.join(RECIPES)}, and those in TASKS_PATH")
    recipe = FOLDER_TASK if in_folder(c, task) else RECIPES[task]
    if recipe.kind not in KINDS[c.family]:
        fits = [name for name, one in RECIPES.items() if one.kind in KINDS[c.family]]
        raise UserError(f"{task} is {recipe.kind}, which {c.family} does not do here; it does: {', '.join(fits)}")
    return recipe


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a record holds it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(recipe).items()}


# ---------------------------------------------------------------- raw examples


def load_raw(task: str, c: SimpleNamespace) -> Mapping[str, Sequence[dict]]:
    """Raw examples of each split, no more of them than `{split}_examples` (0: all); of a task in TASKS_PATH all of training,
    of which each seed draws its own, and of the others no more than `task_{split}`.

    Where the published test split has no answers (GLUE, SQuAD) the published validation split is the test, and what chooses
    the epoch is held out of training.

    Raises UserError where they are neither on the hub nor in the folder that the task's constant names.
    """
    if in_folder(c, task):
        return _from_folder(task, c)
    if task.startswith("doc_"):
        return _embedded(task, c)
    if task in ("squad", "xsum"):
        from expert_merging.data.tasks import get_task

        raw = get_task(task).load(c)
    elif task == "wikitext":
        raw = _published(c.WIKITEXT_PATH, "WIKITEXT_PATH", "wikitext-2-raw-v1", ("text",))
    else:
        validation = "validation_matched" if task == "mnli" else "validation"
        raw = _published(c.GLUE_PATH, "GLUE_PATH", task, (*RECIPES[task].columns, "label"), validation)
        raw = _with_held_out(raw, "GLUE_PATH")
    if task == "squad":
        raw = _with_held_out(raw, "SQUAD_PATH", together="context")
    return {split: _first(raw[split], getattr(c, f"{split}_examples")) for split in SPLITS}


def _from_folder(task: str, c: SimpleNamespace) -> dict[str, list[dict]]:
    folder = Path(c.TASKS_PATH).expanduser()
    if not (folder / task).is_dir():
        there = sorted(path.name for path in folder.glob("*") if (path / "train.jsonl").is_file())
        raise UserError(f"TASKS_PATH: there is no folder {folder / task}; tasks there: {', '.join(there) or 'none'}")
    found = text_tasks.read(folder / task)
    limits = {"train": 0, "validation": c.task_validation, "test": c.task_test}
    rows = {split: found.sample(split, most) for split, most in limits.items()}
    left_out = {"text2"} if found.rows["train"][0].text2 is None else set()
    return {
        split: [{name: value for name, value in row._asdict().items() if name not in left_out} for row in of_split]
        for split, of_split in rows.items()
    }


def drawn(rows: list[dict], number: int, seed: int) -> list[dict]:
    """`number` of the training rows, drawn anew by each seed; all of them, as they are, for 0 or too few."""
    if not 0 < number < len(rows):
        return rows
    return [rows[i] for i in np.random.default_rng([seed, 17]).permutation(len(rows))[:number]]


def _with_held_out(raw: Mapping[str, Any], constant: str, together: str = "") -> dict[str, Any]:
    """The published validation split as test; for validation a tenth of training, at most as many as there are for testing,
    drawn at random and always the same. Examples with the same `together` stay on one side.

    Raises UserError for too little data.
    """
    train, test = raw["train"], raw["validation"]
    keys = train[together] if together else range(len(train))
    groups = list(dict.fromkeys(keys))
    if len(groups) < 2:
        raise UserError(
            f"{constant}: {len(train)} training examples are too few to hold some out for choosing the epoch"
        )
    size = min(max(1, len(groups) // 10), len(test))
    held = {groups[i] for i in np.random.default_rng(42).permutation(len(groups))[:size]}
    kept, out = ([i for i, key in enumerate(keys) if (key in held) == side] for side in (False, True))
    return {"train": train.select(kept), "validation": train.select(out), "test": test}


def _first(examples, limit: int):
    """A random part (always the same) of `limit` examples; all for 0."""
    if not 0 < limit < len(examples):
        return examples
    order = np.random.default_rng(42).permutation(len(examples))[:limit].tolist()
    return [examples[i] for i in order]


def _published(path: str, constant: str, name: str, columns: tuple[str, ...], validation: str = "validation") -> dict:
    """A data set of the hub, or the folder `path`/`name` with train, validation and test as JSON lines, CSV or parquet."""
    from expert_merging.core.hub import first_line

    folder = local_folder(path, constant)
    if folder is None:
        offline_if_unreachable()
    elif not (folder / name).is_dir():
        raise UserError(f"{constant}: there is no folder {folder / name}")
    import datasets

    files = None
    if folder and validation != "validation":  # datasets would join validation_matched and validation_mismatched
        matched, validation = any((folder / name).glob(f"{validation}*")), "validation"
        files = {"train": "train*", "validation": "validation_matched*" if matched else "validation[.-]*"}
    try:
        arguments = (str(folder / name),) if folder else (path, name)
        found = datasets.load_dataset(*arguments, data_files=files)
        raw = {split: found[validation if split == "validation" else split] for split in ("train", "validation")}
        raw["test"] = found["test"] if "test" in found else raw["validation"]
    except Exception as error:  # whatever its readers raise
        where = f"in {folder / name}" if folder else f"on the hub as {path}, {name}"
        raise UserError(f"{constant}: found no readable data set {where} ({first_line(error)})") from error
    if missing := [column for column in columns if column not in raw["train"].column_names]:
        raise UserError(f"{constant}: the data set {name} has no column {missing[0]!r}")
    return raw


def _embedded(task: str, c: SimpleNamespace) -> dict[str, list[dict]]:
    """The docstring tasks, read once and kept in `MEO_DIR`/data."""
    from expert_merging.core.files import read_json, write_json
    from expert_merging.data import docstring_splits
    from expert_merging.data.tasks import get_task

    sizes = docstring_splits.sizes_of(c)
    kept = Path(c.MEO_DIR) / "data" / f"{task}_{'_'.join(map(str, sizes.values()))}.json"
    if not kept.exists():
        if task == "doc_lm":
            raw = _documentation(sizes)
        else:
            raw = get_task(task).load(c)
        write_json(kept, raw)
    return read_json(kept)


def _documentation(sizes: dict[str, int]) -> dict[str, list[dict]]:
    """Texts of each split; of the small splits only paragraphs that training does not have."""
    from expert_merging.data import docstring_reader, docstring_splits

    docs = docstring_reader.read_docstrings()
    train = [doc for doc in docs if docstring_splits.split_of(doc.file) == "train"]
    seen = {docstring_reader.normalized(block) for doc in train for block in doc.blocks}
    texts = {"train": docstring_splits.pretraining_texts(docs)}
    for split in ("validation", "test"):
        of_split = [
            " ".join(b for b in doc.blocks if docstring_reader.normalized(b) not in seen)
            for doc in docs
            if docstring_splits.split_of(doc.file) == split
        ]
        texts[split] = [text for text in dict.fromkeys(of_split) if len(text) > 100]
    return {split: [{"text": text} for text in _first(texts[split], sizes[split])] for split in SPLITS}


# ---------------------------------------------------------------- rows


def rows_of(
    task: str, recipe: Recipe, raw: Mapping[str, Sequence[dict]], tokenizer
) -> tuple[dict[str, list[dict]], dict]:
    """({split: rows}, facts): rows hold `input_ids` and, by kind, `label` (a number) or `labels` and `references`.

    Facts: {"cut": {split: how many inputs were longer than the recipe's length, and lost their end},
    "labels": names, for classification; empty for a regression}.
    """
    if recipe.kind == "language modelling":
        blocks = {split: blocks_of([e["text"] for e in raw[split]], tokenizer, recipe.length) for split in SPLITS}
        rows = {split: [{"input_ids": block} for block in of_split] for split, of_split in blocks.items()}
        return rows, {"cut": dict.fromkeys(SPLITS, 0)}
    if recipe.kind == "seq2seq":
        pairs = {split: _pairs(task, raw[split], tokenizer, recipe) for split in SPLITS}
        return {split: own for split, (own, _) in pairs.items()}, {"cut": {split: n for split, (_, n) in pairs.items()}}
    texts: tuple[str, ...]
    label_of: Callable[[Any], float]
    if not recipe.columns:
        names = sorted({e["label"] for e in raw["train"]})
        texts, label_of = ("text", "text2") if "text2" in raw["train"][0] else ("text",), names.index
    else:
        names = [] if task == "stsb" else sorted({e["label"] for e in raw["train"]})
        texts, label_of = recipe.columns, float if task == "stsb" else int
    rows, cut = {}, {}
    for split in SPLITS:
        sides = [[e[column] for e in raw[split]] for column in texts]
        ids, cut[split] = _encoded(tokenizer, sides, recipe.length)
        rows[split] = [
            {"input_ids": np.array(i), "label": label_of(e["label"])} for i, e in zip(ids, raw[split], strict=True)
        ]
    return rows, {"labels": names, "cut": cut}


def blocks_of(texts: list[str], tokenizer, length: int) -> np.ndarray:
    """All texts end to end, cut into blocks of `length` tokens, [blocks, length]; what is left over is dropped."""
    ids = tokenizer([t for t in texts if t.strip()], return_attention_mask=False, verbose=False)["input_ids"]
    stream = np.concatenate([np.array(i) for i in ids])
    if len(stream) < length:
        raise UserError(f"the text has {len(stream)} tokens, fewer than one block of {length}")
    return stream[: len(stream) // length * length].reshape(-1, length)


def _encoded(tokenizer, sides: list[list[str]], length: int) -> tuple[list[list[int]], int]:
    """(token ids of texts, or of pairs of texts, cut at `length`; how many were cut)."""
    ids = tokenizer(*sides, return_attention_mask=False, verbose=False)["input_ids"]
    long = [i for i, own in enumerate(ids) if len(own) > length]
    if long:
        texts = [[side[i] for i in long] for side in sides]
        short = tokenizer(*texts, truncation=True, max_length=length, return_attention_mask=False)["input_ids"]
        for i, own in zip(long, short, strict=True):
            ids[i] = own
    return ids, len(long)


def _pairs(task: str, examples: Sequence[dict], tokenizer, recipe: Recipe) -> tuple[list[dict], int]:
    """(rows, how many inputs were cut). A prompt of SQuAD has the question first, so that of a long context the end is lost:
    answers there cannot be found. There is no window that slides over it (doc_stride), as for answers that are spans."""
    from expert_merging.data.tasks import get_task

    module = get_task(task)
    inputs, cut = _encoded(tokenizer, [[module.prompt(e) for e in examples]], recipe.length)
    targets = tokenizer(
        text_target=[module.target(e) for e in examples], truncation=True, max_length=recipe.target_length
    )["input_ids"]
    rows = [
        {"input_ids": np.array(i), "labels": np.array(t), "references": module.references(e)}
        for i, t, e in zip(inputs, targets, examples, strict=True)
    ]
    return rows, cut


def rows_hash(rows: dict[str, list[dict]]) -> str:
    """SHA-256 over the rows of all splits, in order."""
    digest = hashlib.sha256()
    for split, of_split in rows.items():
        digest.update(f"{split} {len(of_split)}\n".encode())
        for row in of_split:
            for name, value in sorted(row.items()):
                digest.update(f"{name} {value.tolist() if isinstance(value, np.ndarray) else value}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- scores


def classification_scores(predictions: np.ndarray, labels: np.ndarray, main_score: str) -> dict[str, float]:
    """GLUE's scores, 0..100: of logits [N, classes] accuracy, with two classes also F1 and Matthews' correlation; of
    numbers [N, 1] Pearson's and Spearman's correlation. The main score comes first."""
    from scipy import stats
    from sklearn import metrics

    if main_score == "pearson":
        values = predictions[:, 0]
        scores = {"pearson": stats.pearsonr(values, labels)[0], "spearman": stats.spearmanr(values, labels)[0]}
    else:
        chosen = predictions.argmax(-1)
        scores = {"accuracy": metrics.accuracy_score(labels, chosen)}
        if predictions.shape[1] == 2:
            scores |= {"f1": metrics.f1_score(labels, chosen), "matthews": metrics.matthews_corrcoef(labels, chosen)}
    return {name: 100 * float(scores[name]) for name in sorted(scores, key=lambda name: name != main_score)}
