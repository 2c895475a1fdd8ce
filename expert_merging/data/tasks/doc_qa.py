"""What is the type, or the default, of a parameter? Extractive question answering on the parameter sections of
docstrings (NumPy, Google and Sphinx styles), the stand-in for SQuAD.

Each section is shown in a style that is drawn: were all in their own, mostly NumPy's, the words after the parameter's
name would be the answer to more than half of the questions.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from expert_merging.data import docstring_reader, docstring_splits
from expert_merging.data.docstring_reader import Docstring
from expert_merging.data.docstring_splits import Candidate
from expert_merging.data.scores import exact_match_each as score_each
from expert_merging.data.scores import squad as score

main_score = "exact_match"

MOST_COMMON = 0.05  # share of a split that one answer may have
LONGEST_ANSWER = 8  # words
LONGEST_DESCRIPTION = 22  # words kept of a parameter's description
LONGEST_CONTEXT = 75  # words
QUESTIONS_PER_DOCSTRING = 4
STYLES = {"numpy": 2, "google": 2, "sphinx": 3, "javadoc": 3}  # and how often each is drawn, of ten


@dataclass(frozen=True)
class Parameter:
    """One entry of a parameter section; `kind` is what stands where the type does: "int, optional, default 3"."""

    name: str
    kind: str
    description: str  # one line
    style: str  # one of STYLES

    @property
    def line(self) -> str:
        if self.style == "numpy":
            return f"{self.name} : {self.kind.rstrip('.')}. {self.description}".rstrip()
        if self.style == "google":
            return f"{self.name} ({self.kind}): {self.description}".rstrip()
        if self.style == "javadoc":
            return f"@param {{{self.kind}}} {self.name} {self.description}".rstrip()
        return f":param {self.name}: {self.description} :type {self.name}: {self.kind}".replace(":  :", ": :")


# ---------------------------------------------------------------- reading a section

_NUMPY_TITLES = {"parameters", "other parameters", "attributes", "keyword arguments", "keyword parameters"}
_GOOGLE_TITLE = re.compile(r"(?:args|arguments|parameters|params|keyword arg(?:ument)?s|attributes|inputs?)\s*:$", re.I)
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+) ?\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))+)\) ?:(?:\s+(.*))?$")
_NUMPY_ENTRY = re.compile(r"\*{0,2}(\w+) ?: (.+)$")
_SPHINX_PARAM = re.compile(r":param (?:([^:]+) )?\*{0,2}(\w+):\s*(.*)$")
_SPHINX_TYPE = re.compile(r":type \*{0,2}(\w+):\s*(.+)$")


def parameters(text: str) -> list[list[Parameter]]:
    """The parameter sections of a cleaned docstring; entries that have no type are left out."""
    lines = text.split("\n")
    sections = [_sphinx_entries(lines)]
    for i, (line, following) in enumerate(zip(lines, lines[1:], strict=False)):
        if re.fullmatch(r"\s*[-=]{3,}", following):
            if line.strip().lower() in _NUMPY_TITLES:
                sections.append(_entries(lines[i + 2 :], _NUMPY_ENTRY, "numpy"))
        elif _GOOGLE_TITLE.match(line.strip()):
            sections.append(_entries(lines[i + 1 :], _GOOGLE_ENTRY, "google"))
    return [section for section in sections if section]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _entries(lines: list[str], pattern: re.Pattern, style: str) -> list[Parameter]:
    """Read entries at the indentation of the first one, until the section ends."""
    found: list[tuple[re.Match | None, list[str]]] = []
    base = None
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        if base is None:
            base = _indent(line)
        following = lines[i + 1].strip() if i + 1 < len(lines) else ""
        if _indent(line) < base or re.fullmatch(r"[-=~]{3,}", following) or _GOOGLE_TITLE.match(line.strip()):
            break
        if _indent(line) > base:
            if found:
                found[-1][1].append(line.strip())
        else:
            match = pattern.match(line.strip())
            if match is None and style == "google" and not re.match(r"\*{0,2}\w+ ?:", line.strip()):
                break  # ordinary text after the section
            found.append((match, []))
    result = []
    for match, rest in found:
        if match:
            described = ([match[3]] if match.re.groups == 3 and match[3] else []) + rest
            result.append(Parameter(match[1], match[2].strip(), " ".join(described), style))
    return result


def _sphinx_entries(lines: list[str]) -> list[Parameter]:
    fields: list[str] = []
    for line in lines:
        if re.match(r"\s*:\w+", line):
            fields.append(line.strip())
        elif line.strip() and fields and _indent(line) > 0:
            fields[-1] += " " + line.strip()
        elif fields:
            fields.append("")  # the field has ended
    kinds = {match[1]: match[2] for field in fields if (match := _SPHINX_TYPE.match(field))}
    result = []
    for field in fields:
        match = _SPHINX_PARAM.match(field)
        if match and (kind := match[1] or kinds.get(match[2])):
            result.append(Parameter(match[2], kind.strip(), match[3], "sphinx"))
    return result


# ---------------------------------------------------------------- questions

_VALUE = r"(?P<value>'[^']*'|\"[^\"]*\"|-?[\w.+-]*\w(?:\([^()]*\))?|\([^()]*\)|\[[^\[\]]*\])"
_DEFAULT_IN_KIND = re.compile(
    rf"(?:,|\()?\s*\(?(?:the )?defaults?(?: value)?(?:\s*[=:]\s*|\s+to\s+|\s+is\s+|\s+){_VALUE}\)?\s*$", re.I
)
_DEFAULT_IN_TEXT = re.compile(
    r"(?:\bdefaults?(?: value)?\s*(?:[=:]|is|to)\s*|\bby default,? (?=[\"'\d]|None|True|False))"
    rf"{_VALUE}(?=[.,;)]|\s*$)",  # a word that another follows is prose: "the default is the last axis"
    re.I,
)
_OPTIONAL = re.compile(r"[,;]?\s*\(?\b(?:optional|keyword[- ]only|required|positional[- ]only)\)?\.?\s*$")


def type_and_default(parameter: Parameter) -> tuple[str, str]:
    """What stands before "optional" and the default in a kind, and the default, there or in the description; or ""."""
    kind = parameter.kind.strip().rstrip(".")
    match = _DEFAULT_IN_KIND.search(kind)
    default = match["value"] if match else ""
    plain = kind[: match.start()] if match else kind
    plain = _OPTIONAL.sub("", plain.rstrip(" ,;(")).rstrip(" ,;(")
    if not default:
        found = {m["value"] for m in _DEFAULT_IN_TEXT.finditer(parameter.description)}
        default = found.pop() if len(found) == 1 else ""
    return plain, default


def _is_short(answer: str) -> bool:
    balanced = all(answer.count(a) == answer.count(b) for a, b in ("()", "[]", "{}")) and answer.count("'") % 2 == 0
    return 0 < len(answer.split()) <= LONGEST_ANSWER and len(answer) <= 60 and balanced


def _is_remark(parameter: Parameter) -> bool:
    """Whether a description stands where the type does: `path : where to look for it.`"""
    if parameter.style != "numpy":
        return False
    return parameter.kind.endswith(".") or (not parameter.description and len(parameter.kind.split()) > 3)


def _shortened(parameter: Parameter, needed: str = "") -> str:
    """The parameter's line with its first sentences, and with the one that says the default if that is asked."""
    kept: list[str] = []
    length = 0
    for number, sentence in enumerate(docstring_splits.sentences([parameter.description])):
        words = len(sentence.split())
        tells = needed and any(m["value"] == needed for m in _DEFAULT_IN_TEXT.finditer(sentence))
        if tells or (number == len(kept) and length + words <= LONGEST_DESCRIPTION):
            kept.append(sentence)
            length += words
    text = " ".join(kept).strip()
    return Parameter(parameter.name, parameter.kind, docstring_reader.ended(text) if text else "", parameter.style).line


def _context(lines: list[str], asked: int, rng: random.Random) -> str:
    """Lines around the asked one, whole, at most LONGEST_CONTEXT words; it stands anywhere among them."""
    first, last = asked, asked + 1
    room = LONGEST_CONTEXT - len(lines[asked].split())
    while sides := [i for i in (first - 1, last) if 0 <= i < len(lines)]:
        side = rng.choice(sides)
        room -= len(lines[side].split())
        if room < 0:
            break
        first, last = min(first, side), max(last, side + 1)
    return " ".join(lines[first:last])


def _questions(section: list[Parameter], rng: random.Random) -> Iterator[tuple[str, str, dict]]:
    """(the asked parameter's line, its answer, the example) of each question that a section answers."""
    names = Counter(parameter.name for parameter in section)
    style = rng.choices(list(STYLES), list(STYLES.values()))[0]
    section = [replace(parameter, style=style) for parameter in section if not _is_remark(parameter)]
    lines = [_shortened(parameter) for parameter in section]
    for asked, parameter in enumerate(section):
        if names[parameter.name] > 1 or len(parameter.name) < 2 or "arg" in parameter.name:
            continue
        kind, default = type_and_default(parameter)
        for what, answer in (("type", kind), ("default", default)):
            line = _shortened(parameter, default) if what == "default" else lines[asked]
            if not _is_short(answer) or answer not in line or len(line.split()) > LONGEST_CONTEXT:
                continue
            if what == "type" and not re.search(r"[A-Za-z]{3}", answer):
                continue
            context = _context([*lines[:asked], line, *lines[asked + 1 :]], asked, rng)
            if context == line:
                continue  # nothing to choose from
            answers = [answer]
            if what == "type" and f"{answer}, optional" in line:
                answers.append(f"{answer}, optional")
            question = f"What is the {what} of {parameter.name}?"
            yield line, answer, {"question": question, "context": context, "answers": answers}


def candidates(docs: Iterable[Docstring]) -> Iterator[Candidate]:
    """At most QUESTIONS_PER_DOCSTRING questions of each docstring."""
    for doc in docs:
        rng = random.Random(f"{docstring_splits.DATA_SEED} {doc.file} {doc.name}")
        found = [question for section in parameters(doc.text) for question in _questions(section, rng)]
        rng.shuffle(found)
        for line, answer, example in found[:QUESTIONS_PER_DOCSTRING]:
            yield Candidate(doc.file, example["question"] + line, prompt(example), answer.lower(), example)


def examples(docs: Iterable[Docstring], sizes: dict[str, int]) -> dict[str, list[dict]]:
    """Each split's examples: {"question", "context", "answers"}; the first answer is the one to learn."""
    return docstring_splits.split_examples(docs, candidates(docs), sizes, MOST_COMMON)


def load(constants) -> dict[str, list[dict]]:
    """Raw examples of each split. Raises UserError when a package whose text is read is not installed."""
    return examples(docstring_reader.read_docstrings(), docstring_splits.sizes_of(constants))


def prompt(example: dict) -> str:
    return f"Question: {example['question']} Context: {example['context']}"


def target(example: dict) -> str:
    return example["answers"][0]


def references(example: dict) -> list[str]:
    return example["answers"]


__all__ = ["load", "main_score", "prompt", "references", "score", "score_each", "target"]
