"""SQuAD v1.1: answer a question with words of the context (paper, 4.1 and A.1; Rajpurkar et al., 2016).

The official test split is not public. As in the paper the published validation split serves twice: its 10,570 questions
choose the best epoch and give the reported score, so that score is on examples the epoch was chosen by.
"""

from expert_merging.data import raw_files
from expert_merging.data.scores import exact_match_each as score_each
from expert_merging.data.scores import squad as score

main_score = "exact_match"


def load(constants):
    raw = raw_files.load_splits(constants.SQUAD_PATH, _published)
    return {"train": raw["train"], "validation": raw["validation"], "test": raw["validation"]}


def prompt(example) -> str:
    return f"Question: {example['question']} Context: {example['context']}"


def target(example) -> str:
    """The longest of the given answers, the first of them where several are: training examples have just one."""
    return max(references(example), key=len)


def references(example) -> list[str]:
    return list(example["answers"]["text"])


def _complaint(example) -> str | None:
    answers = example["answers"].get("text") if isinstance(example["answers"], dict) else None
    if not answers or not isinstance(answers, list):
        return "no answer; SQuAD v1.1 is wanted, where every question has one"
    if not all(isinstance(answer, str) and not raw_files.not_unicode(answer) for answer in answers):
        return "an answer is no text"
    return raw_files.not_text(example, "question", "context")


_published = raw_files.Published(
    constant="SQUAD_PATH",
    files={"train": "train-v1.1.json", "validation": "dev-v1.1.json"},
    read=raw_files.read_squad_json,
    columns=("question", "context", "answers"),
    complaint=_complaint,
)

__all__ = ["load", "main_score", "prompt", "references", "score", "score_each", "target"]
