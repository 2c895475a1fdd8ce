"""Token ids of many texts by a fast tokenizer, every distinct word tokenised once.

The tokenizers of T5 and Switch cut a text at its spaces before anything else, so that a word's ids do not depend on the
words beside it. Text repeats its words: looking them up is ten times faster than tokenising it anew.
"""

from collections.abc import Sequence
from itertools import chain


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
        """Note the ids of new words. That they are the same beside others is tried in rows of 64 words, and where a row
        gives anything else, word by word."""
        neighbour = self._whole(["a"])[0] if words else []
        alone = self._whole(words)
        rows = [slice(start, start + 64) for start in range(0, len(words), 64)]
        together = self._whole([" ".join(["a", *words[row], "a"]) for row in rows])
        for row, ids in zip(rows, together, strict=True):
            new, ids_of_new = words[row], alone[row]
            if ids == [*neighbour, *chain.from_iterable(ids_of_new), *neighbour]:
                same = [True] * len(new)
            else:
                between = self._whole([f"a {word} a" for word in new])
                same = [one == [*neighbour, *ids, *neighbour] for ids, one in zip(ids_of_new, between, strict=True)]
            for word, ids, is_same in zip(new, ids_of_new, same, strict=True):
                # A word of nothing but white space may be something at the end of a text.
                self.known[word] = tuple(ids) if ids and is_same else None

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        """By the tokenizer itself, on all cores."""
        self.backend.no_truncation()
        self.backend.no_padding()
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]
