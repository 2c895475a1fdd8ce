"""Token ids of many texts by a fast tokenizer, every distinct word tokenised once.

The tokenizers of T5 and Switch cut a text at its spaces before anything else, so that a word's ids do not depend on the
words beside it. Text repeats its words: looking them up is ten times faster than tokenising it anew.
"""

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np


class WordCache:
    """Calls give what `tokenizer(texts, add_special_tokens=False)["input_ids"]` gives.

    A word is looked up only if it has the same ids alone and between two others; a text with another word (a combining
    accent after a space, say) is tokenised whole, as are all texts where the tokenizer does not cut at spaces.
    """

    def __init__(self, tokenizer, room: int = 1_000_000):
        """`room`: how many words are kept; with more, all are forgotten. A million takes about 200 MB."""
        self.backend, self.room = tokenizer.backend_tokenizer, room
        self.known: dict[str, tuple[int, ...] | None] = {}  # None: its ids depend on its neighbours
        pre_tokenizer = self.backend.pre_tokenizer
        self.cuts_at_spaces = pre_tokenizer is not None and len(pre_tokenizer.pre_tokenize_str("a b")) == 2
        self.newline_is_space = self._whole(["a\nb"]) == self._whole(["a b"])

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.cuts_at_spaces:
            return self._whole(texts)
        split = [(text.replace("\n", " ") if self.newline_is_space else text).split(" ") for text in texts]
        if len(self.known) > self.room:
            self.known.clear()
        self._learn(sorted(set().union(*split) - self.known.keys()))
        made = [list(map(self.known.__getitem__, words)) for words in split]
        rest = [i for i, pieces in enumerate(made) if None in pieces]
        for i, ids in zip(rest, self._whole([texts[i] for i in rest]), strict=True):
            made[i] = [ids]
        return [list(chain.from_iterable(pieces)) for pieces in made]

    def _learn(self, words: list[str]) -> None:
        """Note the ids of new words, in rows of 64, which costs half as much as one by one. That they are the same beside
        others is tried for a row as a whole, and where that gives anything else, word by word."""
        rows = [words[start : start + 64] for start in range(0, len(words), 64)]
        alone = self._encode(rows, is_pretokenized=True)
        together = self._whole([" ".join(["a", *row, "a"]) for row in rows])
        neighbour = self._whole(["a"])[0] if words else []
        for row, encoding, beside in zip(rows, alone, together, strict=True):
            ids = encoding.ids  # made anew at each access
            cuts = np.searchsorted(encoding.word_ids, range(len(row) + 1)).tolist()
            # Tuples, since the garbage collector looks through a million lists again and again. A word without ids, of
            # nothing but white space, may be something at the end of a text.
            ids_of = [tuple(ids[start:end]) or None for start, end in pairwise(cuts)]
            if beside != [*neighbour, *ids, *neighbour]:
                between = self._whole([f"a {word} a" for word in row])
                same = [own and one == [*neighbour, *own, *neighbour] for own, one in zip(ids_of, between, strict=True)]
                ids_of = [own if one else None for own, one in zip(ids_of, same, strict=True)]
            self.known.update(zip(row, ids_of, strict=True))

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode(texts)]

    def _encode(self, texts: Sequence, **how):
        """By the tokenizer itself, on all cores."""
        self.backend.no_truncation()
        self.backend.no_padding()
        return self.backend.encode_batch(list(texts), add_special_tokens=False, **how)
