"""Token ids of many texts by a fast tokenizer, every distinct word tokenised once.

The tokenizers of T5 and Switch cut a text at its spaces before anything else, so that a word's ids do not depend on the
words beside it. Text repeats its words: finding them again (by arrow) is many times faster than tokenising them anew.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class WordCache:
    """Calls give what `tokenizer(texts, add_special_tokens=False)["input_ids"]` gives, one text after another in an array.

    A word is looked up only if it has the same ids alone and between two others; a text with another word (a combining
    accent after a space, say) is tokenised whole, as are all texts where the tokenizer does not cut at spaces.
    """

    def __init__(self, tokenizer, room: int = 1_000_000):
        """`room`: how many words are kept; with more, all are forgotten. A million takes about 150 MB."""
        self.backend, self.room = tokenizer.backend_tokenizer, room
        pre_tokenizer = self.backend.pre_tokenizer
        cuts = pre_tokenizer is not None and len(pre_tokenizer.pre_tokenize_str("a b")) == 2
        self.cuts_at_spaces = cuts and self._whole(["a a"])[0] == 2 * self._whole(["a"])[0]  # and not "a" and " a"
        self.newline_is_space = self._whole(["a\nb"]) == self._whole(["a b"])
        self._forget()

    def _forget(self) -> None:
        self.row_of: dict[str, int] = {}  # word -> its row in the table, of which the first is empty
        self.ids, self.lengths = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
        self.depends = np.zeros(1, dtype=bool)  # on the words beside it

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts, number of ids of each text)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self.cuts_at_spaces or not texts:
            return _joined(self._whole(texts))
        if len(self.row_of) > self.room:
            self._forget()
        column = pa.array(texts, pa.large_string())
        if self.newline_is_space:
            column = pc.replace_substring(column, "\n", " ")
        pieces = pc.split_pattern(column, " ")
        encoded = pieces.flatten().dictionary_encode()
        words = encoded.dictionary.to_pylist()
        self._learn(sorted(word for word in words if word not in self.row_of))
        rows = np.fromiter(map(self.row_of.__getitem__, words), np.int64, len(words))[encoded.indices.to_numpy()]

        # A text with a word that depends on others is one long word at the end of the table.
        of_text = np.repeat(np.arange(len(texts)), counts := pc.list_value_length(pieces).to_numpy())
        first = np.cumsum(counts) - counts
        dependent = np.unique(of_text[self.depends[rows]])
        more, more_lengths = _joined(self._whole([texts[i] for i in dependent]))
        rows[np.isin(of_text, dependent)] = 0
        rows[first[dependent]] = len(self.lengths) + np.arange(len(dependent))
        ids, lengths = np.concatenate([self.ids, more]), np.concatenate([self.lengths, more_lengths])
        starts = np.cumsum(lengths) - lengths
        return ids[ranges(starts[rows], lengths[rows])], np.add.reduceat(lengths[rows], first)

    def _learn(self, words: list[str]) -> None:
        """Add new words to the table, in rows of 64, which costs half as much as one by one. That their ids are the same
        beside others is tried for a row as a whole, and where that gives anything else, word by word."""
        if not words:
            return
        rows = [words[start : start + 64] for start in range(0, len(words), 64)]
        alone = self._encode(rows, is_pretokenized=True)
        together = self._whole([" ".join(["a", *row, "a"]) for row in rows])
        neighbour = self._whole(["a"])[0]
        all_ids, lengths, depends = [self.ids], [self.lengths], [self.depends]
        for row, encoding, beside in zip(rows, alone, together, strict=True):
            ids = encoding.ids  # made anew at each access
            cuts = np.searchsorted(encoding.word_ids, np.arange(len(row) + 1))
            all_ids.append(np.array(ids, dtype=np.int32))
            lengths.append(np.diff(cuts))
            depends.append(lengths[-1] == 0)  # nothing but white space may be something at the end of a text
            if beside != [*neighbour, *ids, *neighbour]:
                between = self._whole([f"a {word} a" for word in row])
                for place, (one, (start, end)) in enumerate(zip(between, pairwise(cuts), strict=True)):
                    depends[-1][place] |= one != [*neighbour, *ids[start:end], *neighbour]
        self.row_of.update(zip(words, range(len(self.lengths), len(self.lengths) + len(words)), strict=True))
        self.ids, self.lengths = np.concatenate(all_ids), np.concatenate(lengths)
        self.depends = np.concatenate(depends)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode(texts)]

    def _encode(self, texts: Sequence, **how):
        """By the tokenizer itself, on all cores."""
        self.backend.no_truncation()
        self.backend.no_padding()
        return self.backend.encode_batch(list(texts), add_special_tokens=False, **how)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each, `lengths` numbers, one after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _joined(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=np.int32), *(np.array(row, dtype=np.int32) for row in rows)]), lengths
