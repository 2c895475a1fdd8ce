"""The raw data sets that instructions are made of: where each lies on the hub, and how its rows are read.

A row is in the hub's columns, or in a plain form: {"text", "text2", "label"} for classification, the label a number;
{"question", "choices", "answer"} for multiple choice, the answer an index; {"question", "answer"} for free questions.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.data import raw_files
from expert_merging.hemoe import questions
from expert_merging.hemoe.templates import Case

Row = dict[str, Any]
NO_YES, YES_NO = ("no", "yes"), ("yes", "no")
UNCLEAR = "it is not possible to tell"


@dataclass(frozen=True)
class Classes:
    """Classification: `fields` of a template and the columns they are; the words for the labels 0, 1, ..."""

    fields: dict[str, str]
    names: tuple[str, ...]
    more: dict[str, str] = field(default_factory=dict)  # fields that are the same for each row
    label: str = "label"  # its column on the hub

    def case(self, row: Row) -> Case:
        """Raises ValueError for a row that is none."""
        columns = list(self.fields.values())
        if "text" in row and "text" not in columns and len(columns) <= 2:
            columns = ["text", "text2"][: len(columns)]
        label = _column(row, self.label, "" if self.label == "label" else " (nor labels.json for the field 'label')")
        if complaint := raw_files.not_text(row, *columns):
            raise ValueError(complaint)
        if not isinstance(label, int) or not 0 <= label < len(self.names) or (label is True and self.names[1] != "yes"):
            raise ValueError(f"the label is {label!r:.40}; it must be 0 to {len(self.names) - 1}")
        fields = {name: row[column] for name, column in zip(self.fields, columns, strict=True)}
        *first, last = self.names
        return Case(fields | self.more | {"labels": f"{', '.join(first)} or {last}"}, self.names, self.names[label])


@dataclass(frozen=True)
class Choices:
    """Multiple choice and completion: `plain` makes the plain form of a row of the hub, and other fields beside."""

    plain: Callable[[Row], Row]

    def case(self, row: Row) -> Case:
        """Raises ValueError for a row that is none."""
        if not isinstance(row.get("choices"), list):
            row = self.plain(row)
        if complaint := questions.complaint(row):
            raise ValueError(complaint)
        fields = {name: value for name, value in row.items() if isinstance(value, str)}
        before, _, fields["rest"] = row["question"].partition("_")
        fields["before"] = before.rstrip()
        return Case(fields, tuple(row["choices"]), row["choices"][row["answer"]])


@dataclass(frozen=True)
class Free:
    """A question with an answer in its own words."""

    def case(self, row: Row) -> Case:
        """Raises ValueError for a row that is none."""
        answer = _column(row, "answer")
        answer = _column(answer, "value") if isinstance(answer, dict) else answer  # TriviaQA's, with its aliases
        if complaint := raw_files.not_text({**row, "answer": answer}, "question", "answer"):
            raise ValueError(complaint)
        if not answer.strip():
            raise ValueError("the answer is empty")
        return Case({"question": row["question"]}, (), answer)


@dataclass(frozen=True)
class DataSet:
    """A data set: its name and configuration on the hub, the kind of its templates, how a row is read, its split."""

    hub: str
    config: str
    kind: str
    reader: Classes | Choices | Free
    split: str = "train"


# -- rows of the hub in the plain form; a column that is absent is a KeyError, which `read_case` puts in words


def _of_letters(question: str) -> Callable[[Row], Row]:
    """ARC and OpenBookQA, whose choices are a column of texts and one of the names that the answer goes by."""

    def plain(row: Row) -> Row:
        texts, names = row["choices"]["text"], row["choices"]["label"]
        return {"question": row[question], "choices": texts, "answer": _index(row["answerKey"], names)}

    return plain


def _of_columns(question: str, choices: tuple[str, ...], answer: str, names: tuple) -> Callable[[Row], Row]:
    """A choice a column; `names` are the values of the column `answer`, in the order of the choices."""

    def plain(row: Row) -> Row:
        texts = [row[column] for column in choices]
        return {"question": row[question], "choices": texts, "answer": _index(row[answer], names)}

    return plain


def _siqa(row: Row) -> Row:
    found = _of_columns("question", ("answerA", "answerB", "answerC"), "label", ("1", "2", "3"))(row)
    return found | {"question": _text(row, "context") + " " + _text(row, "question")}


def _copa(row: Row) -> Row:
    asked = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
    if row["question"] not in asked:
        raise ValueError(f"the question is {row['question']!r:.40}; it must be cause or effect")
    found = _of_columns("premise", ("choice1", "choice2"), "label", (0, 1))(row)
    return found | {"premise": row["premise"], "ask": asked[row["question"]]}


def _logiqa(row: Row) -> Row:
    question = _text(row, "context") + "\n" + _text(row, "question")
    return {"question": question, "choices": row["options"], "answer": _index(_text(row, "label").strip(), "abcd")}


def _sciq(row: Row) -> Row:
    """The text that supports the answer comes first; the right choice is anywhere, by the question alone."""
    right = row["correct_answer"]
    choices = [right, row["distractor1"], row["distractor2"], row["distractor3"]]
    random.Random(_text(row, "question")).shuffle(choices)
    question = f"{_text(row, 'support')}\n{_text(row, 'question')}".strip()
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def _hellaswag(row: Row) -> Row:
    """Without the marks that WikiHow's headings left: [header], [title], [step], [substeps]."""
    texts = (_text(row, "ctx"), *_texts(row, "endings"))
    ended = [re.sub(r"(?<=\w)\s*\[[a-z]+\]", ".", text) for text in texts]
    context, *endings = [re.sub(r"\s*\[[a-z]+\]\s*", " ", text).strip() for text in ended]
    return {
        "question": context,
        "choices": endings,
        "answer": _index(row["label"], [str(i) for i in range(len(endings))]),
    }


def _record(row: Row) -> Row:
    """The first of the answers is the right one; the report's highlights become lines of their own."""
    choices = list(dict.fromkeys(_texts(row, "entities")))
    passage = _text(row, "passage").replace("\n@highlight\n", "\n- ")
    question = _text(row, "query").replace("@placeholder", "_")
    answer = _index(next(iter(_texts(row, "answers")), None), choices)
    return {"question": question, "passage": passage, "choices": choices, "answer": answer}


def _text(row: Row, column: str) -> str:
    if complaint := raw_files.not_text(row, column):
        raise ValueError(complaint)
    return row[column]


def _texts(row: Row, column: str) -> list[str]:
    if not isinstance(row[column], list) or not all(isinstance(text, str) for text in row[column]):
        raise ValueError(f"the field {column!r} is no list of texts")
    return row[column]


def _index(value: Any, names: Any) -> int:
    if value not in list(names):
        raise ValueError(f"the answer is {value!r:.40}; it must be one of {', '.join(map(str, names))}")
    return list(names).index(value)


def _column(row: Row, name: str, more: str = "") -> Any:
    if name not in row:
        raise ValueError(f"no field {name!r}{more}")
    return row[name]


# -- the tables

_GLUE, _SUPER_GLUE, _ARC = "nyu-mll/glue", "aps/super_glue", "allenai/ai2_arc"
_THREE = ("yes", UNCLEAR, "no")  # entailment, neutral, contradiction
_NLI = {"premise": "premise", "hypothesis": "hypothesis"}
_PAIR = {"first": "sentence1", "second": "sentence2"}

PAPER = {  # the 26 of the paper
    "anli": DataSet("facebook/anli", "", "truth", Classes(_NLI, _THREE), "train_r1"),
    "arc_challenge": DataSet(_ARC, "ARC-Challenge", "science", Choices(_of_letters("question"))),
    "arc_easy": DataSet(_ARC, "ARC-Easy", "science", Choices(_of_letters("question"))),
    "boolq": DataSet(
        _SUPER_GLUE, "boolq", "yes or no", Classes({"passage": "passage", "question": "question"}, NO_YES)
    ),
    "cb": DataSet(_SUPER_GLUE, "cb", "truth", Classes(_NLI, ("yes", "no", UNCLEAR))),
    "cola": DataSet(_GLUE, "cola", "grammar", Classes({"sentence": "sentence"}, NO_YES)),
    "copa": DataSet(_SUPER_GLUE, "copa", "cause or effect", Choices(_copa)),
    "gsm8k": DataSet("openai/gsm8k", "main", "arithmetic", Free()),
    "hellaswag": DataSet("Rowan/hellaswag", "", "ending", Choices(_hellaswag)),
    "logiqa": DataSet("EleutherAI/logiqa", "logiqa", "question", Choices(_logiqa)),
    "mnli": DataSet(_GLUE, "mnli", "truth", Classes(_NLI, _THREE)),
    "mrpc": DataSet(_GLUE, "mrpc", "paraphrase", Classes(_PAIR, NO_YES, {"thing": "sentence"})),
    "multirc": DataSet(
        _SUPER_GLUE, "multirc", "right answer",
        Classes({"paragraph": "paragraph", "question": "question", "candidate": "answer"}, NO_YES),
    ),
    "openbookqa": DataSet("allenai/openbookqa", "main", "science", Choices(_of_letters("question_stem"))),
    "piqa": DataSet("baber/piqa", "", "how to", Choices(_of_columns("goal", ("sol1", "sol2"), "label", (0, 1)))),
    "qnli": DataSet(_GLUE, "qnli", "answered", Classes({"question": "question", "sentence": "sentence"}, YES_NO)),
    "qqp": DataSet(
        _GLUE, "qqp", "paraphrase",
        Classes({"first": "question1", "second": "question2"}, NO_YES, {"thing": "question"}),
    ),
    "record": DataSet(_SUPER_GLUE, "record", "news", Choices(_record)),
    "rte": DataSet(_GLUE, "rte", "entailment", Classes({"premise": "sentence1", "hypothesis": "sentence2"}, YES_NO)),
    "sciq": DataSet("allenai/sciq", "", "question", Choices(_sciq)),
    "siqa": DataSet("lighteval/siqa", "", "question", Choices(_siqa)),
    "sst2": DataSet(_GLUE, "sst2", "sentiment", Classes({"text": "sentence"}, ("negative", "positive"))),
    "triviaqa": DataSet("mandarjoshi/trivia_qa", "rc.nocontext", "trivia", Free()),
    "wic": DataSet(_SUPER_GLUE, "wic", "word sense", Classes({**_PAIR, "word": "word"}, NO_YES)),
    "winogrande": DataSet(
        "allenai/winogrande", "winogrande_xl", "blank",
        Choices(_of_columns("sentence", ("option1", "option2"), "answer", ("1", "2"))),
    ),
    "wsc": DataSet(
        _SUPER_GLUE, "wsc.fixed", "coreference",
        Classes({"text": "text", "noun": "span1_text", "pronoun": "span2_text"}, NO_YES),
    ),
}  # fmt: skip
_OTHERS = {  # asked for by name only
    "mr": DataSet(
        "cornell-movie-review-data/rotten_tomatoes", "", "sentiment", Classes({"text": "text"}, ("negative", "positive"))
    ),
    "sst5": DataSet(
        "SetFit/sst5", "", "sentiment",
        Classes({"text": "text"}, ("very negative", "negative", "neutral", "positive", "very positive")),
    ),
    "trec": DataSet(
        "CogComp/trec", "", "question type",
        Classes(
            {"text": "text"}, ("abbreviation", "entity", "description", "person", "location", "number"), label="coarse_label"
        ),
    ),
}  # fmt: skip
DATA_SETS = PAPER | _OTHERS | {"social_iqa": PAPER["siqa"]}  # lm_eval's name of it


def read_case(data_set: DataSet, row: Row | str, where: str) -> Case:
    """A row as a case. Raises UserError, in one line that begins with `where`, for one that is none."""
    try:
        if isinstance(row, str):
            raise ValueError(row)
        case = data_set.reader.case(row)
        if broken := [said for text in (*case.fields.values(), *case.choices) if (said := raw_files.not_unicode(text))]:
            raise ValueError(f"a text {broken[0]}")
    except KeyError as error:
        raise UserError(f"{where}: no field {error}; {data_set.hub} has it") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        said = f"{error}" if type(error) is ValueError else f"not built as the rows of {data_set.hub} are ({error})"
        raise UserError(f"{where}: {said}") from error
    return case


def known(task: str) -> DataSet:
    """Raises UserError where there is no such data set."""
    if task not in DATA_SETS:
        raise UserError(
            f"RAW_PATH: no data set {task!r} is known; there are {', '.join(sorted(DATA_SETS))}; raw_tasks names those to take"
        )
    return DATA_SETS[task]
