"""Four ways to spoil a text, each at two strengths: (text, random) -> text. What there is to read is never nothing."""

import random
from collections.abc import Callable

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # neighbours in a row are hit for one another


def typos(text: str, chance: random.Random, strength: int) -> str:
    """One typing error in a tenth of the words, in three tenths: two letters change places, one is lost, comes twice, or is
    its neighbour on the keyboard. Words of one letter stay."""
    return " ".join(
        _mistyped(word, chance) if len(word) > 1 and chance.random() < (0.1, 0.3)[strength - 1] else word
        for word in text.split()
    )


def _mistyped(word: str, chance: random.Random) -> str:
    at = chance.randrange(len(word) - 1)
    before, first, second, after = word[:at], word[at], word[at + 1], word[at + 2 :]
    beside = next((row[row.index(first.lower()) - 1] for row in KEYS if first.lower() in row), first)
    return before + chance.choice((second + first, second, first + first + second, beside + second)) + after


def dropped_words(text: str, chance: random.Random, strength: int) -> str:
    """A tenth of the words is lost, three tenths; one stays."""
    words = text.split()
    kept = [word for word in words if chance.random() >= (0.1, 0.3)[strength - 1]]
    return " ".join(kept or words[:1])


def case(text: str, chance: random.Random, strength: int) -> str:
    """Three tenths of the letters change case, all of them. A model that reads no case sees no difference."""
    share = (0.3, 1.0)[strength - 1]
    return "".join(letter.swapcase() if chance.random() < share else letter for letter in text)


def shuffled_words(text: str, chance: random.Random, strength: int) -> str:
    """Words change places within runs of three; in the whole text."""
    words = text.split()
    run = 3 if strength == 1 else max(1, len(words))
    runs = [words[start : start + run] for start in range(0, len(words), run)]
    return " ".join(word for part in runs for word in chance.sample(part, len(part)))


CORRUPTIONS: dict[str, Callable[[str, random.Random, int], str]] = {
    function.__name__: function for function in (typos, dropped_words, case, shuffled_words)
}
STRENGTHS = (1, 2)


def corrupted(text: str, name: str, strength: int, place: str) -> str:
    """The text spoilt; the same each time for the same `place`, which says which text it is."""
    return CORRUPTIONS[name](text, random.Random(f"{name} {place}"), strength) or text
