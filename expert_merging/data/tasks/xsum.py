"""XSum: one sentence that says what a BBC article is about (paper, 4.1 and A.1; Narayan et al., 2018)."""

from expert_merging.data import raw_files
from expert_merging.data.scores import rouge as score
from expert_merging.data.scores import rouge_l_each as score_each

main_score = "rougeL"


def load(constants):
    return raw_files.load_splits(constants.XSUM_PATH, _published)


def prompt(example) -> str:
    return f"Summarize: {example['document']}"


def target(example) -> str:
    return example["summary"]


def references(example) -> list[str]:
    return [example["summary"]]


_published = raw_files.Published(
    constant="XSUM_PATH",
    files={split: f"{split}.jsonl" for split in ("train", "validation", "test")},
    read=raw_files.read_jsonl,
    columns=("document", "summary"),
    complaint=lambda example: raw_files.not_text(example, "document", "summary"),
)

__all__ = ["load", "main_score", "prompt", "references", "score", "score_each", "target"]
