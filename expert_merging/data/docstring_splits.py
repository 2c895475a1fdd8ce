"""What of the docstrings goes where: the split of a file, pre-training texts, and examples of a task.

A split is a matter of source files; no text is met twice. The candidates for examples are the tasks'; which of them are
kept is decided here, the same for all tasks and seeds.
"""

import functools
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from expert_merging.data.docstring_reader import Docstring, normalized, pieces_of_text

DATA_SEED = 42  # which examples there are must not depend on the seed of a run
SPLITS = ("train", "validation", "test")

# Groups of files that are known to copy each other's documentation: each group goes to one split as a whole.
_FAMILIES = {
    "transformers/models": r"transformers/(?:models/|modeling_(?:\w+_)?outputs\.py)",
    "torch/ao/nn": r"torch/(?:ao/)?nn/(?:intrinsic|qat|quantized|quantizable|sparse)",
    "pandas/core/frame": r"pandas/core/(?:generic|frame|series|base)\.py",
    "pandas/core/indexes": r"pandas/core/indexes/",
    "pandas/core/arrays": r"pandas/core/arrays/",
    "numpy/polynomial": r"numpy/polynomial/",
}


def _family(file: str) -> str:
    for family, pattern in _FAMILIES.items():
        if re.match(pattern, file):
            return family
    folder, _, stem = file.rpartition("/")
    if folder.startswith("narwhals"):  # the same file names, class by class, in each of its folders
        folder = "narwhals"
    stem = stem.removesuffix(".py").strip("_")
    return f"{folder}/{re.sub(r'^(?:modeling|tf|flax|async)_|_(?:tf|flax|async|fast|base)$', '', stem)}"


_SALT = 55  # of the first sixty, the one that leaves every large package near 10% of its text in each tenth but eight


@functools.cache
def split_of(file: str) -> str:
    """The split of a source file: train, validation or test, about 80/3/17 by a hash of the file's family. Validation only
    chooses the epoch; test is what conclusions are drawn from.

    The model folders of transformers copy each other line by line: all of them are training text.
    """
    family = _family(file)
    if family == "transformers/models":
        return "train"
    share = int.from_bytes(hashlib.sha256(f"{_SALT}/{family}".encode()).digest()[:4], "big") % 100
    return "train" if share < 80 else "validation" if share < 83 else "test"


_HEADING = re.compile(r"[A-Z]\w+(?: \w+)?[.:]")


def pretraining_texts(docs: Iterable[Docstring]) -> list[str]:
    """The training split's texts (see `one_line_texts`)."""
    return one_line_texts(doc for doc in docs if split_of(doc.file) == "train")


def one_line_texts(docs: Iterable[Docstring]) -> list[str]:
    """Docstrings as texts, one line each: signature or name, prose, parameters. No paragraph comes twice."""
    seen: set[str] = set()
    texts = []
    for doc in docs:
        kept: list[str] = []
        dropped = False
        for block in doc.blocks:
            letters = normalized(block)
            if len(letters) >= 40 and letters in seen:
                if kept and kept[-1].endswith(":"):  # what introduced it goes too
                    kept.pop()
                dropped = True
            elif not (dropped and len(letters) < 40 and not _HEADING.fullmatch(block)):  # nor does a scrap stay behind
                dropped = False
                seen.add(letters)
                kept.append(block)
        if max((len(normalized(block)) for block in kept), default=0) < 25:
            continue
        head = doc.signature or doc.name.rpartition(".")[2]
        texts.append(f"{head if len(head) <= 120 else head[:120].rpartition(',')[0] + ', ...)'}: {' '.join(kept)}")
    return list(dict.fromkeys(texts))


@dataclass(frozen=True)
class Candidate:
    """An example that a task could hold, and what decides whether it does."""

    file: str  # the docstring's source file: it gives the split
    identity: str  # no two examples share its letters
    text: str  # no two examples share its letters, and little of it may stand in another split
    label: str  # no label may be too common
    example: dict


def sentences(paragraphs: Iterable[str]) -> list[str]:
    """The sentences of `blocks`, in order."""
    return [sentence for paragraph in paragraphs for sentence in _SENTENCE_END.split(paragraph)]


_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<! cf\.)(?<! vs\.)(?<!etc\.)\s+(?=[A-Z\"'(\[])")


def split_examples(
    docs: Iterable[Docstring], candidates: Iterable[Candidate], sizes: dict[str, int], most_common: float
) -> dict[str, list[dict]]:
    """Examples of each split, in random order (DATA_SEED): as many as `sizes` asks for (0: all) and there are.

    An example belongs to the split of its file. It is left out when an earlier one has the same letters, and when more
    than half of its text stands in an earlier split, used there or not. No label has more than `most_common`, a share,
    of a split.
    """
    pieces_of: dict[str, set[str]] = {split: set() for split in SPLITS}
    for doc in docs:
        pieces_of[split_of(doc.file)].update(doc.pieces)
    candidates_of: dict[str, list[Candidate]] = {split: [] for split in SPLITS}
    for candidate in candidates:
        candidates_of[split_of(candidate.file)].append(candidate)

    chosen: dict[str, list[dict]] = {}
    earlier: set[str] = set()
    used: set[str] = set()
    for split in SPLITS:
        fresh = []
        for candidate in candidates_of[split]:
            keys = {"identity " + normalized(candidate.identity), "text " + normalized(candidate.text)}
            pieces = pieces_of_text(candidate.text)
            known = sum(len(piece) for piece in pieces if piece in earlier)
            told = normalized(candidate.identity) in earlier
            if not told and not keys & used and known <= sum(map(len, pieces)) / 2:
                used |= keys
                fresh.append(candidate)
        earlier |= pieces_of[split]
        random.Random(f"{DATA_SEED} {split}").shuffle(fresh)
        chosen[split] = [candidate.example for candidate in _capped(fresh, sizes.get(split, 0), most_common)]
    return chosen


def _capped(candidates: list[Candidate], size: int, most_common: float) -> list[Candidate]:
    counts = Counter(candidate.label for candidate in candidates)
    total = min(size or len(candidates), len(candidates))
    while True:  # fewer examples allow fewer of a label: go down until both hold
        cap = max(1, int(most_common * total))
        reachable = min(total, sum(min(count, cap) for count in counts.values()))
        if reachable == total:
            break
        total = reachable
    taken: Counter[str] = Counter()
    result: list[Candidate] = []
    for candidate in candidates:
        if len(result) < total and taken[candidate.label] < cap:
            taken[candidate.label] += 1
            result.append(candidate)
    return result


def sizes_of(constants) -> dict[str, int]:
    """How many examples of each split the constants ask for; 0 is all."""
    return {split: getattr(constants, f"{split}_examples") for split in SPLITS}
