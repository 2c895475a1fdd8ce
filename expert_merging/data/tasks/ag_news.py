"""AG News: which of four topics is a news item about? (paper, 4.1 and A.1; Zhang et al., 2015)

Validation is a tenth of the published training split, drawn as the released code draws it: 108,000, 12,000 and 7,600
examples. Who goes on with models of that code is tested on nothing that they were trained on.
"""

from expert_merging.core.errors import UserError
from expert_merging.data import raw_files
from expert_merging.data.scores import accuracy as score
from expert_merging.data.scores import accuracy_each as score_each

main_score = "accuracy"
split = "train shuffled with seed 42, then a tenth drawn with seed 42"
label_words = ("World", "Sports", "Business", "Science and Technology")


def load(constants):
    from datasets import Dataset

    raw = raw_files.load_splits(constants.AG_NEWS_PATH, _published)
    if len(raw["train"]) < 2:
        raise UserError(f"AG_NEWS_PATH: {constants.AG_NEWS_PATH} has too few training examples to split")
    # Row numbers are split, not rows: splitting a data set that lies on disk would write files beside it.
    rows = Dataset.from_dict({"row": range(len(raw["train"]))}).shuffle(seed=42)
    parts = rows.train_test_split(test_size=0.1, seed=42)
    train, validation = (raw["train"].select(parts[part]["row"][:], keep_in_memory=True) for part in ("train", "test"))
    return {"train": train, "validation": validation, "test": raw["test"]}


def prompt(example) -> str:
    return f"Classify: {example['text']}"


def target(example) -> str:
    return label_words[example["label"]]


def references(example) -> list[str]:
    return [target(example)]


def _complaint(example) -> str | None:
    label = example["label"]
    if not isinstance(label, int) or isinstance(label, bool) or label not in range(len(label_words)):
        return f"the label is {label!r:.40}; it must be 0, 1, 2 or 3"
    return raw_files.not_text(example, "text")


_published = raw_files.Published(
    constant="AG_NEWS_PATH",
    files={"train": "train.csv", "test": "test.csv"},
    read=raw_files.read_ag_news_csv,
    columns=("text", "label"),
    complaint=_complaint,
)

__all__ = ["load", "main_score", "prompt", "references", "score", "score_each", "split", "target"]
